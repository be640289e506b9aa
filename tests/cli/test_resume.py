"""Stop, resume, fork: the same weights and logs as the run never stopped, and a refusal where that cannot be."""

import itertools
import json
import os
import shutil
import signal
from unittest import mock

import pytest
import test_distributed
import torch
from script_runner import (
    DIGITS,
    REAL,
    TINY,
    assert_same_weights,
    break_off,
    load_checkpoint,
    log_folder,
    messages,
    model_folder,
    read_csv,
    read_logs,
    run_main,
    run_ok,
    run_process,
    run_process_until,
    snapshot,
)

from experiment import fit, plots, resume
from experiment.plots import FIGURES
from experiment.records import Records
from training.precision import Precision
from utils import epoch_seed

EPOCHS, START = 5, 2
#: Five epochs, the last three with the IB loss where one is asked for.
FIVE = [*DIGITS, "--epochs", EPOCHS, "--start_ib_epoch", START, "--drw_epoch", "3", "--milestones", "4"]


def leftovers(folder):
    """Files that a run writes for a moment only."""
    parts = (".tar.", ".csv.", ".json.")
    return [p.name for p in folder.rglob("*") if p.is_file() and any(part in p.name for part in parts)]


# -------------------------------------------------------------------------------- killed, as processes


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory):
    """An IB run of a published model as a process, never stopped: its folder, and its flags."""
    cwd = tmp_path_factory.mktemp("never_stopped")
    args = [*DIGITS, *REAL, "--epochs", "2", "--start_ib_epoch", "1", "--milestones", "1", "-p", "1"]
    args += ["--loss_type", "IB", "--train_rule", "CBReweight"]
    done = run_process(args, cwd)
    assert done.returncode == 0, done.stderr
    return cwd, args


def where(cwd, loss="IB", rule="CBReweight", **kwargs):
    kwargs = {"arch": "resnet20", **kwargs}
    return log_folder(cwd, loss, rule, **kwargs), model_folder(cwd, loss, rule, **kwargs)


def test_killed_in_mid_epoch_and_resumed_is_the_run_never_stopped(never_stopped, tmp_path):
    whole, args = never_stopped
    status, lines, _ = run_process_until(args, tmp_path, "epoch 2/2  batch 4/", signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert "epoch 2/2 done" not in "".join(lines)
    log, model = where(tmp_path)
    assert load_checkpoint(model / "ckpt.pth.tar")["epoch"] == 1

    done = run_process([*args, "--resume", "auto"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "resumes from" in done.stdout
    assert "epoch 2/2 done" in done.stdout
    assert "epoch 1/2" not in done.stdout
    whole_log, whole_model = where(whole)
    assert_same_weights(model / "ckpt.pth.tar", whole_model / "ckpt.pth.tar")
    assert_same_weights(model / "ckpt.best.pth.tar", whole_model / "ckpt.best.pth.tar")
    assert read_logs(log) == read_logs(whole_log)
    assert [row["epoch_from_0"] for row in read_csv(log / "log_train.csv")] == ["0", "1"]
    assert not leftovers(tmp_path)


def test_ce_run_forked_into_ib_as_a_process_is_the_ib_run(never_stopped, tmp_path):
    whole, args = never_stopped
    ce = [*args, "--loss_type", "CE", "--train_rule", "None"]
    # the CE run need not be finished to be forked from: it is stopped where the fork begins
    status, _, err = run_process_until(ce, tmp_path, "epoch 2/2  batch 1/", signal.SIGINT)
    assert status == 130
    _, model = where(tmp_path, "CE", "None")
    stopped = snapshot(model)
    assert messages(err) == [
        "cifar_train.py: stopped by Ctrl-C: add --resume auto to continue from "
        "checkpoint/digits_resnet20_CE_None_exp_0.01_0/ckpt.pth.tar"
    ]
    assert not leftovers(tmp_path)

    done = run_process([*args, "--resume", model / "ckpt.epoch001.pth.tar"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_weights(where(tmp_path)[1] / "ckpt.pth.tar", where(whole)[1] / "ckpt.pth.tar")
    assert read_logs(where(tmp_path)[0]) == read_logs(where(whole)[0])
    assert snapshot(model) == stopped, "the fork wrote into the folder it came from"


def test_sigterm_in_mid_epoch_stops_cleanly(tmp_path):
    args = [*DIGITS, *REAL, "--epochs", "2", "--milestones", "1", "-p", "1"]
    status, lines, err = run_process_until(args, tmp_path, "epoch 2/2  batch 2/", signal.SIGTERM)
    log, model = where(tmp_path, "CE", "None")
    assert status == 143
    (line,) = messages(err)
    assert line.startswith("cifar_train.py: stopped by SIGTERM: add --resume auto to continue from checkpoint/")
    assert "epoch 2/2 done" not in "".join(lines)
    assert load_checkpoint(model / "ckpt.pth.tar")["epoch"] == 1
    assert [row["epoch_from_0"] for row in read_csv(log / "log_train.csv")] == ["0"]
    assert [row["epoch_from_0"] for row in read_csv(log / "log_test.csv")] == ["0"]
    assert not leftovers(tmp_path)


# ---------------------------------------------------------------- every place to stop at, in this process


@pytest.mark.parametrize("after", [0, 1, 2, 3, 4])
def test_a_run_broken_off_in_any_epoch_is_resumed_to_the_same_end(after, tmp_path, capsys):
    args = [*FIVE, *TINY, "--loss_type", "IB", "--train_rule", "IBReweight"]
    run_ok([*args, "--exp_str", "whole"], tmp_path, capsys)
    status, _, err = break_off(args, tmp_path, capsys, after)
    assert status == 130
    assert ("no epoch was finished" if after == 0 else "--resume auto") in messages(err)[0]
    out = run_ok([*args, "--resume", "auto"], tmp_path, capsys)
    assert ("starting from scratch" in out) == (after == 0)
    one, two = (model_folder(tmp_path, "IB", "IBReweight", exp=e) for e in ("0", "whole"))
    for name in ("ckpt.pth.tar", "ckpt.best.pth.tar", "ckpt.epoch002.pth.tar"):
        assert_same_weights(one / name, two / name)
    one, two = (log_folder(tmp_path, "IB", "IBReweight", exp=e) for e in ("0", "whole"))
    assert read_logs(one) == read_logs(two)


RESUMED = {
    "Resample": ["--loss_type", "CE", "--train_rule", "Resample"],
    "DRW": ["--loss_type", "LDAM", "--train_rule", "DRW"],
    "Focal": ["--loss_type", "Focal", "--train_rule", "CBReweight"],
    "IBFocal": ["--loss_type", "IBFocal", "--train_rule", "CBReweight"],
    "alpha auto": ["--loss_type", "IB", "--train_rule", "IBReweight", "--alpha", "auto"],
    "alpha auto and DRW": ["--loss_type", "IB", "--train_rule", "DRW", "--alpha", "auto"],
    "validation part": ["--val_fraction", "0.2"],
}


@pytest.mark.parametrize("after", [2, 3])
@pytest.mark.parametrize("flags", RESUMED.values(), ids=RESUMED.keys())
def test_every_kind_of_run_is_resumed_to_the_same_end(flags, after, tmp_path, capsys):
    args = [*FIVE, *TINY, *flags]
    run_ok([*args, "--root_log", "log/whole", "--root_model", "checkpoint/whole"], tmp_path, capsys)
    assert break_off(args, tmp_path, capsys, after)[0] == 130
    run_ok([*args, "--resume", "auto"], tmp_path, capsys)
    (one,) = (tmp_path / "checkpoint").glob("digits_*")
    whole = tmp_path / "checkpoint" / "whole" / one.name
    assert_same_weights(one / "ckpt.pth.tar", whole / "ckpt.pth.tar")
    assert read_logs(tmp_path / "log" / one.name) == read_logs(tmp_path / "log" / "whole" / one.name)
    states = [load_checkpoint(folder / "ckpt.pth.tar") for folder in (one, whole)]
    assert states[0]["criterion"].keys() == states[1]["criterion"].keys()
    for name, value in states[0]["criterion"].items():
        assert torch.equal(value, states[1]["criterion"][name]), name
    assert states[0]["history"][-1]["alpha"] == states[1]["history"][-1]["alpha"]
    assert states[0]["history"][-1]["ib_factor"] == states[1]["history"][-1]["ib_factor"]


def test_resumed_twice_is_still_the_same_run(tmp_path, capsys):
    args = [*FIVE, *TINY, "--loss_type", "IB"]
    run_ok([*args, "--exp_str", "whole"], tmp_path, capsys)
    for done in (1, 2):
        flags = args if done == 1 else [*args, "--resume", "auto"]
        assert break_off(flags, tmp_path, capsys, after=1)[0] == 130
        assert load_checkpoint(model_folder(tmp_path, "IB") / "ckpt.pth.tar")["epoch"] == done
    run_ok([*args, "--resume", "auto"], tmp_path, capsys)
    one, two = (model_folder(tmp_path, "IB", exp=e) / "ckpt.pth.tar" for e in ("0", "whole"))
    assert_same_weights(one, two)


def test_a_line_cut_by_a_crash_is_mended(tmp_path, capsys):
    args = [*FIVE, *TINY]
    run_ok([*args, "--exp_str", "whole"], tmp_path, capsys)
    break_off(args, tmp_path, capsys, after=3)
    for name in ("log_train.csv", "log_test.csv", "class_accuracy.csv"):
        path = log_folder(tmp_path) / name
        path.write_bytes(path.read_bytes()[:-7])
    run_ok([*args, "--resume", "auto"], tmp_path, capsys)
    assert read_logs(log_folder(tmp_path)) == read_logs(log_folder(tmp_path, exp="whole"))


@pytest.mark.parametrize("again", [[], ["--resume", "auto"]], ids=["the same command", "resume auto"])
def test_a_run_stopped_between_its_last_checkpoint_and_its_logs_is_completed(again, tmp_path, capsys):
    args = [*FIVE, *TINY]
    run_ok([*args, "--exp_str", "whole"], tmp_path, capsys)
    add = Records.add

    def stopped_at_the_end(self, record):
        if record["epoch"] == EPOCHS - 1:
            raise KeyboardInterrupt
        add(self, record)

    with mock.patch.object(Records, "add", stopped_at_the_end):
        assert run_main(args, tmp_path, capsys)[0] == 130
    run_ok([*args, *again], tmp_path, capsys, figures=True)
    assert read_logs(log_folder(tmp_path)) == read_logs(log_folder(tmp_path, exp="whole"))
    assert (log_folder(tmp_path) / "curves.png").exists()
    names = [os.listdir(folder) for folder in (model_folder(tmp_path), model_folder(tmp_path, exp="whole"))]
    assert sorted(names[0]) == sorted(names[1]), "it went on from a copy, as a fork does"


# -------------------------------------------------------------------------------------------------- forks


@pytest.fixture
def ce_run(tmp_path, capsys):
    """A finished CE run, with the checkpoints after 1, 2 and 3 epochs; its model folder."""
    run_ok([*FIVE, *TINY, "--keep_epochs", "1", "3"], tmp_path, capsys)
    return model_folder(tmp_path)


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
    assert (status, messages(err)[-1]) == (130, "cifar_train.py: stopped by Ctrl-C: no epoch was finished")
    assert not (model_folder(tmp_path, "IB") / "ckpt.pth.tar").exists()
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
    assert "holds the logs of this run, but" in messages(err)[-1]
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


def test_a_drawn_seed_is_printed_recorded_and_inherited(tmp_path, capsys):
    args = [a for a in FIVE if a not in ("--seed", "0")] + TINY
    out = run_ok(args, tmp_path, capsys)
    seed = load_checkpoint(model_folder(tmp_path) / "ckpt.pth.tar")["settings"]["seed"]
    assert f", seed {seed}," in out
    path = model_folder(tmp_path) / "ckpt.epoch002.pth.tar"
    run_ok([*args, "--loss_type", "IB", "--resume", path], tmp_path, capsys)
    run_ok([*args, "--loss_type", "IB", "--seed", seed, "--exp_str", "whole"], tmp_path, capsys)
    fork, whole = (model_folder(tmp_path, "IB", exp=e) / "ckpt.pth.tar" for e in ("0", "whole"))
    assert load_checkpoint(fork)["settings"]["seed"] == seed
    assert_same_weights(fork, whole)
    assert "finished" in run_ok(args, tmp_path, capsys), "the same command, its seed still left out, is the same run"
    run_ok([*args, "--exp_str", "second"], tmp_path, capsys)
    assert load_checkpoint(model_folder(tmp_path, exp="second") / "ckpt.pth.tar")["settings"]["seed"] != seed


# ------------------------------------------------------------------------------------- a new head on a frozen network

#: Three epochs of the whole network, two of a new head.
CRT = [*DIGITS, *TINY, "--epochs", "5", "--drw_epoch", "3", "--milestones", "2", "--start_ib_epoch", "2"]
CRT += ["--train_rule", "cRT"]
HEAD = ("linear.weight", "linear.bias")


def heads_at_start(args, cwd, capsys):
    """[(weight, its momentum, labels seen)] of each epoch that trains the head alone; weights from before it."""
    train_one_epoch, found = fit.train_one_epoch, []

    def watched(model, batches, criterion, optimizer, *rest):
        labels = []

        def seen():
            for images, target in batches:
                labels.extend(target.tolist())
                yield images, target

        if len(list(model.parameters())) <= len(HEAD):
            (weight, *_) = model.parameters()
            found.append((weight.detach().clone(), optimizer.state[weight]["momentum_buffer"].clone(), labels))
        return train_one_epoch(model, seen(), criterion, optimizer, *rest)

    with mock.patch.object(fit, "train_one_epoch", watched):
        run_ok(args, cwd, capsys)
    return found


@pytest.mark.parametrize("loss", ["CE", "LDAM", "IB"])
def test_the_second_stage_of_crt_changes_the_head_and_nothing_else(loss, tmp_path, capsys):
    run_ok([*CRT, "--loss_type", loss, "--keep_epochs", "3", "4"], tmp_path, capsys)
    folder = model_folder(tmp_path, loss, "cRT")
    states = [load_checkpoint(folder / f"ckpt{name}.pth.tar") for name in (".epoch003", ".epoch004", "")]
    assert [state["epoch"] for state in states] == [3, 4, 5]
    names = list(states[0]["state_dict"])
    assert {"bn1.running_mean", "bn1.num_batches_tracked"} < set(names)
    for before, after in itertools.pairwise(states):
        same = {name for name in names if torch.equal(before["state_dict"][name], after["state_dict"][name])}
        assert set(names) - same == {name for name in names if name in HEAD}
    buffers = [[entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()] for state in states]
    assert [torch.equal(a, b) for a, b in zip(buffers[0], buffers[2], strict=True)][:3] == [True] * 3, "conv, bn"
    assert [record["stage"]["trains"] for record in states[2]["history"]] == ["all"] * 3 + ["head"] * 2


def test_the_head_of_crt_is_drawn_anew_from_the_seed_and_sees_the_classes_equally_often(tmp_path, capsys):
    found = heads_at_start([*CRT, "--keep_epochs", "3"], tmp_path, capsys)
    assert len(found) == 2
    weight, momentum, _ = found[0]
    torch.manual_seed(epoch_seed(0, 3))
    assert torch.equal(weight, torch.nn.Linear(64, 10).weight)
    state = load_checkpoint(model_folder(tmp_path, "CE", "cRT") / "ckpt.epoch003.pth.tar")
    assert not torch.equal(weight, state["state_dict"]["linear.weight"])
    assert momentum.abs().sum() == 0
    assert state["optimizer"]["state"][3]["momentum_buffer"].abs().sum() > 0, "there was nothing to forget"
    assert found[1][1].abs().sum() > 0, "forgotten again in the next epoch"
    labels = found[0][2] + found[1][2]
    assert len(labels) == 2 * 309
    shares = [labels.count(k) / len(labels) for k in range(10)]
    assert max(abs(share - 0.1) for share in shares) < 0.04, "over three standard deviations"
    again = heads_at_start([*CRT, "--exp_str", "again"], tmp_path, capsys)
    other = heads_at_start([*CRT, "--exp_str", "other", "--seed", "1"], tmp_path, capsys)
    assert torch.equal(again[0][0], weight)
    assert not torch.equal(other[0][0], weight)


@pytest.mark.parametrize("after", [2, 3, 4])
@pytest.mark.parametrize("loss", ["LDAM", "IB"])
def test_crt_stopped_in_either_stage_is_resumed_to_the_same_end(loss, after, tmp_path, capsys):
    args = [*CRT, "--loss_type", loss]
    run_ok([*args, "--exp_str", "whole"], tmp_path, capsys)
    assert break_off(args, tmp_path, capsys, after)[0] == 130
    run_ok([*args, "--resume", "auto"], tmp_path, capsys)
    one, two = (model_folder(tmp_path, loss, "cRT", exp=e) for e in ("0", "whole"))
    assert_same_weights(one / "ckpt.pth.tar", two / "ckpt.pth.tar")
    logs = [read_logs(log_folder(tmp_path, loss, "cRT", exp=e)) for e in ("0", "whole")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("flags", [[], ["--schedule", "cosine"], ["--loss_type", "IB"]], ids=" ".join)
def test_crt_forked_from_a_finished_run_is_the_run_from_the_start(flags, tmp_path, capsys):
    args = [*CRT, *flags]
    if "cosine" in flags:
        at = args.index("--milestones")
        args[at : at + 2] = []
    first = [*args, "--epochs", "3", "--train_rule", "None"]
    run_ok(first, tmp_path, capsys)
    loss = "IB" if "IB" in flags else "CE"
    state = load_checkpoint(model_folder(tmp_path, loss) / "ckpt.pth.tar")
    for record in state["history"]:  # as of older checkpoints
        del record["stage"]["trains"]
    torch.save(state, tmp_path / "older.pth.tar")
    run_ok([*args, "--exp_str", "whole"], tmp_path, capsys)
    run_ok([*args, "--resume", "older.pth.tar"], tmp_path, capsys)
    one, two = (model_folder(tmp_path, loss, "cRT", exp=e) / "ckpt.pth.tar" for e in ("0", "whole"))
    assert_same_weights(one, two)
    logs = [read_logs(log_folder(tmp_path, loss, "cRT", exp=e)) for e in ("0", "whole")]
    assert logs[0] == logs[1]


def test_crt_cannot_be_forked_from_a_run_that_has_gone_on_with_the_whole_network(tmp_path, capsys):
    run_ok([*CRT, "--train_rule", "None"], tmp_path, capsys)
    path = model_folder(tmp_path) / "ckpt.pth.tar"
    status, _, err = run_main([*CRT, "--epochs", "7", "--resume", path], tmp_path, capsys)
    assert status == 2
    assert "in epoch 4, lr is 0.0008 there and 0.1 here" in err


def test_dry_run_of_crt_says_what_is_trained_and_warns_of_milestones_that_never_come(tmp_path, capsys):
    status, out, err = run_main([*CRT, "--milestones", "2", "4", "--dry_run"], tmp_path, capsys)
    assert status == 0
    assert out.splitlines() == [
        "epoch_from_0,lr,loss,class_weights,sampler,trains",
        "0,0.02,CE,none,none,all",
        "1,0.04,CE,none,none,all",
        "2,0.0006000000000000002,CE,none,none,all",
        "3,0.1,CE,none,Balanced,head",
        "4,0.05,CE,none,Balanced,head",
    ]
    assert err == "warning: the lr milestones [4] never come: from --drw_epoch 3 on the head has its own lr\n"


def test_two_ranks_train_the_head_of_the_single_process(tmp_path):
    """Data parallel is built for the whole network in the first stage, for the head alone in the second."""
    cwd = [tmp_path / "one", tmp_path / "two"]
    for ranks, folder in enumerate(cwd, 1):
        folder.mkdir()
        flags = [*test_distributed.BASE, "--train_rule", "cRT", "--drw_epoch", 1, "-a", "plain", "--keep_epochs", 1]
        status, _, err = test_distributed.run(folder, *flags, ranks=ranks, REPORT=str(tmp_path))
        assert status == 0, err
    one, two = (test_distributed.weights(folder, "plain_CE_cRT") for folder in cwd)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-6, atol=1e-6)
    path = model_folder(cwd[1], "CE", "cRT", arch="plain") / "ckpt.epoch001.pth.tar"
    assert torch.equal(two["conv1.weight"], load_checkpoint(path)["state_dict"]["conv1.weight"])
    assert (tmp_path / "rank0of2").read_text() == (tmp_path / "rank1of2").read_text()


# ----------------------------------------------------------------------------------------------- refusals

DIFFERENT = {
    "dataset": ["--dataset", "cifar10"],
    "arch": ["--arch", "resnet20"],
    "use_norm": ["--loss_type", "LDAM"],
    "imb_type": ["--imb_type", "step"],
    "imb_factor": ["--imb_factor", "0.1"],
    "rand_number": ["--rand_number", "1"],
    "val_fraction": ["--val_fraction", "0.1"],
    "seed": ["--seed", "1"],
    "batch_size": ["--batch-size", "32"],
    "momentum": ["--momentum", "0.5"],
    "weight_decay": ["--wd", "0.001"],
    "pretrained": ["--pretrained"],
    "lr": ["--lr", "0.2"],
    "loss": ["--loss_type", "Focal"],
    "class_weights": ["--train_rule", "IBReweight"],
    "sampler": ["--train_rule", "Resample"],
}


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    """The checkpoint of a CE run after one of five epochs; made once, by whoever asks first."""
    folder = tmp_path_factory.mktemp("one_epoch")

    def get(capsys):
        path = model_folder(folder) / "ckpt.epoch001.pth.tar"
        if not path.exists():
            run_ok([*FIVE, *TINY, "--keep_epochs", "1"], folder, capsys)
        return path

    return get


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_setting_that_differs_is_named_and_refused(name, one_epoch, tmp_path, capsys):
    path = one_epoch(capsys)
    args = [*FIVE, *TINY, "--exp_str", "other", *DIFFERENT[name], "--resume", path]
    status, _, err = run_main(args, tmp_path, capsys)
    assert status == 2
    (line,) = messages(err)
    assert f"{name} is " in line
    assert "--force" in line
    assert str(path) in line
    assert not list(tmp_path.iterdir())


def test_number_of_classes_of_a_checkpoint_is_compared(one_epoch, tmp_path, capsys):
    state = load_checkpoint(one_epoch(capsys))
    state["settings"]["num_classes"] = 12
    torch.save(state, tmp_path / "twelve.pth.tar")
    status, _, err = run_main([*FIVE, *TINY, "--resume", "twelve.pth.tar"], tmp_path, capsys)
    assert status == 2
    assert "num_classes is 12 there and 10 here" in err


@pytest.mark.parametrize("name", ["rand_number", "seed", "batch_size", "momentum", "lr", "class_weights"])
def test_force_goes_on_with_a_setting_that_differs_and_says_so(name, one_epoch, tmp_path, capsys):
    args = [*FIVE, *TINY, "--exp_str", "other", *DIFFERENT[name], "--resume", one_epoch(capsys), "--force"]
    status, out, err = run_main(args, tmp_path, capsys)
    assert status == 0
    assert f"{name} is " in err
    assert err.startswith("warning:")
    assert "epoch 5/5 done" in out
    assert "epoch 1/5" not in out


def test_threads_that_differ_warn_only(one_epoch, tmp_path, capsys):
    args = [*FIVE, *TINY, "--resume", one_epoch(capsys)]
    args[args.index("--threads") + 1] = "2"
    status, _, err = run_main(args, tmp_path, capsys)
    assert status == 0
    assert "made with 1 threads, this run has 2" in err


def test_the_same_command_on_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    args = [*FIVE, *TINY]
    run_ok(args, tmp_path, capsys, figures=True)
    before = snapshot(tmp_path)
    for again in (args, [*args, "--resume", "auto"], [*args, "-p", "3"]):
        out = run_ok(again, tmp_path, capsys, figures=True)
        assert "finished: nothing to do" in out
        assert snapshot(tmp_path) == before


def test_the_same_command_on_an_unfinished_run_asks_for_resume_auto(tmp_path, capsys):
    args = [*FIVE, *TINY]
    break_off(args, tmp_path, capsys, after=2)
    before = snapshot(tmp_path)
    status, _, err = run_main(args, tmp_path, capsys)
    assert status == 2
    assert "after 2 epochs" in err
    assert "--resume auto" in err
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("more", [[], ["--resume", "auto"]], ids=["plain", "resume auto"])
@pytest.mark.parametrize("flags", [["--lr", "0.2"], ["--seed", "1"], ["-b", "32"], ["--beta", "0.5"]])
def test_a_folder_with_another_runs_settings_is_not_written_over(flags, more, tmp_path, capsys):
    run_ok([*FIVE, *TINY, "--train_rule", "CBReweight"], tmp_path, capsys)
    before = snapshot(tmp_path)
    status, _, err = run_main([*FIVE, *TINY, "--train_rule", "CBReweight", *flags, *more], tmp_path, capsys)
    assert status == 2
    assert len(messages(err)) == 1
    assert "other settings" in err
    assert "--exp_str" in err
    assert "--overwrite" in err
    assert snapshot(tmp_path) == before


def test_another_runs_logs_are_safe_where_its_checkpoints_lie_elsewhere(tmp_path, capsys):
    run_ok([*FIVE, *TINY, "--root_model", "elsewhere"], tmp_path, capsys)
    before = snapshot(tmp_path / "log")
    status, _, err = run_main([*FIVE, *TINY, "--lr", "0.2"], tmp_path, capsys)
    assert snapshot(tmp_path / "log") == before
    assert status == 2
    assert "--exp_str" in err


def test_logs_of_this_run_without_its_checkpoints_are_not_written_over(tmp_path, capsys):
    run_ok([*FIVE, *TINY], tmp_path, capsys)
    shutil.rmtree(tmp_path / "checkpoint")
    before = snapshot(tmp_path)
    for more in ([], ["--resume", "auto"]):
        status, _, err = run_main([*FIVE, *TINY, *more], tmp_path, capsys)
        assert status == 2
        assert "holds the logs of this run, but" in messages(err)[-1]
        assert "holds no checkpoint: --overwrite it" in messages(err)[-1]
        assert snapshot(tmp_path) == before


def test_overwrite_starts_anew(tmp_path, capsys):
    args = [*FIVE, *TINY]
    run_ok([*args, "--keep_epochs", "3"], tmp_path, capsys)
    log, model = log_folder(tmp_path), model_folder(tmp_path)
    for folder in (log, model):
        (folder / "notes.txt").write_text("mine")
    out = run_ok([*args, "--lr", "0.2", "--overwrite"], tmp_path, capsys)
    assert "epoch 1/5" in out
    assert not (model / "ckpt.epoch003.pth.tar").exists(), "a checkpoint of the run that was overwritten"
    assert load_checkpoint(model / "ckpt.pth.tar")["settings"]["lr"] == 0.2
    assert len(read_csv(log / "log_train.csv")) == EPOCHS
    run_ok([*args, "--lr", "0.2", "--exp_str", "whole"], tmp_path, capsys)
    assert_same_weights(model / "ckpt.pth.tar", model_folder(tmp_path, exp="whole") / "ckpt.pth.tar")
    assert all((folder / "notes.txt").read_text() == "mine" for folder in (log, model))


def test_overwrite_deletes_only_what_a_run_writes(tmp_path, capsys):
    run_ok([*FIVE, *TINY], tmp_path, capsys)
    mine = [log_folder(tmp_path) / name for name in ("my_table.csv", "my_figure.png", "notes.json", "notes.txt")]
    for path in mine:
        path.write_text("mine")
    run_ok([*FIVE, *TINY, "--overwrite"], tmp_path, capsys)
    assert [path.exists() for path in mine] == [True] * 4


def test_overwriting_by_a_fork_leaves_nothing_of_the_old_run(ce_run, tmp_path, capsys):
    args = [*FIVE, *TINY, "--loss_type", "IB"]
    run_ok([*args, "--keep_epochs", "4", "--seed", "7"], tmp_path, capsys)
    run_ok([*args, "--overwrite", "--resume", ce_run / "ckpt.epoch002.pth.tar"], tmp_path, capsys)
    seeds = {load_checkpoint(path)["settings"]["seed"] for path in model_folder(tmp_path, "IB").glob("ckpt*")}
    assert seeds == {0}


def test_an_overwriting_run_broken_off_at_once_leaves_no_figures_of_the_old_one(tmp_path, capsys):
    args = [*FIVE, *TINY]
    run_ok(args, tmp_path, capsys, figures=True)
    log = log_folder(tmp_path)
    assert {"summary.json", "curves.png", "confusion.png"} <= {path.name for path in log.iterdir()}
    break_off([*args, "--lr", "0.2", "--overwrite"], tmp_path, capsys, after=0)
    left = {path.name for path in log.iterdir()}
    assert left == {"args.json", "class_accuracy.csv", "log_test.csv", "log_train.csv"}
    assert all(read_csv(log / name) == [] for name in left if name.endswith(".csv"))


def test_a_refused_overwrite_deletes_nothing(tmp_path, capsys):
    run_ok([*FIVE, *TINY], tmp_path, capsys)
    before = snapshot(tmp_path)
    for wrong in (["--resume", "nowhere.pth.tar"], ["--pretrained", "nowhere.pth.tar"], ["--imb_factor", "0.001"]):
        status, _, _ = run_main([*FIVE, *TINY, "--lr", "0.2", "--overwrite", *wrong], tmp_path, capsys)
        assert status in (1, 2)
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("has_matplotlib", [True, False])
@pytest.mark.parametrize("figures", [True, False])
@pytest.mark.parametrize("epochs", [None, 1, 2])
def test_a_finished_run_is_one_with_logs_and_figures_of_every_epoch(epochs, figures, has_matplotlib, tmp_path):
    if epochs is not None:
        (tmp_path / "summary.json").write_text(json.dumps({"settings": {}, "epochs_done": epochs}))
    for name in FIGURES if figures else ():
        (tmp_path / name).touch()
    with mock.patch.object(plots, "available", return_value=has_matplotlib):
        complete = resume._is_complete(tmp_path, {"history": [{}, {}]})
    assert complete == (epochs == 2 and (figures or not has_matplotlib))


# ------------------------------------------------------------- another length, older checkpoints, --force


LONGER = {
    "CE": [],
    "IB": ["--loss_type", "IB", "--train_rule", "IBReweight"],
    "alpha auto": ["--loss_type", "IB", "--alpha", "auto"],
    "Resample": ["--train_rule", "Resample"],
    "validation part": ["--val_fraction", "0.2"],
}


@pytest.mark.parametrize("flags", LONGER.values(), ids=LONGER.keys())
def test_a_finished_run_is_made_longer_in_its_own_folder(flags, tmp_path, capsys):
    args, roots = [*FIVE, *TINY, *flags], ["--root_log", "log/whole", "--root_model", "checkpoint/whole"]
    run_ok([*args, "--epochs", "7", *roots], tmp_path, capsys)
    run_ok(args, tmp_path, capsys)
    out = run_ok([*args, "--epochs", "7", "--resume", "auto"], tmp_path, capsys)
    assert "after 5 epochs" in out
    assert "epoch 6/7 done" in out
    (one,) = (tmp_path / "checkpoint").glob("digits_*")
    whole = tmp_path / "checkpoint" / "whole" / one.name
    for name in ("ckpt.pth.tar", "ckpt.best.pth.tar"):
        assert_same_weights(one / name, whole / name)
    log = tmp_path / "log" / one.name
    assert read_logs(log) == read_logs(tmp_path / "log" / "whole" / one.name)
    assert json.loads((log / "args.json").read_text())["epochs"] == 7
    assert "finished: nothing to do" in run_ok([*args, "--epochs", "7"], tmp_path, capsys)


def test_a_longer_run_that_is_stopped_is_resumed(tmp_path, capsys):
    args = [*FIVE, *TINY]
    run_ok(args, tmp_path, capsys)
    longer = [*args, "--epochs", "8", "--resume", "auto"]
    assert break_off(longer, tmp_path, capsys, after=1)[0] == 130
    run_ok(longer, tmp_path, capsys)
    run_ok([*args, "--epochs", "8", "--exp_str", "whole"], tmp_path, capsys)
    assert_same_weights(model_folder(tmp_path) / "ckpt.pth.tar", model_folder(tmp_path, exp="whole") / "ckpt.pth.tar")


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--milestones", "3"], "in epoch 4, lr is "),
        (["--lr", "0.2"], "in epoch 1, lr is 0.02 there and 0.04 here"),
        (["--warmup_epochs", "0"], "in epoch 1, lr is 0.02 there and 0.1 here"),
        (["--train_rule", "CBReweight", "--beta", "0.9"], "in epoch 1, beta is 0.9999 there and 0.9 here"),
        (["--batch-size", "32"], "batch_size is 64 there and 32 here"),
        (["--seed", "1"], "seed is 0 there and 1 here"),
    ],
)
def test_a_longer_run_with_another_plan_is_refused_with_the_first_epoch_that_differs(
    flags, difference, tmp_path, capsys
):
    rule = flags[:2] if flags[0] == "--train_rule" else []
    run_ok([*FIVE, *TINY, *rule], tmp_path, capsys)
    before = snapshot(tmp_path)
    status, _, err = run_main([*FIVE, *TINY, *flags, "--epochs", "7", "--resume", "auto"], tmp_path, capsys)
    assert status == 2
    (line,) = messages(err)
    assert difference in line
    assert snapshot(tmp_path) == before


def test_a_cosine_over_more_epochs_is_another_plan(tmp_path, capsys):
    cosine = [*FIVE[:-2], *TINY, "--schedule", "cosine", "--warmup_epochs", "2"]
    run_ok(cosine, tmp_path, capsys)
    status, _, err = run_main([*cosine, "--epochs", "7", "--resume", "auto"], tmp_path, capsys)
    assert status == 2
    assert "in epoch 3, lr is " in messages(err)[0]


def test_a_longer_run_without_resume_auto_is_refused_with_the_way_to_continue(tmp_path, capsys):
    run_ok([*FIVE, *TINY], tmp_path, capsys)
    before = snapshot(tmp_path)
    status, _, err = run_main([*FIVE, *TINY, "--epochs", "7"], tmp_path, capsys)
    assert status == 2
    assert "epochs is 5 there and 7 here" in messages(err)[0]
    assert "--resume auto" in messages(err)[0]
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["ckpt.epoch001.pth.tar", "ckpt.epoch002.pth.tar", "ckpt.best.pth.tar"])
def test_an_older_checkpoint_of_the_same_folder_is_refused_while_a_newer_one_is_there(name, tmp_path, capsys):
    args = [*FIVE, *TINY]
    assert break_off([*args, "--keep_epochs", "1"], tmp_path, capsys, after=4)[0] == 130
    path = model_folder(tmp_path) / name
    if "best" in name:  # of a run that was best after its second epoch
        shutil.copy(path.with_name("ckpt.epoch002.pth.tar"), path)
    done = load_checkpoint(path)["epoch"]
    assert done < 4
    before = snapshot(tmp_path)
    status, _, err = run_main([*args, "--resume", path], tmp_path, capsys)
    assert status == 2
    (line,) = messages(err)
    assert f"{path} has {done} epochs done, but checkpoint/{path.parent.name} holds this run after 4" in line
    assert "--force" in line
    assert snapshot(tmp_path) == before

    out = run_ok([*args, "--resume", path, "--force"], tmp_path, capsys)
    assert f"epoch {done}/5 done" not in out
    assert f"epoch {done + 1}/5 done" in out
    run_ok([*args, "--exp_str", "whole"], tmp_path, capsys)
    assert_same_weights(path.with_name("ckpt.pth.tar"), model_folder(tmp_path, exp="whole") / "ckpt.pth.tar")
    assert read_logs(log_folder(tmp_path)) == read_logs(log_folder(tmp_path, exp="whole"))


def test_an_older_checkpoint_of_a_finished_run_changes_nothing_unless_forced(ce_run, tmp_path, capsys):
    before = snapshot(tmp_path)
    args = [*FIVE, *TINY, "--resume", ce_run / "ckpt.epoch002.pth.tar"]
    assert "finished: nothing to do" in run_ok(args, tmp_path, capsys)
    assert snapshot(tmp_path) == before
    out = run_ok([*args, "--force"], tmp_path, capsys)
    assert "epoch 2/5 done" not in out
    assert "epoch 3/5 done" in out
    run_ok([*FIVE, *TINY, "--exp_str", "whole"], tmp_path, capsys)
    assert_same_weights(ce_run / "ckpt.pth.tar", model_folder(tmp_path, exp="whole") / "ckpt.pth.tar")


@pytest.mark.parametrize("more", [["--resume", "auto"], []], ids=["resume auto", "plain"])
@pytest.mark.parametrize("flags", [["--epochs", "3", "--milestones", "2"], ["--lr", "0.2"], ["--seed", "1"]])
def test_force_never_calls_a_finished_run_another_one(flags, more, tmp_path, capsys):
    """Nothing is left to train, so that the figures would be those of the run as it was."""
    run_ok([*FIVE, *TINY], tmp_path, capsys)
    before = snapshot(tmp_path)
    status, out, err = run_main([*FIVE, *TINY, *flags, *more, "--force"], tmp_path, capsys)
    assert status == 2
    assert len(messages(err)) == 1
    assert "best (" not in out
    assert snapshot(tmp_path) == before


# ------------------------------------------------------------------------------------------ smaller things


def test_resume_auto_with_nothing_there_is_a_fresh_start_that_says_so(tmp_path, capsys):
    out = run_ok([*FIVE, *TINY, "--resume", "auto"], tmp_path, capsys)
    assert "no checkpoint in checkpoint/digits_tiny_CE_None_exp_0.01_0, starting from scratch" in out
    assert [row["epoch_from_0"] for row in read_csv(log_folder(tmp_path) / "log_train.csv")] == list("01234")


def test_the_loss_scaler_of_fp16_gets_its_state_back(tmp_path, capsys):
    break_off([*FIVE, *TINY], tmp_path, capsys, after=2)
    path = model_folder(tmp_path) / "ckpt.pth.tar"
    torch.save({**load_checkpoint(path), "scaler": {"scale": 512.0}}, path)
    with mock.patch.object(Precision, "load_state_dict") as restored:
        run_ok([*FIVE, *TINY, "--resume", "auto"], tmp_path, capsys)
    restored.assert_called_once_with({"scale": 512.0})
    scaler = Precision("fp16").scaler
    scaler.load_state_dict({**scaler.state_dict(), "scale": 512.0})
    again = Precision("fp16")
    again.load_state_dict(scaler.state_dict())
    assert again.state_dict()["scale"] == 512.0


def test_start_epoch_numbers_the_first_epoch(tmp_path, capsys):
    out = run_ok([*FIVE, *TINY, "--loss_type", "IB", "--start-epoch", "3"], tmp_path, capsys)
    assert "epoch 3/5" not in out
    rows = read_csv(log_folder(tmp_path, "IB") / "log_train.csv")
    assert [(row["epoch_from_0"], row["criterion"]) for row in rows] == [("3", "IB"), ("4", "IB")]
    assert [float(row["lr"]) for row in rows] == pytest.approx([1e-3, 1e-5])


def test_a_run_without_its_first_epochs_is_another_run(tmp_path, capsys):
    _, _, err = run_main([*FIVE, *TINY, "--start-epoch", "3"], tmp_path, capsys)
    assert "--start-epoch 3 without --resume: the epochs before it are left out" in err
    status, _, err = run_main([*FIVE, *TINY], tmp_path, capsys)
    assert status == 2
    assert "holds a run with other settings (start_epoch is 3 there and 0 here)" in messages(err)[0]


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


def test_resume_sets_the_start_epoch(one_epoch, tmp_path, capsys):
    out = run_ok([*FIVE, *TINY, "--start-epoch", "3", "--resume", one_epoch(capsys)], tmp_path, capsys)
    assert "epoch 2/5 done" in out
    assert [row["epoch_from_0"] for row in read_csv(log_folder(tmp_path) / "log_train.csv")] == list("01234")


def test_a_checkpoint_with_all_epochs_done_has_nothing_to_go_on_with(ce_run, tmp_path, capsys):
    args = [*FIVE, *TINY, "--loss_type", "CE", "--exp_str", "more", "--resume", ce_run / "ckpt.pth.tar"]
    status, _, err = run_main(args, tmp_path, capsys)
    assert status == 2
    assert "has 5 epochs done" in err


def test_a_finished_run_is_made_longer_in_a_folder_of_its_own(ce_run, tmp_path, capsys):
    longer = [*FIVE, *TINY, "--epochs", "7", "--exp_str", "longer"]
    run_ok([*longer, "--resume", ce_run / "ckpt.pth.tar"], tmp_path, capsys)
    run_ok([*FIVE, *TINY, "--epochs", "7", "--exp_str", "whole"], tmp_path, capsys)
    one, two = (model_folder(tmp_path, exp=e) / "ckpt.pth.tar" for e in ("longer", "whole"))
    assert_same_weights(one, two)


def test_the_run_folder_can_be_moved(tmp_path, capsys):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    args = [*FIVE, *TINY]
    break_off(args, here, capsys, after=2)
    shutil.move(here, there)
    out = run_ok([*args, "--resume", "auto"], there, capsys)
    assert "after 2 epochs" in out
    assert not os.path.exists(here)


def test_resume_auto_skips_what_a_kill_left_behind(tmp_path, capsys):
    args = [*FIVE, *TINY]
    break_off(args, tmp_path, capsys, after=2)
    stale = model_folder(tmp_path) / "ckpt.pth.tar.abcd1234"
    stale.write_bytes(b"half a checkpoint")
    run_ok([*args, "--resume", "auto"], tmp_path, capsys)
    run_ok([*args, "--exp_str", "whole"], tmp_path, capsys)
    assert_same_weights(model_folder(tmp_path) / "ckpt.pth.tar", model_folder(tmp_path, exp="whole") / "ckpt.pth.tar")


def test_a_checkpoint_from_before_flip_mirrored_its_digits_and_says_so(tmp_path, capsys):
    break_off([*FIVE, *TINY, "--flip", "on"], tmp_path, capsys, after=2)
    path = model_folder(tmp_path) / "ckpt.pth.tar"
    state = load_checkpoint(path)
    del state["settings"]["flip"]  # as an older run recorded it
    torch.save(state, path)
    status, _, err = run_main([*FIVE, *TINY, "--resume", "auto"], tmp_path, capsys)
    assert status == 2
    assert "was trained with mirrored images: use --flip on" in messages(err)[0]
    run_ok([*FIVE, *TINY, "--flip", "on", "--resume", "auto"], tmp_path, capsys)
    run_ok([*FIVE, *TINY, "--flip", "on", "--exp_str", "whole"], tmp_path, capsys)
    assert_same_weights(path, model_folder(tmp_path, exp="whole") / "ckpt.pth.tar")


# ------------------------------------------------------------------------------------- nothing is lost unseen


def test_the_same_command_on_a_trained_run_makes_its_logs_and_trains_nothing(tmp_path, capsys):
    run_ok([*FIVE, *TINY], tmp_path, capsys)
    before = read_logs(log_folder(tmp_path)), snapshot(model_folder(tmp_path))
    shutil.rmtree(tmp_path / "log")
    with mock.patch.object(fit, "train_one_epoch", side_effect=AssertionError("an epoch is trained")):
        run_ok([*FIVE, *TINY], tmp_path, capsys)
    assert (read_logs(log_folder(tmp_path)), snapshot(model_folder(tmp_path))) == before


@pytest.mark.parametrize("name", ["ckpt.best.pth.tar", "ckpt.previous.pth.tar", "ckpt.epoch002.pth.tar"])
def test_overwrite_never_deletes_the_checkpoint_that_it_starts_from(name, tmp_path, capsys):
    break_off([*FIVE, *TINY], tmp_path, capsys, after=3)
    (model_folder(tmp_path) / "ckpt.previous.pth.tar").touch()
    before = snapshot(tmp_path)
    args = [*FIVE, *TINY, "--overwrite", "--resume", model_folder(tmp_path) / name]
    status, _, err = run_main(args, tmp_path, capsys)
    assert status == 2
    assert messages(err)[-1].startswith("cifar_train.py: error: --overwrite would delete ")
    assert snapshot(tmp_path) == before


def test_a_run_that_goes_back_has_the_best_checkpoint_of_the_epochs_that_are_left(ce_run, tmp_path, capsys):
    def best():
        return load_checkpoint(ce_run / "ckpt.best.pth.tar")["epoch"]

    kept = load_checkpoint(ce_run / "ckpt.epoch002.best.pth.tar")["epoch"]
    assert best() > kept, "the test needs a best epoch after the one that it goes back to"
    back = [*FIVE, *TINY, "--keep_epochs", "1", "3", "--resume", ce_run / "ckpt.epoch002.pth.tar", "--force"]
    break_off(back, tmp_path, capsys, after=0)
    assert best() == kept


def test_a_fork_from_the_best_checkpoint_has_it_as_its_best(ce_run, tmp_path, capsys):
    shutil.copy(ce_run / "ckpt.epoch002.best.pth.tar", ce_run / "ckpt.best.pth.tar")
    args = [*FIVE, *TINY, "--loss_type", "IB", "--resume", ce_run / "ckpt.best.pth.tar"]
    break_off(args, tmp_path, capsys, after=0)
    assert_same_weights(model_folder(tmp_path, "IB") / "ckpt.best.pth.tar", ce_run / "ckpt.best.pth.tar")


def test_overwrite_leaves_checkpoints_that_no_run_writes(tmp_path, capsys):
    run_ok([*FIVE, *TINY], tmp_path, capsys)
    mine = [model_folder(tmp_path) / name for name in ("ckpt.mine.pth.tar", "ckpt.epoch.pth.tar", "ckpt-2.pth.tar")]
    for path in mine:
        path.write_text("mine")
    run_ok([*FIVE, *TINY, "--overwrite"], tmp_path, capsys)
    assert [path.read_text() for path in mine] == ["mine"] * 3


@pytest.mark.parametrize("flags", [["--alpha", "1000"], ["--ib_norm", "l2"], ["--epsilon", "0.1"]])
def test_another_constant_of_the_loss_by_force_starts_without_the_calibrated_alpha(flags, tmp_path, capsys):
    args = [*FIVE, *TINY, "--loss_type", "IB", "--train_rule", "IBReweight", "--alpha", "auto"]
    path = model_folder(tmp_path, "IB", "IBReweight") / "ckpt.pth.tar"
    break_off(args, tmp_path, capsys, after=4)
    batches = load_checkpoint(path)["criterion"]["auto.sums"][2] / 2  # of two epochs
    run_ok([*args, *flags, "--resume", "auto", "--force"], tmp_path, capsys)
    criterion = load_checkpoint(path)["criterion"]
    if flags[0] == "--alpha":
        assert not [name for name in criterion if name.startswith("auto")]
    else:
        assert criterion["auto.sums"][2] == batches, "the batches of the last epoch alone"


def test_a_checkpoint_of_all_epochs_without_history_is_refused(tmp_path, capsys):
    run_ok([*FIVE, *TINY], tmp_path, capsys)
    path = model_folder(tmp_path) / "ckpt.pth.tar"
    state = load_checkpoint(path)
    del state["history"]
    torch.save(state, path)
    shutil.rmtree(tmp_path / "log")
    for more in ([], ["--resume", "auto"]):
        status, _, err = run_main([*FIVE, *TINY, *more], tmp_path, capsys)
        assert status == 2
        assert "no history to make logs of: evaluate it with -e" in messages(err)[-1]


def test_a_fork_whose_source_is_written_over_meanwhile_says_so(ce_run, tmp_path):
    start = resume.ResumeState(epoch=2, path=str(ce_run / "ckpt.epoch003.pth.tar"), is_fork=True)
    (tmp_path / "fork").mkdir()
    with pytest.raises(resume.DataError, match="was written over while this run started"):
        resume.take_over_checkpoint(start, str(tmp_path / "fork"))
    assert not (tmp_path / "fork" / "ckpt.epoch002.pth.tar").exists()
