"""--epochs beyond the end of a finished run."""

import json

import pytest
from script_runner import FIVE, TINY, assert_same_run, refused, run_ok

LONGER = {"alpha auto": ["--loss_type", "IB", "--alpha", "auto"], "validation part": ["--val_fraction", "0.2"]}


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


PLAN, AUTO = [*FIVE, *TINY], ["--resume", "auto"]
COSINE = [*FIVE[:-2], *TINY, "--schedule", "cosine", "--warmup_epochs", "2"]  # without FIVE's milestones
#: Flags of the run; those of the longer one beside them; why it is refused.
REFUSED = {
    "milestones": (PLAN, ["--milestones", "3", *AUTO], ["in epoch 4, lr is "]),
    "cosine": (COSINE, AUTO, ["in epoch 3, lr is "]),
    "without --resume": (PLAN, [], ["epochs is 5 there and 7 here", "--resume auto"]),
}


@pytest.mark.parametrize(("args", "more", "why"), REFUSED.values(), ids=REFUSED)
def test_a_longer_run_with_another_plan_or_without_resume_is_refused(args, more, why, tmp_path):
    run_ok(args, tmp_path)
    refused([*args, "--epochs", "7", *more], tmp_path, *why)
