PYTHON ?= python3
VENV ?= .venv
DATA ?= data
BIN = $(VENV)/bin

# the tested versions are of Python 3.11 on x86_64 Linux; elsewhere the ranges of requirements.txt decide
PINNED := $(shell $(PYTHON) -c "import sys, platform; print('-c constraints.txt' if sys.version_info[:2] == (3, 11) and platform.machine() == 'x86_64' and sys.platform == 'linux' else '')")

DEMO = $(BIN)/python cifar_train.py --dataset digits --arch resnet20 --imb_factor 0.01 --batch-size 32 --epochs 40 \
	--start_ib_epoch 20 --milestones 32 36 --seed 0 --threads 1 --root_log demo/log --root_model demo/checkpoint --overwrite

.PHONY: help setup demo test lint soak verify-weights
help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-16s%s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

setup: $(VENV)/installed  ## make .venv and install everything, development tools too
	@echo "To use it in this shell: source $(BIN)/activate"

$(VENV)/installed: requirements.txt requirements-ray.txt requirements-dev.txt constraints.txt
	$(PYTHON) -c "import sys; sys.exit('Python 3.10 or newer is needed' if sys.version_info < (3, 10) else 0)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -q -r requirements-dev.txt $(PINNED)
	touch $@

# IB continues from the checkpoint that the CE run keeps at the epoch where IB starts: phase one is trained once
demo: $(VENV)/installed  ## train CE and IB on long-tailed digits, print the tables (some minutes after the install)
	$(DEMO) --loss_type CE -p 1000
	$(DEMO) --loss_type IB --train_rule IBReweight -p 1000 \
		--resume demo/checkpoint/digits_resnet20_CE_None_exp_0.01_0/ckpt.epoch020.pth.tar

test: $(VENV)/installed  ## run the tests
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/installed  ## ruff, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

soak: $(VENV)/installed  ## the long fault tests, and faults planted in the code: takes hours
	$(BIN)/python tests/faults/storm.py --kills 100
	$(BIN)/python -m pytest tests/faults/test_flags.py --hypothesis-profile soak
	$(BIN)/python tests/faults/planted.py

verify-weights: $(VENV)/installed  ## evaluate the weights in results/ and compare with their records: DATA=DIR
	$(BIN)/python results/weights.py verify --data_dir $(DATA)
