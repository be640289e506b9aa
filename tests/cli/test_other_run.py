"""A checkpoint or folder of another run: what is refused, what --force and --overwrite do, and that nothing is lost."""

import json
import shutil
from unittest import mock

import pytest
import torch
from script_runner import (
    EPOCHS,
    FIVE,
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
    snapshot,
)

from experiment import plots, resume
from experiment.plots import FIGURES

# ----------------------------------------------------------------------------------------------------- other settings


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
        assert "holds the logs of this run after 5 epochs, but" in messages(err)[-1]
        assert "holds no checkpoint of them: --overwrite it" in messages(err)[-1]
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


# -------------------------------------------------------------------------------------------------- older checkpoints


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


# -------------------------------------------------------------------------------------------------------- --overwrite


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


@pytest.mark.parametrize("flag", ["--resume", "--pretrained"])
@pytest.mark.parametrize("name", ["ckpt.best.pth.tar", "ckpt.previous.pth.tar", "ckpt.epoch002.pth.tar"])
def test_overwrite_never_deletes_the_checkpoint_that_it_starts_from(name, flag, tmp_path, capsys):
    break_off([*FIVE, *TINY], tmp_path, capsys, after=3)
    (model_folder(tmp_path) / "ckpt.previous.pth.tar").touch()
    before = snapshot(tmp_path)
    args = [*FIVE, *TINY, "--overwrite", flag, model_folder(tmp_path) / name]
    status, _, err = run_main(args, tmp_path, capsys)
    assert status == 2
    assert messages(err)[-1].startswith("cifar_train.py: error: --overwrite would delete ")
    assert snapshot(tmp_path) == before


def test_overwrite_leaves_checkpoints_that_no_run_writes(tmp_path, capsys):
    run_ok([*FIVE, *TINY], tmp_path, capsys)
    mine = [model_folder(tmp_path) / name for name in ("ckpt.mine.pth.tar", "ckpt.epoch.pth.tar", "ckpt-2.pth.tar")]
    for path in mine:
        path.write_text("mine")
    run_ok([*FIVE, *TINY, "--overwrite"], tmp_path, capsys)
    assert [path.read_text() for path in mine] == ["mine"] * 3


def test_overwrite_starts_from_a_checkpoint_of_the_folder_that_it_leaves(ce_run, tmp_path, capsys):
    mine = shutil.copy(ce_run / "ckpt.epoch002.pth.tar", ce_run / "ckpt.mine.pth.tar")
    args = [*FIVE, *TINY, "--milestones", "3"]  # another run from the fourth epoch on
    run_ok([*args, "--overwrite", "--resume", mine], tmp_path, capsys)
    run_ok([*args, "--exp_str", "whole"], tmp_path, capsys)
    for name in ("ckpt.pth.tar", "ckpt.best.pth.tar", "ckpt.epoch002.pth.tar"):
        assert_same_weights(ce_run / name, model_folder(tmp_path, exp="whole") / name)
    assert mine.exists()
