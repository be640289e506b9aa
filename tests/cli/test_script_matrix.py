"""Every loss and every train rule, two epochs on long-tailed digits, through the script."""

import csv
import functools
import io
import json
import math
import re
from unittest import mock

import pytest
import torch
from script_runner import (
    REPOSITORY,
    SCRIPT,
    TINY,
    TWO_EPOCHS,
    load_checkpoint,
    log_folder,
    model_folder,
    read_csv,
    run_ok,
    tiny,
)

import imbalance_cifar
from experiment.parser import SCRIPTS, parse
from loaders.in_memory import InMemoryBatches
from training.gradients import match_gradient
from training.precision import on_device
from training.recipe import Recipe
from training.registry import LOSSES, RULES

COUNTS = [124, 76, 46, 27, 16, 9, 5, 3, 2, 1]


def expected_stages(loss, rule):
    """(loss, class weights, sampler) of the two epochs: the IB losses and the deferred rules start in the second."""
    is_ib = loss in ("IB", "IBFocal")
    late = {"CBReweight": "CB", "IBReweight": "IB", "DRW": "CB", "DRW-IB": "IB"}.get(rule, "none")
    early = "none" if is_ib or rule.startswith("DRW") else late
    samplers = {"Resample": ["Resample"] * 2, "DRS": ["none", "Resample"], "cRT": ["none", "Balanced"]}
    samplers = samplers.get(rule, ["none"] * 2)
    return [("CE" if is_ib else loss, early, samplers[0]), (loss, late, samplers[1])]


def check_run(cwd, loss, rule, out):
    """Everything that a finished two-epoch run must have left."""
    folder = log_folder(cwd, loss, rule)
    train, test = read_csv(folder / "log_train.csv"), read_csv(folder / "log_test.csv")
    classes = read_csv(folder / "class_accuracy.csv")
    assert [row["epoch_from_0"] for row in train] == [row["epoch_from_0"] for row in test] == ["0", "1"]
    assert [(r["criterion"], r["class_weights"], r["sampler"]) for r in train] == expected_stages(loss, rule)
    lr = 0.1 if loss in ("IB", "IBFocal") else 0.04
    # the second epoch: a milestone for all (0.01), and 0.01 for the IB phase, which skips the warm-up
    factor = 1e-4 if loss in ("IB", "IBFocal") else 1e-2
    if rule == "cRT":  # neither milestones nor warm-up
        lr, factor = 0.1, factor * 100
    assert [float(r["lr"]) for r in train] == pytest.approx([0.02, lr * factor], rel=1e-12)
    assert all(math.isfinite(float(row["loss"])) for row in train + test)
    assert all(0 <= float(row[name]) <= 100 for row in test for name in ("acc1", "acc5", "class_mean", "many", "few"))

    for row, per_class in zip(test, classes, strict=True):
        accuracies = [float(per_class[str(k)]) for k in range(10)]
        assert float(row["class_mean"]) == pytest.approx(sum(accuracies) / 10)
        assert float(row["many"]) == accuracies[0]
        assert float(row["medium"]) == pytest.approx(sum(accuracies[1:4]) / 3)
        assert float(row["few"]) == pytest.approx(sum(accuracies[4:]) / 6)
    assert [float(r["best_acc1"]) for r in test] == [
        float(test[0]["acc1"]),
        max(float(test[0]["acc1"]), float(test[1]["acc1"])),
    ]

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["class_counts"] == COUNTS
    parameters, sha256 = 766 - 10 * (loss == "LDAM"), summary["split"]["sha256"]
    assert f"\nparameters: {parameters}; sha256 of the chosen indices: {sha256}\n" in out
    assert summary["epochs_done"] == len(summary["history"]) == 2
    assert [record["test"]["acc1"] for record in summary["history"]] == [float(row["acc1"]) for row in test]
    assert summary["last"]["acc1"] == float(test[1]["acc1"])
    assert summary["best"]["acc1"] == float(test[1]["best_acc1"])
    assert summary["best"]["acc5"] == float(test[summary["best"]["epoch"]]["acc5"])
    assert [r["stage"]["trains"] for r in summary["history"]] == ["all", "head" if rule == "cRT" else "all"]
    in_phase = [record["ib_factor"] is not None for record in summary["history"]]
    assert in_phase == [False, loss in ("IB", "IBFocal")]
    settings = json.loads((folder / "args.json").read_text())
    assert settings == summary["settings"]
    assert (settings["loss_type"], settings["train_rule"], settings["seed"]) == (loss, rule, 0)

    state = load_checkpoint(model_folder(cwd, loss, rule) / "ckpt.pth.tar")
    assert {"epoch", "arch", "state_dict", "best_acc1", "optimizer"} <= state.keys()
    assert (state["epoch"], state["arch"]) == (2, "tiny")
    assert state["best_acc1"] == float(test[1]["best_acc1"])
    assert ("linear.bias" in state["state_dict"]) == (loss != "LDAM")
    assert f"best (epoch {summary['best']['epoch'] + 1}): top-1 {summary['best']['acc1']:.2f}" in out
    assert f"last (epoch 2): top-1 {summary['last']['acc1']:.2f}  top-5 {summary['last']['acc5']:.2f}" in out


@pytest.mark.parametrize(
    ("loss", "rule"),
    [*((loss, "CBReweight") for loss in LOSSES), *(("IB", rule) for rule in RULES if rule != "CBReweight")],
)
def test_every_loss_and_every_rule(loss, rule, tmp_path):
    args = [*TWO_EPOCHS, *TINY, "--loss_type", loss, "--train_rule", rule]
    planned = list(csv.DictReader(io.StringIO(run_ok([*args, "--dry_run"], tmp_path))))
    assert not list(tmp_path.iterdir())
    check_run(tmp_path, loss, rule, run_ok(args, tmp_path))
    for plan, row in zip(planned, read_csv(log_folder(tmp_path, loss, rule) / "log_train.csv"), strict=True):
        assert (plan["lr"], plan["loss"]) == (row["lr"], row["criterion"])
        assert (plan["class_weights"], plan["sampler"]) == (row["class_weights"], row["sampler"])


@pytest.fixture(scope="module")
def plain_weights(tmp_path_factory):
    """A function that gives the first layer of a run with the defaults of a loss and a rule; each is made once."""
    return functools.cache(lambda loss, rule: weights_after(loss, rule, [], tmp_path_factory.mktemp("plain")))


def weights_after(loss, rule, flags, cwd):
    given = TWO_EPOCHS[:-2] if "cosine" in flags else TWO_EPOCHS  # a cosine has no milestones
    run_ok([*given, *TINY, "--loss_type", loss, "--train_rule", rule, *flags], cwd)
    return load_checkpoint(model_folder(cwd, loss, rule) / "ckpt.pth.tar")["state_dict"]["conv1.weight"]


@pytest.mark.parametrize(
    ("loss", "rule", "flags"),
    [
        ("IBFocal", "None", ["--alpha", "auto"]),
        ("IBFocal", "None", ["--epsilon", "1"]),
        ("IBFocal", "None", ["--gamma", "3"]),
        ("IBFocal", "None", ["--detach_ib"]),
        ("IBFocal", "None", ["--ib_norm", "l2"]),
        ("IBFocal", "None", ["--ib_lr_factor", "1"]),
        ("IBFocal", "None", ["--lr_factors", "1"]),
        ("IBFocal", "None", ["--wd", "0.05"]),
        ("IBFocal", "None", ["--schedule", "cosine"]),
        ("IBFocal", "None", ["--keep_warmup"]),
        ("IBFocal", "None", ["--rand_number", "1"]),
        ("IBFocal", "None", ["--flip", "on"]),
        ("Focal", "None", ["--focal_scale", "1"]),
        ("Focal", "None", ["--gamma", "3"]),
        ("LDAM", "None", ["--max_m", "0.1"]),
        ("LDAM", "None", ["--s", "10"]),
        ("CE", "CBReweight", ["--beta", "0.9"]),
        ("CE", "Resample", ["--beta", "0.5"]),
        ("CE", "DRW", ["--drw_epoch", "0"]),
        ("CE", "None", ["--momentum", "0.5"]),
        ("CE", "None", ["--amp", "bf16"]),
        ("LA", "None", ["--la_tau", "2"]),
        ("VS", "None", ["--vs_gamma", "0.3"]),
        ("VS", "None", ["--vs_tau", "0.5"]),
    ],
)
def test_every_flag_of_the_method_reaches_the_training(loss, rule, flags, plain_weights, tmp_path):
    assert not weights_after(loss, rule, flags, tmp_path).equal(plain_weights(loss, rule))


def test_the_target_of_alpha_auto_reaches_the_training(tmp_path):
    auto = ["--alpha", "auto", "--overwrite", "--auto_target"]
    ce, ib = (weights_after("IB", "None", [*auto, target], tmp_path) for target in ("ce", "ib"))
    assert not ce.equal(ib)


def test_compile_trains_the_whole_batches_with_what_torch_compiled(tmp_path):
    seen = []

    def compiled(model, **_):
        return lambda images: seen.append(len(images)) or model(images)

    with mock.patch("torch.compile", compiled):
        run_ok([*TWO_EPOCHS, *TINY, "--compile"], tmp_path)
    assert seen == [64] * 4 * 2


def test_alpha_auto_is_matched_before_its_first_epoch_and_the_gradients_are_in_the_history(tmp_path):
    """Measured again from the checkpoint of that moment, to the bit."""
    args = [*TWO_EPOCHS, "--loss_type", "IB", "--alpha", "auto"]
    run_ok([*args, *TINY], tmp_path)
    before, after = (load_checkpoint(model_folder(tmp_path, "IB") / f"ckpt{e}.pth.tar") for e in (".epoch001", ""))
    model = on_device(tiny(), torch.device("cpu"))
    model.load_state_dict(before["state_dict"])
    recipe = Recipe(parse("cifar_train.py", args))
    criterion = recipe.criterion(recipe.stage(1), COUNTS)
    batches = InMemoryBatches(imbalance_cifar.IMBALANCEDIGITS(), 64, seed=0)
    expected = match_gradient(model, batches.train_epoch(1), criterion)
    assert [record["gradient"] for record in after["history"]] == [None, expected]
    assert expected["ratio"] == pytest.approx(1, rel=1e-6)
    assert after["history"][1]["alpha"] == float(criterion.current_alpha)


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name != SCRIPT.name])
def test_every_script_trains_as_cifar_train_does(script):
    """Exactly, but for the images that it reads: what is shown here of cifar_train.py holds for the others."""
    texts = [(REPOSITORY / name).read_text() for name in (script, SCRIPT.name)]
    one, two = (re.sub("train_batches = .*", "", text[text.index("model = on_device(") :]) for text in texts)
    assert "for epoch in run.epochs():" in one
    assert one == two


def test_the_same_seed_gives_the_same_run_and_incidental_flags_change_nothing(tmp_path):
    args = [*TWO_EPOCHS, *TINY, "--loss_type", "IB"]
    run_ok([*args, "--exp_str", "a"], tmp_path)
    run_ok([*args, "--exp_str", "b", "-p", "1", "-j", "0", "--keep_epochs", "1"], tmp_path)
    one, two = (load_checkpoint(model_folder(tmp_path, "IB", exp=e) / "ckpt.pth.tar")["state_dict"] for e in ("a", "b"))
    assert all(one[name].equal(two[name]) for name in one)
