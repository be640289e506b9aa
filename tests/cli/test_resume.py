"""Stop and resume: the same weights and logs as the run never stopped."""

import json
import shutil
import signal
import subprocess
import sys
from unittest import mock

import pytest
import torch
from script_runner import (
    DIGITS,
    EPOCHS,
    FIVE,
    SCRIPT,
    TINY,
    assert_same_run,
    assert_same_weights,
    break_off,
    environment,
    load_checkpoint,
    log_folder,
    messages,
    model_folder,
    read_csv,
    read_logs,
    refused,
    run_main,
    run_ok,
    snapshot,
)

import cifar_train
from experiment.records import Records, best_epoch
from experiment.run import Run
from training import distributed


def test_killed_in_mid_epoch_and_resumed_is_the_run_never_stopped(tmp_path):
    """A process, and a published model."""
    args = [*DIGITS, "--arch", "resnet20", "--epochs", "2", "--start_ib_epoch", "1", "--milestones", "1", "-p", "1"]
    args += ["--loss_type", "IB", "--train_rule", "CBReweight", "--checkpoint_seconds", "0"]
    command = [sys.executable, SCRIPT, *args]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert any(line.startswith("epoch 2/2  batch 1/") for line in process.stdout)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    run = {"loss": "IB", "rule": "CBReweight", "arch": "resnet20"}
    model = model_folder(tmp_path, **run)
    assert load_checkpoint(model / "ckpt.pth.tar")["epoch"] == 1

    out = run_ok([*args, "--resume", "auto"], tmp_path)
    assert "resumes from" in out
    assert "epoch 2/2 done" in out
    assert "epoch 1/2" not in out
    run_ok([*args, "--exp_str", "whole"], tmp_path)
    assert_same_run(model, model_folder(tmp_path, **run, exp="whole"), ("ckpt.pth.tar", "ckpt.best.pth.tar"))
    assert not list(tmp_path.rglob(".*.tmp"))


# ---------------------------------------------------------------------------- every place to stop at, in this process


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an IB run that was never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    run_ok([*FIVE, *TINY, "--loss_type", "IB"], folder)
    return folder


@pytest.mark.parametrize("after", [0, 1, 2, 4])
def test_a_run_broken_off_in_any_epoch_is_resumed_to_the_same_end(after, whole, tmp_path):
    args = [*FIVE, *TINY, "--loss_type", "IB"]
    status, _, err = break_off(args, tmp_path, after)
    assert status == 130
    assert ("no epoch was finished" if after == 0 else "the same command continues from") in messages(err)[0]
    out = run_ok(args, tmp_path)
    assert ("resumes from" in out) == (after > 0)
    names = ("ckpt.pth.tar", "ckpt.best.pth.tar", "ckpt.epoch002.pth.tar")
    assert_same_run(model_folder(tmp_path, "IB"), model_folder(whole, "IB"), names)


def test_a_stopped_run_says_how_to_continue_without_starting_again(tmp_path):
    args = [*FIVE, *TINY, "--overwrite"]
    _, _, err = break_off(args, tmp_path, 2)
    assert "the same command with --resume auto in place of --overwrite continues from" in messages(err)[0]
    assert "resumes from" in run_ok([*args[:-1], "--resume", "auto"], tmp_path)


def test_ranks_that_see_other_files_are_stopped(tmp_path):
    with mock.patch.object(distributed, "gather", lambda value: [value, "another"]):
        refused([*FIVE, *TINY], tmp_path, "do not find the same files: --root_model", status=1)


RESUMED = {
    "Resample": ["--loss_type", "CE", "--train_rule", "Resample"],
    "DRW": ["--loss_type", "LDAM", "--train_rule", "DRW"],
    "IBFocal": ["--loss_type", "IBFocal", "--train_rule", "CBReweight"],
    "alpha auto": ["--loss_type", "IB", "--train_rule", "IBReweight", "--alpha", "auto"],
    "alpha auto and DRW": ["--loss_type", "IB", "--train_rule", "DRW", "--alpha", "auto"],
    "validation part": ["--val_fraction", "0.2"],
    "EMA": ["--ema", "0.9", "--loss_type", "IB"],
    "EMA and cRT": ["--ema", "0.9", "--train_rule", "cRT"],
}


@pytest.mark.parametrize("flags", RESUMED.values(), ids=RESUMED.keys())
def test_every_kind_of_run_is_resumed_to_the_same_end(flags, tmp_path):
    """Stopped before the epoch in which IB starts, before the one in which DRW and cRT do, and after that."""
    args = [*FIVE, *TINY, *flags]
    run_ok([*args, "--root_log", "log/whole", "--root_model", "checkpoint/whole"], tmp_path)
    for after in (2, 1, 1):
        assert break_off(args, tmp_path, after)[0] == 130
        args = [*args, "--resume", "auto"]
    run_ok(args, tmp_path)
    (one,) = (tmp_path / "checkpoint").glob("digits_*")
    whole = tmp_path / "checkpoint" / "whole" / one.name
    assert_same_run(one, whole)
    states = [load_checkpoint(folder / "ckpt.pth.tar") for folder in (one, whole)]
    assert states[0]["criterion"].keys() == states[1]["criterion"].keys()
    for name, value in states[0]["criterion"].items():
        assert torch.equal(value, states[1]["criterion"][name]), name
    assert states[0]["history"][-1]["alpha"] == states[1]["history"][-1]["alpha"]
    assert states[0]["history"][-1]["ib_factor"] == states[1]["history"][-1]["ib_factor"]
    assert states[0].get("ema", {}).keys() == states[1].get("ema", {}).keys()
    for name, value in states[0].get("ema", {}).items():
        assert torch.equal(value, states[1]["ema"][name]), name


# ----------------------------------------------------------------------------------------------------- smaller things


def test_a_drawn_seed_is_printed_recorded_and_inherited(tmp_path):
    args = [a for a in FIVE if a not in ("--seed", "0")] + TINY
    out = run_ok(args, tmp_path)
    seed = load_checkpoint(model_folder(tmp_path) / "ckpt.pth.tar")["settings"]["seed"]
    assert f", seed {seed}," in out
    path = model_folder(tmp_path) / "ckpt.epoch002.pth.tar"
    run_ok([*args, "--loss_type", "IB", "--resume", path], tmp_path)
    run_ok([*args, "--loss_type", "IB", "--seed", seed, "--exp_str", "whole"], tmp_path)
    fork, whole = (model_folder(tmp_path, "IB", exp=e) / "ckpt.pth.tar" for e in ("0", "whole"))
    assert load_checkpoint(fork)["settings"]["seed"] == seed
    assert_same_weights(fork, whole)
    assert "finished" in run_ok(args, tmp_path), "the same command, its seed still left out, is the same run"
    run_ok([*args, "--exp_str", "second"], tmp_path)
    assert load_checkpoint(model_folder(tmp_path, exp="second") / "ckpt.pth.tar")["settings"]["seed"] != seed


def test_start_epoch_numbers_the_first_epoch(tmp_path):
    out = run_ok([*FIVE, *TINY, "--loss_type", "IB", "--start-epoch", "3"], tmp_path)
    assert "epoch 3/5" not in out
    rows = read_csv(log_folder(tmp_path, "IB") / "log_train.csv")
    assert [(row["epoch_from_0"], row["criterion"]) for row in rows] == [("3", "IB"), ("4", "IB")]
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-3, 1e-5])


def test_a_run_without_its_first_epochs_is_another_run(tmp_path):
    _, _, err = run_main([*FIVE, *TINY, "--start-epoch", "3"], tmp_path)
    assert "--start-epoch 3 without --resume: the epochs before it are left out" in err
    refused([*FIVE, *TINY], tmp_path, "holds a run with other settings (start_epoch is 3 there and 0 here)")


def test_resume_sets_the_start_epoch(one_epoch, tmp_path):
    out = run_ok([*FIVE, *TINY, "--start-epoch", "3", "--resume", one_epoch], tmp_path)
    assert "epoch 2/5 done" in out
    assert [row["epoch_from_0"] for row in read_csv(log_folder(tmp_path) / "log_train.csv")] == list("01234")


def test_a_checkpoint_with_all_epochs_done_has_nothing_to_go_on_with(ce_run, tmp_path):
    args = [*FIVE, *TINY, "--loss_type", "CE", "--exp_str", "more", "--resume", ce_run / "ckpt.pth.tar"]
    refused(args, tmp_path, "has 5 epochs done")


def test_the_same_command_on_a_trained_run_makes_its_logs_and_trains_nothing(tmp_path):
    run_ok([*FIVE, *TINY], tmp_path)
    before = read_logs(log_folder(tmp_path)), snapshot(model_folder(tmp_path))
    shutil.rmtree(tmp_path / "log")
    with mock.patch.object(cifar_train, "train_one_epoch", side_effect=AssertionError("an epoch is trained")):
        run_ok([*FIVE, *TINY], tmp_path)
    assert (read_logs(log_folder(tmp_path)), snapshot(model_folder(tmp_path))) == before


# ------------------------------------------------------------------------------------------------ checkpoints by time


class Killed(BaseException):
    """Ends a run without a chance to write, as SIGKILL does."""


@pytest.mark.parametrize("seconds", ["0", "1000"])
def test_a_kill_costs_the_epochs_since_the_last_checkpoint_and_no_bit(seconds, whole, tmp_path):
    args = [*FIVE, *TINY, "--loss_type", "IB"]
    write, train, trained = Run.write, cifar_train.train_one_epoch, []

    def killed_in_the_last(*args, **kwargs):
        if len(trained) == 4:
            raise Killed
        trained.append(train(*args, **kwargs))
        return trained[-1]

    def never_after_the_kill(run):
        if len(run.history) == len(trained) and run.epoch < 4:
            write(run)

    killed = mock.patch.object(cifar_train, "train_one_epoch", killed_in_the_last)
    with killed, mock.patch.object(Run, "write", never_after_the_kill), pytest.raises(Killed):
        run_main([*args, "--checkpoint_seconds", seconds], tmp_path)
    folder, log = model_folder(tmp_path, "IB"), log_folder(tmp_path, "IB")
    state, best = (load_checkpoint(folder / f"ckpt{name}.pth.tar") for name in ("", ".best"))
    # the epoch to fork from, start_ib_epoch, is written whatever the time
    assert state["epoch"] == (4 if seconds == "0" else 2)
    assert best["epoch"] == best_epoch(state["history"])["epoch"] + 1
    assert json.loads((log / "summary.json").read_text())["epochs_done"] == state["epoch"]
    assert len(read_csv(log / "log_train.csv")) == 4
    run_ok(args, tmp_path)
    names = [f"ckpt{name}.pth.tar" for name in ("", ".best", ".epoch002", ".epoch002.best")]
    assert_same_run(folder, model_folder(whole, "IB"), names)


def test_a_run_killed_between_its_last_checkpoint_and_its_summary_is_completed(tmp_path):
    args = [*FIVE, *TINY]
    run_ok([*args, "--exp_str", "whole"], tmp_path)
    write_summary = Records.write_summary

    def killed_at_the_end(self, history):
        if len(history) == EPOCHS:
            raise KeyboardInterrupt
        write_summary(self, history)

    with mock.patch.object(Records, "write_summary", killed_at_the_end):
        assert run_main(args, tmp_path)[0] == 130
    out = run_ok(args, tmp_path, figures=True)
    assert "epoch 5/5 done" not in out
    assert read_logs(log_folder(tmp_path)) == read_logs(log_folder(tmp_path, exp="whole"))
    assert (log_folder(tmp_path) / "curves.png").exists()
    assert "nothing to do" in run_ok(args, tmp_path, figures=True)
    break_off([*args, "--epochs", "6", "--resume", "auto"], tmp_path, after=0)
    assert not (log_folder(tmp_path) / "curves.png").exists(), "it would end at epoch 5"


def test_a_run_that_goes_back_with_force_is_the_run_from_there(ce_run, tmp_path):
    kept = load_checkpoint(ce_run / "ckpt.epoch002.best.pth.tar")["epoch"]
    args = [*FIVE, *TINY, "--resume", ce_run / "ckpt.epoch002.pth.tar"]
    refused(args, tmp_path, "is older than", "--force to train the epochs between them again")
    run_ok([*FIVE, *TINY, "--exp_str", "whole"], tmp_path)
    break_off([*args, "--force"], tmp_path, after=0)
    epochs = [load_checkpoint(ce_run / f"ckpt{name}.pth.tar")["epoch"] for name in ("", ".best")]
    assert epochs == [2, kept]
    assert "after 2 epochs" in run_ok([*FIVE, *TINY], tmp_path)
    for name in ("ckpt.pth.tar", "ckpt.best.pth.tar"):
        assert_same_weights(ce_run / name, model_folder(tmp_path, exp="whole") / name)
