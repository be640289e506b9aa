"""Bad input: one line that names the culprit, exit status 2 (usage) or 1 (data), nothing written, no traceback."""

import functools
import io
import math
import operator
import pickle
import urllib.error
from unittest import mock

import pytest
import torch
from script_runner import DIGITS, TINY, TWO_EPOCHS, fails, load_checkpoint, model_folder, refused, run_main, run_ok

import cifar_train

# -------------------------------------------------------------------------------------------------- usage

USAGE = {
    "unknown dataset": (["--dataset", "mnist"], "--dataset", "'mnist'", "cifar10"),
    "unknown flag": (["--aplha", "3"], "--aplha"),
    "huge seed": (["--seed", "9" * 400], "--seed", "it must be"),
    "factor 0": (["--imb_factor", "0"], "--imb_factor", "0 is not allowed"),
    "factor that empties a class": (["--imb_factor", "0.001"], "0.001", "of 10 classes empty", "class 7"),
    "num_classes that contradicts": (["--num_classes", "100"], "--num_classes 100", "digits has 10 classes"),
    "no number": (["--epochs", "many"], "--epochs", "'many'"),
    "infinite lr": (["--lr", "inf"], "--lr", "inf"),
    "milestone that never comes": (["--epochs", "3", "--milestones", "1", "3"], "--milestones 3 never comes"),
    "milestones that fall": (["--milestones", "8", "4"], "--milestones must be in increasing order"),
    "milestones of a cosine": (["--schedule", "cosine", "--milestones", "3"], "--schedule cosine has no --milestones"),
    "milestones and factors": (["--milestones", "1", "--lr_factors", "0.1", "0.1"], "--lr_factors"),
    "start past the end": (["--start-epoch", "9", "--epochs", "9", "--milestones", "1"], "--start-epoch 9"),
    "evaluate what": (["--evaluate"], "--evaluate", "--resume"),
    "negative gpu": (["--gpu=-1"], "--gpu -1"),
    "separator in exp_str": (["--exp_str", "../elsewhere"], "--exp_str"),
    "newline and escape in a flag": (["--epochs", "1", "odd\n\x1b[2Jword"], "odd"),
    "ImageNet's weights": (["--pretrained", "imagenet"], "--pretrained imagenet", "name a checkpoint"),
    "auto and overwrite": (["--resume", "auto", "--overwrite"], "--resume auto", "--overwrite"),
    "a correction of no checkpoint": (["--posthoc_la", "1"], "--posthoc_la is for an evaluation: add -e"),
    "two corrections": (["-e", "--resume", "x", "--posthoc_la", "1", "--tau_norm", "1"], "--posthoc_la and --tau_norm"),
    "an infinite factor": (["--loss_type", "IB", "--ib_norm", "none", "--epsilon", "0"], "--ib_norm none", "--epsilon"),
    "size of IB without L1": (["--auto_target", "ib", "--ib_norm", "l2"], "--auto_target ib", "--ib_norm l2"),
    "two validation sets": (["--val_fraction", "0.1", "--val_left_out", "5"], "--val_fraction and --val_left_out"),
    "left out of all": (["--imb_type", "none", "--val_left_out", "5"], "--val_left_out", "--imb_type"),
    "an empty path": (["--pretrained", ""], "argument --pretrained: an empty value"),
    "shared batch norm on a CPU": (["--sync_bn"], "--sync_bn needs CUDA devices"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage_errors(case, tmp_path):
    flags, *words = USAGE[case]
    refused([*DIGITS, *TINY, *flags], tmp_path, *words)


@pytest.mark.parametrize(
    ("flags", "warning"),
    [
        (["--loss_type", "IB", "--start_ib_epoch", "2"], "never comes in 2 epochs: --loss_type IB will be plain CE"),
        (["--train_rule", "DRW", "--drw_epoch", "2"], "--drw_epoch 2 never comes"),
        (["--train_rule", "cRT"], "the lr milestones [1] never come: from --drw_epoch 1"),
        (["--pretrained"], "--pretrained"),
        (["--gpu", "3"], "--gpu 3: there is no CUDA device, the run is on the CPU"),
    ],
)
def test_what_will_not_happen_is_a_warning(flags, warning, tmp_path):
    status, _, err = run_main([*TWO_EPOCHS, *TINY, *flags], tmp_path)
    assert status == 0
    (line,) = [line for line in err.splitlines() if line.startswith("warning:")]
    assert warning in line


def test_default_milestones_past_the_end_are_a_warning(tmp_path):
    status, _, err = run_main([*DIGITS, *TINY, "--epochs", "1"], tmp_path)
    assert status == 0
    assert "warning: the lr milestones [160, 180] never come in 1 epochs" in err


def test_a_gpu_beyond_those_that_are_there_is_an_error(tmp_path):
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.device_count", return_value=2),
    ):
        refused([*DIGITS, *TINY, "--gpu", "2"], tmp_path, "--gpu 2: this machine has 2 CUDA devices", cuda=True)


def test_a_run_that_mps_gives_no_gpu_does_not_train_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    refused([*DIGITS, *TINY], tmp_path, "CUDA_MPS_PIPE_DIRECTORY is set", "no device")


def test_missing_data_without_a_network(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "a_file").touch()
    words = ("cifar-100-python.tar.gz", "--dataset digits", "cannot be downloaded")
    for place in ("images", "a_file"):
        args = ["--dataset", "cifar100", *TINY, "--data_dir", place]
        with mock.patch("urllib.request.urlopen", side_effect=urllib.error.URLError("no route")):
            refused(args, tmp_path, f"no cifar100 in {place}", *words, status=1)


# ------------------------------------------------------------------------------------------------- folders


@pytest.mark.parametrize("flag", ["--root_log", "--root_model"])
def test_a_file_where_the_log_or_the_checkpoint_folder_should_be(flag, tmp_path):
    (tmp_path / "taken").write_text("a file")
    line = refused([*TWO_EPOCHS, *TINY, flag, "taken"], tmp_path, "taken", status=1)
    assert "Not a directory" in line or "File exists" in line


def test_an_unwritable_log_folder_costs_no_other_run_anything(tmp_path):
    run_ok([*TWO_EPOCHS, *TINY], tmp_path)
    (tmp_path / "taken").write_text("a file")
    args = [*TWO_EPOCHS, *TINY, "--lr", "0.2", "--overwrite", "--root_log", "taken"]
    refused(args, tmp_path, "taken", status=1)


def test_a_name_that_is_too_long_for_a_folder(tmp_path):
    refused([*TWO_EPOCHS, *TINY, "--exp_str", "x" * 300], tmp_path, "File name too long", status=1)


# --------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def good_checkpoint(tmp_path_factory):
    """The checkpoint of a finished epoch of two."""
    folder = tmp_path_factory.mktemp("good")
    run_ok([*TWO_EPOCHS, *TINY], folder)
    return model_folder(folder) / "ckpt.epoch001.pth.tar"


#: Keys of a part of a checkpoint, outermost first, and what replaces it; None: it is missing.
ODD = {
    "a weight of another shape": (["state_dict", "conv1.weight"], torch.zeros(5, 3, 3, 3)),
    "a weight too few": (["state_dict", "linear.bias"], None),
    "an optimizer of another model": (["optimizer", "param_groups"], [{"params": [0], "lr": 0.1, "momentum": 0.9}]),
    "momentum of another shape": (["optimizer", "state", 0, "momentum_buffer"], torch.zeros(5)),
    "a loss of another name": (["settings", "loss_type"], "XX"),
}

MODES = {"resume": ["--resume"], "evaluate": ["-e", "--resume"], "pretrained": ["--pretrained"]}
ARGS = [*TWO_EPOCHS, *TINY, "--exp_str", "new"]


class CreatesAFile:
    """Unpickled by `pickle`, it creates the file 'executed' in the working folder."""

    def __reduce__(self):
        return open, ("executed", "w")


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


FOREIGN = {
    "empty": b"",
    "text": b"These are not the weights you are looking for.\n",
    "another thing that torch saved": saved([1, 2, 3]),
    "no state_dict": saved({"epoch": 1, "arch": "tiny"}),
    "state_dict of another model": saved({"epoch": 1, "arch": "tiny", "state_dict": {"fc.weight": torch.zeros(2, 2)}}),
    "code": pickle.dumps({"state_dict": {}, "epoch": CreatesAFile()}),
    "code that torch saved": saved({"state_dict": {}, "epoch": 1, "x": CreatesAFile()}),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_checkpoints(kind, tmp_path):
    (tmp_path / "foreign.pth.tar").write_bytes(FOREIGN[kind])
    for mode in MODES.values():
        refused([*ARGS, *mode, "foreign.pth.tar"], tmp_path, "foreign.pth.tar", status=1)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("mode", MODES)
def test_missing_checkpoint(mode, tmp_path):
    name = "ckpt\n\x1b[31m.pth.tar"
    refused([*ARGS, *MODES[mode], name], tmp_path, "no checkpoint at ckpt\\n\\x1b[31m.pth.tar", status=1)


@pytest.mark.parametrize("case", ODD)
def test_checkpoints_with_an_odd_part(case, good_checkpoint, tmp_path):
    (*outer, last), value = ODD[case]
    state = load_checkpoint(good_checkpoint)
    part = functools.reduce(operator.getitem, outer, state)
    if value is None:
        del part[last]
    else:
        part[last] = value
    torch.save(state, tmp_path / "odd.pth.tar")
    refused([*ARGS, "--resume", "odd.pth.tar"], tmp_path, "odd.pth.tar", status=1)


def test_an_own_checkpoint_that_is_damaged_is_not_written_over(tmp_path):
    run_ok([*TWO_EPOCHS, *TINY], tmp_path)
    path = model_folder(tmp_path) / "ckpt.pth.tar"
    path.write_bytes(path.read_bytes()[:1000])
    way = "--overwrite starts again, --resume PATH --force continues another one"
    for more in ([], ["--resume", "auto"]):
        refused([*TWO_EPOCHS, *TINY, *more], tmp_path, str(path.relative_to(tmp_path)), way, status=1)
    run_ok([*TWO_EPOCHS, *TINY, "--resume", path.with_name("ckpt.epoch001.pth.tar"), "--force"], tmp_path)
    assert load_checkpoint(path)["epoch"] == 2


@pytest.mark.parametrize("change", [{"dataset": "tinyimagenet"}, {"arch": "resnet18"}])
def test_evaluating_a_checkpoint_of_another_script(change, good_checkpoint, tmp_path):
    state = load_checkpoint(good_checkpoint)
    state["settings"] |= change
    torch.save(state, tmp_path / "other.pth.tar")
    (value,) = change.values()
    refused(["-e", "--resume", "other.pth.tar"], tmp_path, "other.pth.tar", value, "cifar_train.py")


def test_a_checkpoint_from_before_a_flag_existed_is_resumed(good_checkpoint, tmp_path):
    state = load_checkpoint(good_checkpoint)
    del state["settings"]["gamma"], state["settings"]["ema"]
    torch.save(state, tmp_path / "older.pth.tar")
    out = run_ok([*ARGS, "--resume", "older.pth.tar"], tmp_path)
    assert "epoch 2/2 done" in out


# ---------------------------------------------------------------------------------------- losses that blow up


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_last_checkpoint(tmp_path):
    args = [*DIGITS, *TINY, "--epochs", "4", "--milestones", "1", "--lr_factors", "1e38", "--loss_type", "IB"]
    words = "the loss is not finite in epoch 2, batch 2:", "smaller --lr", "--alpha"
    fails([*args, "--start_ib_epoch", "2", "-p", "100"], tmp_path, *words, status=1)
    state = load_checkpoint(model_folder(tmp_path, "IB") / "ckpt.pth.tar")
    assert state["epoch"] == 1
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_outputs_that_are_not_finite_after_the_last_step_are_a_warning(tmp_path):
    args = [*DIGITS, *TINY, "-b", "512", "--epochs", "1", "--milestones", "--lr", "1e36"]  # one step, after its loss
    status, _, err = run_main(args, tmp_path)
    assert status == 0
    assert "warning: after epoch 1 the model has outputs that are not finite: its accuracy means nothing" in err


def test_an_epoch_with_such_outputs_is_never_the_best(tmp_path):
    """Logits of NaN count as class 0, which may be most of the test images."""
    evaluate, epochs = cifar_train.evaluate, []

    def broken(*args):
        epochs.append(evaluate(*args))
        return {**epochs[-1], "acc1": 99.0, "loss": math.nan} if len(epochs) == 2 else epochs[-1]

    with mock.patch.object(cifar_train, "evaluate", broken):
        run_ok([*DIGITS, *TINY, "--epochs", "3", "--milestones"], tmp_path)
    best = load_checkpoint(model_folder(tmp_path) / "ckpt.best.pth.tar")
    assert best["best_acc1"] == max(epochs[0]["acc1"], epochs[2]["acc1"])


def test_an_empty_variable_of_torchrun_is_none(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    run_ok(ARGS, tmp_path)
