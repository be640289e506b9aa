"""A checkpoint or folder of another run: what is refused, what --force and --overwrite do, and that nothing is lost."""

import shutil

import pytest
from script_runner import (
    FIVE,
    TINY,
    assert_same_run,
    break_off,
    load_checkpoint,
    log_folder,
    model_folder,
    read_csv,
    refused,
    run_main,
    run_ok,
    snapshot,
)

# ----------------------------------------------------------------------------------------------------- other settings


DIFFERENT = {
    "arch": ["--arch", "resnet20"],
    "use_norm": ["--loss_type", "LDAM"],
    "imb_factor": ["--imb_factor", "0.1"],
    "seed": ["--seed", "1"],
    "batch_size": ["--batch-size", "32"],
    "lr": ["--lr", "0.2"],
    "loss": ["--loss_type", "Focal"],
    "optimizer": ["--optimizer", "adamw"],
    "ema": ["--ema", "0.9"],
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_setting_that_differs_is_named_and_refused(name, one_epoch, tmp_path):
    args = [*FIVE, *TINY, "--exp_str", "other", *DIFFERENT[name], "--resume", one_epoch]
    refused(args, tmp_path, f"{name} is ", "--force", str(one_epoch))


@pytest.mark.parametrize("name", ["batch_size", "lr", "optimizer"])
def test_force_goes_on_with_a_setting_that_differs_and_says_so(name, one_epoch, tmp_path):
    args = [*FIVE, *TINY, "--exp_str", "other", *DIFFERENT[name], "--resume", one_epoch, "--force"]
    status, out, err = run_main(args, tmp_path)
    assert status == 0
    assert f"{name} is " in err
    assert err.startswith("warning:")
    assert "epoch 5/5 done" in out
    assert "epoch 1/5" not in out


def test_threads_that_differ_warn_only(one_epoch, tmp_path):
    args = [*FIVE, *TINY, "--resume", one_epoch]
    args[args.index("--threads") + 1] = "2"
    _, _, err = break_off(args, tmp_path, after=0)
    assert "made with 1 threads, this run has 2" in err


@pytest.mark.parametrize("more", [[], ["--start-epoch", "3"]])
def test_the_same_command_on_a_finished_run_says_so_and_changes_nothing(more, tmp_path):
    args = [*FIVE, *TINY, *more]
    run_ok(args, tmp_path, figures=True)
    before = snapshot(tmp_path)
    for again in (args, [*args, "--resume", "auto"], [*args, "-p", "3"]):
        out = run_ok(again, tmp_path, figures=True)
        assert "finished: nothing to do" in out
        assert snapshot(tmp_path) == before


def test_a_folder_with_another_runs_settings_is_not_written_over(ce_run, tmp_path):
    for flags in (["--lr", "0.2"], ["--seed", "1"], ["--seed", "1", "--resume", "auto"]):
        line = refused([*FIVE, *TINY, *flags], tmp_path, "other settings", "--exp_str", "--overwrite")
        assert ("--exp_str seed1" in line) == ("--seed" in flags)


def test_another_runs_logs_are_safe_where_its_checkpoints_lie_elsewhere(tmp_path):
    run_ok([*FIVE, *TINY, "--root_model", "elsewhere"], tmp_path)
    refused([*FIVE, *TINY, "--lr", "0.2"], tmp_path, "--exp_str")


def test_logs_of_this_run_without_its_checkpoints_are_not_written_over(tmp_path):
    run_ok([*FIVE, *TINY], tmp_path)
    shutil.rmtree(tmp_path / "checkpoint")
    words = "holds the logs of a run after 5 epochs, but", "holds no checkpoint of it: --overwrite it"
    for more in ([], ["--resume", "auto"]):
        refused([*FIVE, *TINY, *more], tmp_path, *words)


def test_another_constant_of_the_loss_by_force_starts_without_the_calibrated_alpha(tmp_path):
    auto = ["--alpha", "auto", "--auto_target", "ce"]
    args = [*FIVE, *TINY, "--loss_type", "IB", "--train_rule", "IBReweight", *auto]
    path = model_folder(tmp_path, "IB", "IBReweight") / "ckpt.pth.tar"
    break_off(args, tmp_path, after=4)
    batches = load_checkpoint(path)["criterion"]["auto.sums"][2] / 2  # of two epochs
    run_ok([*args, "--epsilon", "0.1", "--resume", "auto", "--force"], tmp_path)
    criterion = load_checkpoint(path)["criterion"]
    assert criterion["auto.sums"][2] == batches, "the batches of the last epoch alone"


@pytest.mark.parametrize("name", ["optimizer", "criterion"])
def test_a_forced_fork_stopped_in_its_first_epoch_continues(name, tmp_path):
    """What it drops of the other run's states is not in its own first checkpoint either."""
    ib = [*FIVE, *TINY, "--loss_type", "IB", "--train_rule", "IBReweight"]
    other = {"optimizer": ["--alpha", "auto", "--optimizer", "adamw"], "criterion": ["--alpha", "5"]}[name]
    break_off([*ib, "--alpha", "auto"], tmp_path, after=4)
    path = model_folder(tmp_path, "IB", "IBReweight") / "ckpt.pth.tar"
    args = [*ib, *other, "--exp_str", "other", "--resume", str(path), "--force"]
    break_off(args, tmp_path, after=0)
    run_ok(args, tmp_path)
    assert len(load_checkpoint(model_folder(tmp_path, "IB", "IBReweight", "other") / "ckpt.pth.tar")["history"]) == 5


def test_force_does_not_continue_another_run_in_the_place_of_the_checkpoint_that_is_named(one_epoch, tmp_path):
    run_ok([*FIVE, *TINY], tmp_path)
    why = "holds a run with other settings (weight_decay is 0.0002 there and 0.1 here)"
    refused([*FIVE, *TINY, "--wd", "0.1", "--resume", one_epoch, "--force"], tmp_path, why)


# -------------------------------------------------------------------------------------------------------- --overwrite


def test_an_overwriting_run_broken_off_at_once_leaves_no_figures_of_the_old_one(tmp_path):
    args = [*FIVE, *TINY]
    run_ok(args, tmp_path, figures=True)
    log = log_folder(tmp_path)
    assert {"summary.json", "curves.png", "confusion.png"} <= {path.name for path in log.iterdir()}
    break_off([*args, "--lr", "0.2", "--overwrite"], tmp_path, after=0)
    left = {path.name for path in log.iterdir()}
    assert left == {"args.json", "class_accuracy.csv", "log_test.csv", "log_train.csv"}
    assert all(read_csv(log / name) == [] for name in left if name.endswith(".csv"))


def test_a_refused_overwrite_deletes_nothing(tmp_path):
    run_ok([*FIVE, *TINY], tmp_path)
    for flag, value, status in (
        ("--resume", "nowhere.pth.tar", 1), ("--pretrained", "nowhere.pth.tar", 1), ("--imb_factor", "0.001", 2),
    ):  # fmt: skip
        refused([*FIVE, *TINY, "--lr", "0.2", "--overwrite", flag, value], tmp_path, value, status=status)


@pytest.mark.parametrize(
    ("flag", "name"), [("--resume", "ckpt.epoch002.pth.tar"), ("--pretrained", "ckpt.best.pth.tar")]
)
def test_overwrite_never_deletes_the_checkpoint_that_it_starts_from(flag, name, tmp_path):
    break_off([*FIVE, *TINY], tmp_path, after=3)
    args = [*FIVE, *TINY, "--overwrite", flag, model_folder(tmp_path) / name]
    refused(args, tmp_path, "cifar_train.py: error: --overwrite would delete ")


def test_overwrite_empties_the_folders_and_starts_again(ce_run, tmp_path):
    args = [*FIVE, *TINY, "--lr", "0.2"]
    log = log_folder(tmp_path)
    (log / "evaluate").mkdir()
    for path in (log / "evaluate" / "logits.npz", log / "notes.txt"):
        path.touch()
    run_ok([*args, "--overwrite"], tmp_path)
    run_ok([*args, "--exp_str", "whole"], tmp_path)
    for folder in (log_folder, model_folder):
        names = [{p.name for p in folder(tmp_path, exp=e).iterdir() if "events" not in p.name} for e in ("0", "whole")]
        assert names[0] == names[1]
    assert_same_run(ce_run, model_folder(tmp_path, exp="whole"))


def test_force_never_calls_a_finished_run_another_one(tmp_path):
    """Nothing is left to train, so that the figures would be those of the run as it was."""
    run_ok([*FIVE, *TINY], tmp_path)
    for more in ([], ["--resume", "auto"]):
        refused([*FIVE, *TINY, "--lr", "0.2", *more, "--force"], tmp_path)
