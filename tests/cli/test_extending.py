"""docs/extending.md does what it says: its snippets and its commands are run, and each run is stopped and resumed."""

import contextlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import types
from unittest import mock

import pytest
import torch
from script_runner import (
    DIGITS,
    FIVE,
    REPOSITORY,
    TINY,
    break_off,
    fails,
    load_checkpoint,
    log_folder,
    model_folder,
    read_csv,
    refused,
    run_ok,
)  # fmt: skip

import imbalance_cifar
import losses
import models
from loaders.augment import AUGMENTS
from training import metrics, optimizer, registry

PAGE = (REPOSITORY / "docs" / "extending.md").read_text()
SECTIONS = {text.splitlines()[0]: text for text in PAGE.split("\n## ")[1:]}
REGISTRIES = (
    registry.LOSSES, registry.RULES, registry.CLASS_WEIGHTS, registry.SAMPLERS, optimizer.OPTIMIZERS,
    metrics.CLASS_FIGURES, models.CIFAR_MODELS, AUGMENTS,
)  # fmt: skip


@pytest.fixture
def registries():
    """What a snippet enters is gone after the test."""
    with contextlib.ExitStack() as stack:
        for entries in REGISTRIES:
            stack.enter_context(mock.patch.dict(entries))
        yield


def snippet(section):
    """The names that the section's Python code defines."""
    names = {}
    exec("\n".join(re.findall(r"```python\n(.*?)```", SECTIONS[section], flags=re.S)), names)
    return names


def commands():
    for section, text in SECTIONS.items():
        for line in re.findall(r"^python cifar_train\.py (.*--dataset digits.*)$", text, flags=re.M):
            yield pytest.param(section, shlex.split(line), id=f"{section}: {' '.join(line.split()[6:])}")


#: Flags that put an extension in force; of several in a command the first one here.
FLAGS = ("-a", "--train_rule", "--augment", "--optimizer", "--ema", "--mixup", "--loss_type")


def weights_tested(path):
    """Those of the last epoch, the average where there is one."""
    state = load_checkpoint(path)
    return {name.removeprefix("module."): tensor for name, tensor in state.get("ema", state["state_dict"]).items()}


@pytest.mark.parametrize(("section", "arguments"), list(commands()))
def test_an_extension_gives_other_weights_and_is_resumed_to_the_same_bits(section, arguments, registries, tmp_path):
    snippet(section)
    at = next((arguments.index(flag) for flag in FLAGS if flag in arguments), len(arguments))  # a metric has none
    plain = arguments[:at] + arguments[at + 2 :]
    for name, args in (("whole", arguments), ("resumed", arguments), ("plain", plain)):
        args = [*TINY, *args, "--seed", "0", "--threads", "1", "--root_log", name, "--root_model", name]
        if name == "resumed":
            assert break_off(args, tmp_path, after=1)[0] == 130
        run_ok(args, tmp_path)
    whole, resumed, other = (
        weights_tested(next(tmp_path.glob(f"{name}/*/ckpt.pth.tar"))) for name in ("whole", "resumed", "plain")
    )
    assert all(whole[name].equal(resumed[name]) for name in whole)
    differ = any(name not in whole or not tensor.equal(whole[name]) for name, tensor in other.items())
    assert differ == (plain != arguments)


def test_a_metric_has_a_column(registries, tmp_path):
    snippet("A metric")
    metrics.CLASS_FIGURES["a tensor"] = lambda *_: torch.tensor(0.5)
    run_ok([*FIVE, *TINY, "--imb_type", "none"], tmp_path)
    classes, rows = (
        read_csv(log_folder(tmp_path, imb="none") / name) for name in ("class_accuracy.csv", "log_test.csv")
    )
    worst = [min(float(of[str(k)]) for k in range(10)) for of in classes]
    assert [float(row["worst"]) for row in rows] == worst
    assert {float(row["a tensor"]) for row in rows} == {0.5}
    assert max(worst) > 0


def test_a_data_set():
    train_set = snippet("A data set")["train_set"]
    assert train_set.get_cls_num_list() == [200, 63, 20]
    assert train_set.data.shape == (283, 32, 32, 3)
    assert train_set.left_out(9).get_cls_num_list() == [0, 9, 9]


def test_a_hook_gets_the_record_of_each_epoch(monkeypatch):
    logged = []
    fake = types.SimpleNamespace(log=lambda figures, step: logged.append((figures, step)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    test = {"acc1": 50.0, "class_mean": 40.0, "many": 60.0, "medium": 30.0, "few": None}
    record = {"epoch": 3, "test": test, "train": {"loss": 1.5}, "stage": {"lr": 0.1}}
    snippet("After each epoch: Weights & Biases, MLflow")["log_epoch"](record)
    ((figures, step),) = logged
    assert (step, figures["test/acc1"], figures["train/loss"], figures["lr"]) == (3, 50.0, 1.5, 0.1)


def test_a_loss_of_the_features_need_not_be_an_ib_loss(monkeypatch, tmp_path):
    class ByNorm(losses.CrossEntropyLoss):
        needs_features = True

        def _factor(self, logits, target, features):
            return 1 / (1 + features.flatten())

    monkeypatch.setitem(registry.LOSSES, "ByNorm", registry.LossEntry(lambda counts, weight: ByNorm(weight)))
    out = run_ok([*FIVE, *TINY, "--epochs", "1", "--milestones", "--loss_type", "ByNorm"], tmp_path)
    assert "ByNorm loss" in out
    (record,) = json.loads((log_folder(tmp_path, "ByNorm") / "summary.json").read_text())["history"]
    assert record["alpha"] is None
    assert all(0 < factor < 1 for factor in record["ib_factor"])


class WithBuffer(losses.CrossEntropyLoss):
    def __init__(self, name):
        super().__init__()
        self.register_buffer(name, torch.zeros(10))


def two_layers(num_classes=10, use_norm=False, feature_norm="l1"):
    layers = [torch.nn.Flatten(), torch.nn.Linear(3072, 8), torch.nn.ReLU(), torch.nn.Linear(8, num_classes)]
    return models.with_feature_norm(torch.nn.Sequential(*layers), norm=feature_norm)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-a", "small", "--loss_type", "LDAM"],
         "--loss_type LDAM needs a normalised head: this model ignores use_norm"),
        (["-a", "two", "--train_rule", "cRT", "--drw_epoch", "1"], "has the linear layers 1, 3: say which one gives"),
        (["-a", "small", "--loss_type", "Own"],
         "--loss_type Own has parameters, which nothing trains: make them buffers"),
    ],
)  # fmt: skip
def test_what_would_train_wrongly_is_refused_at_the_start(flags, said, registries, tmp_path):
    snippet("An architecture")
    models.CIFAR_MODELS["two"] = two_layers
    own = losses.CrossEntropyLoss()
    own.shift = torch.nn.Parameter(torch.zeros(10))
    registry.LOSSES["Own"] = registry.LossEntry(lambda counts, weight: own, first_phase_ce=True)
    refused([*DIGITS, "--epochs", "2", "--milestones", "--start_ib_epoch", "1", *flags], tmp_path, said)


def test_a_loss_whose_buffers_have_changed_does_not_continue(registries, tmp_path):
    args = [*DIGITS, *TINY, "--loss_type", "Own", "--milestones", "--epochs"]
    registry.LOSSES["Own"] = registry.LossEntry(lambda counts, weight: WithBuffer("seen"))
    run_ok([*args, "1"], tmp_path)
    registry.LOSSES["Own"] = registry.LossEntry(lambda counts, weight: WithBuffer("shift"))
    words = "the saved state of --loss_type Own does not fit it: ", '"shift"'
    fails([*args, "2", "--resume", "auto"], tmp_path, *words, status=1)


@pytest.mark.parametrize("name", ["mean", "std"])
def test_a_data_set_with_another_mean_is_another_one(name, tmp_path, monkeypatch):
    two = [*DIGITS, *TINY, "--epochs", "2", "--milestones", "--threads", "1"]
    run_ok([*two, "--keep_epochs", "1"], tmp_path)
    monkeypatch.setattr(imbalance_cifar.DATASETS["digits"], name, (0.4, 0.5, 0.5))
    kept = model_folder(tmp_path) / "ckpt.epoch001.pth.tar"
    for args in ([*two, "--exp_str", "fork", "--resume", kept], ["-e", "--resume", kept]):
        refused(args, tmp_path, f"was trained on images with another {name} than those in ./data", status=1)


def test_an_error_of_an_own_data_set_is_its_own(monkeypatch, tmp_path):
    def broken(*args, **kwargs):
        raise RuntimeError("stack expects each tensor to be equal size")

    monkeypatch.setitem(imbalance_cifar.DATASETS, "own", broken)
    with pytest.raises(RuntimeError, match="stack expects"):
        imbalance_cifar.load("own", tmp_path)


def test_a_new_flag_sets_a_run_apart_from_one_without_it(tmp_path):
    """The page's line of a setting, in a checkout of its own, which nothing reads yet."""
    checkout = tmp_path / "checkout"
    leave = shutil.ignore_patterns(".*", "results", "docs", "tests", "data", "log", "checkpoint", "reproduced")
    shutil.copytree(REPOSITORY, checkout, ignore=leave)
    line = next(line for line in SECTIONS["A setting"].splitlines() if "_method(" in line)
    path = checkout / "experiment" / "settings.py"
    path.write_text(path.read_text().replace(line, f"{line}\n{line.replace('vs_tau', 'cutmix')}"))
    asks = """
import dataclasses
from experiment.compare import difference
from experiment.settings import recorded
from paper import records, runs
one = records.command_settings(runs.Run("cifar10", "exp", 100, "CE"))
other = dataclasses.replace(one, cutmix=1.0)
print(records.describe(recorded(other))[1])
print(difference(one, other, {"settings": recorded(other)}, 0, ""))
"""
    out = subprocess.run([sys.executable, "-c", asks], cwd=checkout, capture_output=True, text=True, check=True).stdout
    assert out.splitlines() == ["(('cutmix', '1.0'),)", "cutmix is 1.0 there and 1.2 here"]
