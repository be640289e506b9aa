"""--epochs beyond the end of a finished run."""

import json

import pytest
from script_runner import (
    FIVE,
    TINY,
    assert_same_run,
    messages,
    run_main,
    run_ok,
    snapshot,
)

LONGER = {
    "alpha auto": ["--loss_type", "IB", "--alpha", "auto"],
    "validation part": ["--val_fraction", "0.2"],
}


@pytest.mark.parametrize("flags", LONGER.values(), ids=LONGER.keys())
def test_a_finished_run_is_made_longer_in_its_own_folder(flags, tmp_path):
    args, roots = [*FIVE, *TINY, *flags], ["--root_log", "log/whole", "--root_model", "checkpoint/whole"]
    run_ok([*args, "--epochs", "7", *roots], tmp_path)
    run_ok(args, tmp_path)
    out = run_ok([*args, "--epochs", "7", "--resume", "auto"], tmp_path)
    assert "after 5 epochs" in out
    assert "epoch 6/7 done" in out
    (one,) = (tmp_path / "checkpoint").glob("digits_*")
    whole = tmp_path / "checkpoint" / "whole" / one.name
    assert_same_run(one, whole, ("ckpt.pth.tar", "ckpt.best.pth.tar"))
    assert json.loads((tmp_path / "log" / one.name / "args.json").read_text())["epochs"] == 7
    assert "finished: nothing to do" in run_ok([*args, "--epochs", "7"], tmp_path)


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--milestones", "3"], "in epoch 4, lr is "),
        (["--batch-size", "32"], "batch_size is 64 there and 32 here"),
    ],
)
def test_a_longer_run_with_another_plan_is_refused_with_the_first_epoch_that_differs(flags, difference, tmp_path):
    run_ok([*FIVE, *TINY], tmp_path)
    before = snapshot(tmp_path)
    status, _, err = run_main([*FIVE, *TINY, *flags, "--epochs", "7", "--resume", "auto"], tmp_path)
    assert status == 2
    (line,) = messages(err)
    assert difference in line
    assert snapshot(tmp_path) == before


def test_a_cosine_over_more_epochs_is_another_plan(tmp_path):
    cosine = [*FIVE[:-2], *TINY, "--schedule", "cosine", "--warmup_epochs", "2"]
    run_ok(cosine, tmp_path)
    status, _, err = run_main([*cosine, "--epochs", "7", "--resume", "auto"], tmp_path)
    assert status == 2
    assert "in epoch 3, lr is " in messages(err)[0]


def test_a_longer_run_without_resume_auto_is_refused_with_the_way_to_continue(tmp_path):
    run_ok([*FIVE, *TINY], tmp_path)
    before = snapshot(tmp_path)
    status, _, err = run_main([*FIVE, *TINY, "--epochs", "7"], tmp_path)
    assert status == 2
    assert "epochs is 5 there and 7 here" in messages(err)[0]
    assert "--resume auto" in messages(err)[0]
    assert snapshot(tmp_path) == before
