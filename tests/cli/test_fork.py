"""Fork: a second phase that starts from another run's checkpoint is the run that was never forked."""

import functools
import json
import shutil
from unittest import mock

import pytest
import torch
from script_runner import (
    FIVE,
    TINY,
    assert_same_run,
    assert_same_weights,
    break_off,
    load_checkpoint,
    log_folder,
    messages,
    model_folder,
    read_csv,
    refused,
    run_ok,
    scalars,
    snapshot,
)

from experiment.records import best_epoch
from training import metrics

#: loss, rule, flags of the second phase, and those that the first one shares.
FORKS = {
    "IB": ("IB", "IBReweight", [], []),
    "alpha auto": ("IB", "IBReweight", ["--alpha", "auto"], []),
    "IB and DRW": ("IB", "DRW", [], []),
    "DRW": ("CE", "DRW", [], []),
    "AdamW": ("IB", "None", [], ["--optimizer", "adamw", "--lr", "0.001"]),
    "EMA": ("IB", "None", [], ["--ema", "0.9"]),
    "mixup": ("CE", "DRW", [], ["--mixup", "0.4"]),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A function that gives the model folder of a finished run with further flags; each is made once."""

    @functools.cache
    def made(*flags):
        cwd = tmp_path_factory.mktemp("source")
        run_ok([*FIVE, *TINY, *flags], cwd)
        return next((cwd / "checkpoint").iterdir())

    return made


@pytest.mark.parametrize(("loss", "rule", "flags", "shared"), FORKS.values(), ids=FORKS)
def test_a_fork_is_the_run_never_forked(loss, rule, flags, shared, source, tmp_path):
    ce_run = source(*shared)
    before = snapshot(ce_run)
    args = [*FIVE, *TINY, "--loss_type", loss, "--train_rule", rule, *flags, *shared]
    run_ok([*args, "--exp_str", "whole"], tmp_path)
    run_ok([*args, "--exp_str", "fork", "--resume", ce_run / "ckpt.epoch002.pth.tar"], tmp_path)
    whole, fork = (model_folder(tmp_path, loss, rule, exp=e) for e in ("whole", "fork"))
    assert_same_run(fork, whole, ("ckpt.pth.tar", "ckpt.best.pth.tar"))
    assert before == snapshot(ce_run), "the fork wrote into the folder it came from"


def test_a_fork_whose_best_epoch_is_in_phase_one_has_its_best_checkpoint(source, tmp_path):
    # with an lr of next to nothing the IB phase changes no prediction, and the first of equals is the best
    args = [*FIVE, *TINY, "--loss_type", "IB", "--ib_lr_factor", "1e-30"]
    run_ok([*args, "--exp_str", "whole"], tmp_path)
    run_ok([*args, "--exp_str", "fork", "--resume", source() / "ckpt.epoch002.pth.tar"], tmp_path)
    whole, fork = (model_folder(tmp_path, "IB", exp=e) / "ckpt.best.pth.tar" for e in ("whole", "fork"))
    assert load_checkpoint(whole)["epoch"] <= 2
    assert_same_weights(fork, whole)


def test_a_fork_stopped_in_its_first_epoch_and_the_next_is_continued(source, tmp_path):
    """By the same command, without --resume, and with --resume auto."""
    args = [*FIVE, *TINY, "--loss_type", "IB", "--alpha", "auto"]
    run_ok([*args, "--exp_str", "whole"], tmp_path)
    forked = [*args, "--resume", source() / "ckpt.epoch002.pth.tar"]
    status, _, err = break_off(forked, tmp_path, after=0)
    own = f"checkpoint/{model_folder(tmp_path, 'IB').name}/ckpt.pth.tar"
    assert (status, messages(err)[-1]) == (
        130, f"cifar_train.py: stopped by Ctrl-C: the same command continues from {own}"
    )  # fmt: skip
    assert "after 2 epochs" in break_off(forked, tmp_path, after=0)[1]
    assert "after 2 epochs" in break_off(args, tmp_path, after=1)[1]
    assert "after 3 epochs" in run_ok([*args, "--resume", "auto"], tmp_path)
    whole, fork = (model_folder(tmp_path, "IB", exp=e) for e in ("whole", "0"))
    assert_same_run(fork, whole, ("ckpt.pth.tar", "ckpt.best.pth.tar"))


IB, RESAMPLE = ["--loss_type", "IB"], ["--train_rule", "Resample"]
#: Flags of a run; of one that is forked after two of its epochs; of one that is refused; after how many, and why.
CHANGES = {
    "sampler": (RESAMPLE, [*IB, *RESAMPLE], IB, 2, "sampler is 'Resample' there and 'none' here"),
    "loss": ([*IB, "--keep_epochs", "3"], [], [], 3, "in epoch 3, lr is 0.001 there and 0.06"),
    "constant of the loss": (
        [*IB, "--keep_epochs", "3"], [*IB, "--alpha", "10"], [*IB, "--alpha", "10"], 3,
        "in epoch 3, alpha is 1000.0 there and 10.0 here",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "forked", "wrong", "after", "why"), CHANGES.values(), ids=CHANGES)
def test_a_fork_may_change_only_what_comes_after_it(flags, forked, wrong, after, why, source, tmp_path):
    args = [*FIVE, *TINY]
    path = source(*flags) / f"ckpt.epoch00{after}.pth.tar"
    refused([*args, *wrong, "--resume", path], tmp_path, why)
    run_ok([*args, *forked, "--resume", path.with_name("ckpt.epoch002.pth.tar")], tmp_path)
    run_ok([*args, *forked, "--exp_str", "whole"], tmp_path)
    assert_same_run(*(tmp_path / "checkpoint").iterdir())


def test_the_same_command_on_a_finished_fork_needs_no_source(ce_run, tmp_path):
    args = [*FIVE, *TINY, "--loss_type", "IB", "--resume", ce_run / "ckpt.epoch002.pth.tar"]
    run_ok(args, tmp_path, figures=True)
    shutil.rmtree(ce_run)
    before = snapshot(tmp_path)
    assert "finished: nothing to do" in run_ok(args, tmp_path, figures=True)
    assert snapshot(tmp_path) == before
    refused([*args, "--lr", "0.2"], tmp_path, "holds a run with other settings")


def test_a_fork_takes_the_best_checkpoint_along(ce_run, tmp_path):
    """Known by what is in it; where it is gone, no other one stands in for it."""
    path = ce_run / "ckpt.epoch003.pth.tar"
    state = load_checkpoint(path)
    state["history"][2]["score"] = 0.0
    assert best_epoch(state["history"])["epoch"] == 1, "the second epoch is the best of three"
    torch.save(state, path)
    shutil.copy(ce_run / "ckpt.epoch002.pth.tar", ce_run / "ckpt.epoch003.best.pth.tar")
    fork = [*FIVE, *TINY, "--loss_type", "IB", "--start_ib_epoch", "3", "--resume", path]
    break_off(fork, tmp_path, after=0)
    best = model_folder(tmp_path, "IB") / "ckpt.best.pth.tar"
    assert_same_weights(best, ce_run / "ckpt.epoch002.pth.tar")
    assert (best.with_name("ckpt.epoch003.best.pth.tar")).exists()
    shutil.copy(ce_run / "ckpt.pth.tar", ce_run / "ckpt.epoch003.best.pth.tar")
    shutil.copy(ce_run / "ckpt.pth.tar", ce_run / "ckpt.best.pth.tar")
    _, _, err = break_off([*fork, "--overwrite"], tmp_path, after=0)
    assert not best.exists()
    assert "ckpt.best.pth.tar of epoch 2 is not beside" in err


def test_a_new_figure_does_not_break_a_fork_from_an_older_checkpoint(source, tmp_path):
    """A metric that is added in one place reaches CSV, TensorBoard, summary.json and the screen."""
    fork = [*FIVE, *TINY, "--loss_type", "IB", "--resume", source() / "ckpt.epoch002.pth.tar"]
    worst = {"worst": lambda per_class, confusion, class_counts: min(per_class)}
    with mock.patch.dict(metrics.CLASS_FIGURES, worst):
        out = run_ok(fork, tmp_path)
    log = log_folder(tmp_path, "IB")
    rows = read_csv(log / "log_test.csv")
    assert [row["worst"] == "n/a" for row in rows] == [True, True, False, False, False]
    last = json.loads((log / "summary.json").read_text())["last"]
    assert last["worst"] == min(last["per_class"]) == float(rows[-1]["worst"])
    assert [step for step, _ in scalars(log)["test/worst"]] == [2, 3, 4]
    assert f"worst {last['worst']:.2f}" in out


def test_a_fork_may_add_left_out_images_and_chooses_among_its_own_epochs(source, tmp_path):
    """They change nothing of the training; epochs that were not scored on them do not compete."""
    args = [*FIVE, *TINY, "--loss_type", "IB", "--resume", source() / "ckpt.epoch002.pth.tar"]
    run_ok([*args, "--exp_str", "plain"], tmp_path)
    run_ok([*args, "--exp_str", "scored", "--val_left_out", "5"], tmp_path)
    plain, scored = (model_folder(tmp_path, "IB", exp=e) for e in ("plain", "scored"))
    assert_same_weights(plain / "ckpt.pth.tar", scored / "ckpt.pth.tar")
    history = load_checkpoint(scored / "ckpt.pth.tar")["history"]
    assert [bool(record["val"]) for record in history] == [False, False, True, True, True]
    best = load_checkpoint(scored / "ckpt.best.pth.tar")["epoch"] - 1
    scores = {record["epoch"]: record["val"]["class_mean"] for record in history if record["val"]}
    assert best == max(scores, key=lambda epoch: scores[epoch])
