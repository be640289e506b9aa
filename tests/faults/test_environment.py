"""What surrounds a run: Jupyter's matplotlib, encodings, outputs that are closed or full."""

import json
import os
import subprocess
import sys
from unittest import mock

import pytest
from image_runs import RUN, make_folder, run_in
from script_runner import (
    REPOSITORY,
    TINY,
    TWO_EPOCHS,
    assert_same_run,
    environment,
    fails,
    load_checkpoint,
    log_folder,
    model_folder,
    read_csv,
    run_ok,
    run_process,
    scalars,
)

import cifar_train
from utils import warn

#: cifar_train.py with the model 'tiny' beside the published ones.
DRIVER = REPOSITORY / "tests" / "helpers" / "distributed_run.py"
RUN_OF_TWO = [*TWO_EPOCHS, *TINY, "-p", "1"]


def test_jupyters_backend_an_output_in_ascii_and_a_name_that_is_not(tmp_path):
    variables = {"MPLBACKEND": "module://matplotlib_inline.backend_inline", "PYTHONIOENCODING": "ascii"}
    done = run_process([*RUN_OF_TWO, "--exp_str", "é"], tmp_path, DRIVER, **variables)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "run digits_tiny_CE_None_exp_0.01_\\xe9, seed 0" in done.stdout
    log = log_folder(tmp_path, exp="é")
    assert [row["epoch_from_0"] for row in read_csv(log / "log_test.csv")] == ["0", "1"]
    assert {path.name for path in log.iterdir()} >= {"class_accuracy.png", "confusion.png", "curves.png"}
    assert load_checkpoint(model_folder(tmp_path, exp="é") / "ckpt.pth.tar")["epoch"] == 2


class InvalidCxxCompiler(RuntimeError):
    """As torch._inductor.exc's."""


class TritonMissing(RuntimeError):
    """As torch._inductor.exc's."""


NO_CXX = InvalidCxxCompiler("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')")
NO_TRITON = TritonMissing("Cannot find a working triton installation.")


@pytest.mark.parametrize("error", [NO_CXX, NO_TRITON])
def test_compile_without_a_compiler_is_one_line(error, tmp_path):
    with mock.patch.object(cifar_train, "train_one_epoch", side_effect=error):
        fails([*RUN_OF_TWO, "--compile"], tmp_path, "--compile needs a working compiler")


def test_classes_that_neither_ascii_nor_utf8_can_say(tmp_path):
    names = ["chat é", "猫", os.fsdecode(b"caf\xe9")]
    data = make_folder(tmp_path / "images", names=names)
    args = ["--data_dir", data, *RUN, "--epochs", "1", "--milestones", "--lr", "0.001"]
    out = run_in(tmp_path, *args)
    lines = [line.rsplit(None, 3)[0] for line in out.splitlines() if line.startswith(("chat", "猫", "caf"))]
    assert lines == ["caf\\udce9", "chat é", "猫"]
    (log,) = (tmp_path / "log").iterdir()
    header = (log / "class_accuracy.csv").read_bytes().splitlines()[0]
    assert header == b"epoch_from_0,caf\xe9," + "chat é,猫".encode()
    assert json.loads((log / "summary.json").read_text())["classes"] == [names[2], names[0], names[1]]
    tags = {"class_accuracy/chat_é", "class_accuracy/猫", "class_accuracy/caf_"}  # tensorboardX's underscores
    assert tags <= scalars(log).keys()
    run_in(tmp_path, *args, "--resume", "auto")


def test_a_reader_that_has_gone_ends_the_run_as_it_ends_git_log(tmp_path):
    args = [*RUN_OF_TWO, "--epochs", "30"]
    command = [*map(str, [sys.executable, DRIVER, *args])]
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith("epoch 2/30  batch 1/"):
                break
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141, err
    assert not any(text in err for text in ("Traceback", "Exception ignored"))
    model = model_folder(tmp_path)
    assert load_checkpoint(model / "ckpt.pth.tar")["epoch"] >= 1
    assert not [path for path in model.iterdir() if path.name.startswith(".")]
    run_ok([*args, "--resume", "auto"], tmp_path)
    run_ok([*args, "--exp_str", "whole"], tmp_path)
    assert_same_run(model, model_folder(tmp_path, exp="whole"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_standard_output_on_a_full_disk_is_named():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "reproduce.py", "list"], cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True
        )
    line = "reproduce.py: error: standard output, or an open file: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_a_rank_alone_is_no_job_and_is_warned(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    warn("seen")
    monkeypatch.setenv("WORLD_SIZE", "2")
    warn("said by rank 0")
    assert capsys.readouterr().err == "warning: seen\n"
