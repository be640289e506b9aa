"""Fork: a second phase that starts from another run's checkpoint is the run that was never forked."""

import shutil
from unittest import mock

import pytest
import torch
from script_runner import (
    FIVE,
    TINY,
    assert_same_weights,
    break_off,
    load_checkpoint,
    log_folder,
    messages,
    model_folder,
    read_logs,
    run_main,
    run_ok,
    snapshot,
)

from experiment import resume
from experiment.records import best_epoch


@pytest.mark.parametrize(
    ("loss", "rule", "flags"),
    [
        ("IB", "None", []),
        ("IB", "IBReweight", []),
        ("IB", "CBReweight", []),
        ("IBFocal", "IBReweight", []),
        ("IB", "IBReweight", ["--alpha", "auto"]),
        ("IB", "DRW", []),
        ("CE", "DRW", []),
    ],
)
def test_a_fork_is_the_run_never_forked(loss, rule, flags, ce_run, tmp_path, capsys):
    before = snapshot(ce_run), snapshot(log_folder(tmp_path))
    args = [*FIVE, *TINY, "--loss_type", loss, "--train_rule", rule, *flags]
    run_ok([*args, "--exp_str", "whole"], tmp_path, capsys)
    run_ok([*args, "--exp_str", "fork", "--resume", ce_run / "ckpt.epoch002.pth.tar"], tmp_path, capsys)
    whole, fork = (model_folder(tmp_path, loss, rule, exp=e) for e in ("whole", "fork"))
    for name in ("ckpt.pth.tar", "ckpt.best.pth.tar"):
        assert_same_weights(fork / name, whole / name)
    logs = [read_logs(log_folder(tmp_path, loss, rule, exp=e)) for e in ("fork", "whole")]
    assert logs[0] == logs[1]
    assert before == (snapshot(ce_run), snapshot(log_folder(tmp_path)))


def test_a_fork_whose_best_epoch_is_in_phase_one_has_its_best_checkpoint(ce_run, tmp_path, capsys):
    # with an lr of next to nothing the IB phase changes no prediction, and the first of equals is the best
    args = [*FIVE, *TINY, "--loss_type", "IB", "--ib_lr_factor", "1e-30"]
    run_ok([*args, "--exp_str", "whole"], tmp_path, capsys)
    run_ok([*args, "--exp_str", "fork", "--resume", ce_run / "ckpt.epoch002.pth.tar"], tmp_path, capsys)
    whole, fork = (model_folder(tmp_path, "IB", exp=e) / "ckpt.best.pth.tar" for e in ("whole", "fork"))
    assert_same_weights(fork, whole)


def test_a_fork_can_itself_be_stopped_and_resumed(ce_run, tmp_path, capsys):
    args = [*FIVE, *TINY, "--loss_type", "IB", "--alpha", "auto"]
    run_ok([*args, "--exp_str", "whole"], tmp_path, capsys)
    break_off([*args, "--resume", ce_run / "ckpt.epoch002.pth.tar"], tmp_path, capsys, after=2)
    run_ok([*args, "--resume", "auto"], tmp_path, capsys)
    whole, fork = (model_folder(tmp_path, "IB", exp=e) / "ckpt.pth.tar" for e in ("whole", "0"))
    assert_same_weights(fork, whole)


@pytest.mark.parametrize("again", ["the same command", "auto"])
def test_a_fork_stopped_in_its_first_epoch_is_continued(again, ce_run, tmp_path, capsys):
    # its folder has the logs of the epochs before the fork, and no checkpoint of its own yet
    args = [*FIVE, *TINY, "--loss_type", "IB", "--alpha", "auto"]
    run_ok([*args, "--exp_str", "whole"], tmp_path, capsys)
    forked = [*args, "--resume", ce_run / "ckpt.epoch002.pth.tar"]
    status, _, err = break_off(forked, tmp_path, capsys, after=0)
    kept = f"checkpoint/{model_folder(tmp_path, 'IB').name}/ckpt.epoch002.pth.tar"
    assert (status, messages(err)[-1]) == (
        130, f"cifar_train.py: stopped by Ctrl-C: add --resume auto to continue from {kept}"
    )  # fmt: skip
    assert not (model_folder(tmp_path, "IB") / "ckpt.pth.tar").exists()
    status, _, err = run_main(args, tmp_path, capsys)
    assert status == 2
    assert "holds this run after 2 epochs: --resume auto continues it" in messages(err)[-1]
    out = run_ok(forked if again != "auto" else [*args, "--resume", "auto"], tmp_path, capsys)
    assert "after 2 epochs" in out
    whole, fork = (model_folder(tmp_path, "IB", exp=e) for e in ("whole", "0"))
    for name in ("ckpt.pth.tar", "ckpt.best.pth.tar"):
        assert_same_weights(fork / name, whole / name)
    logs = [read_logs(log_folder(tmp_path, "IB", exp=e)) for e in ("0", "whole")]
    assert logs[0] == logs[1]


def test_logs_that_go_beyond_the_fork_are_not_written_over(ce_run, tmp_path, capsys):
    args = [*FIVE, *TINY, "--loss_type", "IB", "--resume", ce_run / "ckpt.epoch002.pth.tar"]
    run_ok(args, tmp_path, capsys)
    shutil.rmtree(model_folder(tmp_path, "IB"))
    before = snapshot(tmp_path)
    status, _, err = run_main(args, tmp_path, capsys)
    assert status == 2
    assert "holds the logs of this run after 5 epochs, but" in messages(err)[-1]
    assert snapshot(tmp_path) == before


def test_resample_run_forks_into_ib_with_resample_only(tmp_path, capsys):
    args = [*FIVE, *TINY]
    resample = [*args, "--train_rule", "Resample"]
    run_ok(resample, tmp_path, capsys)
    path = model_folder(tmp_path, "CE", "Resample") / "ckpt.epoch002.pth.tar"
    run_ok([*resample, "--loss_type", "IB", "--exp_str", "whole"], tmp_path, capsys)
    run_ok([*resample, "--loss_type", "IB", "--resume", path], tmp_path, capsys)
    whole, fork = (model_folder(tmp_path, "IB", "Resample", exp=e) / "ckpt.pth.tar" for e in ("whole", "0"))
    assert_same_weights(fork, whole)
    status, _, err = run_main([*args, "--loss_type", "IB", "--resume", path], tmp_path, capsys)
    assert status == 2
    assert "sampler is 'Resample' there and 'none' here" in err


def test_every_run_keeps_its_fork_points(ce_run):
    kept = {p.name for p in ce_run.iterdir() if "best" not in p.name}
    assert kept == {f"ckpt{e}.pth.tar" for e in ("", ".previous", ".epoch001", ".epoch002", ".epoch003")}
    assert [load_checkpoint(ce_run / f"ckpt.epoch00{n}.pth.tar")["epoch"] for n in (1, 2, 3)] == [1, 2, 3]


def test_an_ib_run_cannot_be_forked_into_ce_after_its_switch_but_before(tmp_path, capsys):
    args = [*FIVE, *TINY, "--loss_type", "IB"]
    run_ok([*args, "--keep_epochs", "3"], tmp_path, capsys)
    source = model_folder(tmp_path, "IB")
    ce = [*FIVE, *TINY]
    before = snapshot(tmp_path)
    status, _, err = run_main([*ce, "--resume", source / "ckpt.epoch003.pth.tar"], tmp_path, capsys)
    assert status == 2
    assert "in epoch 3, lr is 0.001 there and 0.06" in err
    assert snapshot(tmp_path) == before
    run_ok([*ce, "--resume", source / "ckpt.epoch002.pth.tar"], tmp_path, capsys)
    run_ok([*ce, "--exp_str", "whole"], tmp_path, capsys)
    assert_same_weights(model_folder(tmp_path) / "ckpt.pth.tar", model_folder(tmp_path, exp="whole") / "ckpt.pth.tar")


def test_a_constant_of_the_ib_loss_may_change_before_ib_starts_and_not_after(tmp_path, capsys):
    args = [*FIVE, *TINY, "--loss_type", "IB"]
    run_ok([*args, "--keep_epochs", "3"], tmp_path, capsys)
    source = model_folder(tmp_path, "IB")
    other = [*args, "--alpha", "10", "--exp_str", "alpha10"]
    status, _, err = run_main([*other, "--resume", source / "ckpt.epoch003.pth.tar"], tmp_path, capsys)
    assert status == 2
    assert "in epoch 3, alpha is 1000.0 there and 10.0 here" in err
    run_ok([*other, "--resume", source / "ckpt.epoch002.pth.tar"], tmp_path, capsys)
    run_ok([*args, "--alpha", "10", "--exp_str", "whole"], tmp_path, capsys)
    fork, whole = (model_folder(tmp_path, "IB", exp=e) / "ckpt.pth.tar" for e in ("alpha10", "whole"))
    assert_same_weights(fork, whole)


@pytest.mark.parametrize("name", ["ckpt.pth.tar", "ckpt.epoch001.pth.tar"])
def test_a_fork_takes_the_best_checkpoint_along(name, tmp_path, capsys):
    """Of a finished run, and of a fork of a fork."""
    run_ok([*FIVE, *TINY, "--epochs", "3", "--milestones", "2", "--keep_epochs", "1"], tmp_path, capsys)
    for exp, before in (("one", "0"), ("two", "one")):
        path = model_folder(tmp_path, exp=before) / (
            name if before == "0" or "001" in name else "ckpt.epoch003.pth.tar"
        )
        more = ["--epochs", "4", "--milestones", "2", "--exp_str", exp, "--resume", path]
        with mock.patch("experiment.run.Run._write"):  # nothing better comes
            run_main([*FIVE, *TINY, *more], tmp_path, capsys)
        epoch = load_checkpoint(path)["epoch"]
        best = model_folder(tmp_path, exp=exp) / "ckpt.best.pth.tar"
        assert best.exists()
        assert load_checkpoint(best)["epoch"] <= epoch
        assert (model_folder(tmp_path, exp=exp) / f"ckpt.epoch{epoch:03}.best.pth.tar").exists()


def test_a_fork_from_the_best_checkpoint_has_it_as_its_best(ce_run, tmp_path, capsys):
    shutil.copy(ce_run / "ckpt.epoch002.best.pth.tar", ce_run / "ckpt.best.pth.tar")
    args = [*FIVE, *TINY, "--loss_type", "IB", "--resume", ce_run / "ckpt.best.pth.tar"]
    break_off(args, tmp_path, capsys, after=0)
    assert_same_weights(model_folder(tmp_path, "IB") / "ckpt.best.pth.tar", ce_run / "ckpt.best.pth.tar")


def test_a_fork_whose_source_is_written_over_meanwhile_says_so(ce_run):
    start = resume.ResumeState(epoch=2, path=str(ce_run / "ckpt.epoch003.pth.tar"), is_fork=True)
    with pytest.raises(resume.DataError, match="was written over while this run started"):
        resume.read_inherited(start)


def third_epoch_is_worse(ce_run):
    """The source's checkpoint after three epochs, with the second as its best epoch."""
    path = ce_run / "ckpt.epoch003.pth.tar"
    state = load_checkpoint(path)
    state["history"][2]["score"] = 0.0
    assert best_epoch(state["history"])["epoch"] == 1
    torch.save(state, path)
    shutil.copy(ce_run / "ckpt.epoch002.pth.tar", ce_run / "ckpt.epoch003.best.pth.tar")
    return path


FORK = [*FIVE, *TINY, "--loss_type", "IB", "--start_ib_epoch", "3", "--resume"]


def test_a_fork_that_cannot_start_deletes_nothing(ce_run, tmp_path, capsys):
    path = third_epoch_is_worse(ce_run)
    run_ok([*FORK, path], tmp_path, capsys)
    best = ce_run / "ckpt.epoch003.best.pth.tar"
    content = bytearray(best.read_bytes())
    content[len(content) // 2] ^= 1
    best.write_bytes(content)
    before = snapshot(tmp_path)
    status, _, err = run_main([*FORK, path, "--overwrite"], tmp_path, capsys)
    assert status == 1
    assert f"{best} is damaged" in messages(err)[-1]
    assert snapshot(tmp_path) == before


def test_a_fork_finds_the_best_checkpoint_by_what_is_in_it(ce_run, tmp_path, capsys):
    """Beside a copy; and not where the file of that name is another epoch's."""
    copied, best = ce_run / "copied.pth.tar", model_folder(tmp_path, "IB") / "ckpt.best.pth.tar"
    shutil.move(third_epoch_is_worse(ce_run), copied)
    shutil.move(ce_run / "ckpt.epoch003.best.pth.tar", ce_run / "ckpt.best.pth.tar")
    break_off([*FORK, copied], tmp_path, capsys, after=0)
    assert_same_weights(best, ce_run / "ckpt.best.pth.tar")
    shutil.copy(ce_run / "ckpt.pth.tar", ce_run / "ckpt.best.pth.tar")
    break_off([*FORK, copied, "--overwrite"], tmp_path, capsys, after=0)
    assert not best.exists()


def test_the_same_command_on_a_finished_fork_needs_no_source(ce_run, tmp_path, capsys):
    args = [*FIVE, *TINY, "--loss_type", "IB", "--resume", ce_run / "ckpt.epoch002.pth.tar"]
    run_ok(args, tmp_path, capsys, figures=True)
    shutil.rmtree(ce_run)
    before = snapshot(tmp_path)
    assert "finished: nothing to do" in run_ok(args, tmp_path, capsys, figures=True)
    status, _, err = run_main([*args, "--lr", "0.2"], tmp_path, capsys)
    assert status == 2
    assert "holds a run with other settings" in messages(err)[-1]
    assert snapshot(tmp_path) == before
