"""Checkpoints: damage is noticed, nothing good is given up for a bad one, whenever a run is stopped."""

import argparse
import collections
import contextlib
import copy
import csv
import errno
import functools
import os
import pathlib
import random
import re
import resource
import signal
import stat
import zipfile
from unittest import mock

import numpy as np
import pytest
import torch
from script_runner import (
    DIGITS,
    TINY,
    assert_same_run,
    log_folder,
    messages,
    model_folder,
    read_csv,
    run_main,
    run_ok,
    scalars,
)
from tensorboardX.event_file_writer import EventsWriter

import cifar_train
import files
import models
from experiment import checkpoint, run
from training.optimizer import make_optimizer
from utils import DataError

THREE = [*DIGITS, *TINY, "--epochs", "3", "--milestones", "2", "--loss_type", "IB", "--start_ib_epoch", "1"]
THREE += ["--checkpoint_seconds", "0"]
STATE = {"epoch": 1, "arch": "tiny", "state_dict": {"weight": torch.arange(512.0), "bias": torch.zeros(3)}}


def damaged_versions(content, generator, number):
    """(what was done, damaged bytes): bits flipped, cut short, blocks lost, bytes added."""
    for count in range(number):
        kind = ("bit", "cut", "bit", "zeros", "bits", "cut", "added", "bit")[count % 8]
        place, copy = generator.randrange(len(content)), bytearray(content)
        if kind == "cut":
            copy = copy[:place]
        elif kind == "zeros":
            copy[place : place + 64] = bytes(len(copy[place : place + 64]))
        elif kind == "added":
            copy[place:place] = generator.randbytes(generator.randrange(1, 100))
        else:
            for _ in range(1 if kind == "bit" else 20):
                copy[generator.randrange(len(copy))] ^= 1 << generator.randrange(8)
        if copy != content:  # zeros over zeros
            yield f"{kind} at {place}", bytes(copy)


def same(one, two):
    """Whether two nested dicts have equal tensors and values."""
    if isinstance(one, dict):
        return isinstance(two, dict) and one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)
    return torch.equal(one, two) if torch.is_tensor(one) else one == two


def test_a_damaged_checkpoint_is_refused_or_holds_what_was_written(tmp_path):
    """torch.load alone does not notice a bit of a weight that has flipped."""
    path, refused = tmp_path / checkpoint.NEWEST, 0
    checkpoint.save(str(path), STATE)
    for what, content in damaged_versions(path.read_bytes(), random.Random(0), 200):
        path.write_bytes(content)
        try:
            assert same(checkpoint.load(str(path)), STATE), what
        except DataError:
            refused += 1
    assert refused > 120


@pytest.mark.parametrize("how", ["zip", "legacy", "sealed"])
def test_checkpoints_of_other_versions_are_read(how, tmp_path):
    path = tmp_path / "foreign.pth.tar"
    torch.save(STATE, path, _use_new_zipfile_serialization=how != "legacy")
    if how == "sealed":  # older ones of this repository end with their checksum, as the archive's comment
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = b"\nsha256 of all bytes before this line: " + b"0" * 64
    assert same(checkpoint.load(str(path)), STATE)


def test_a_copy_on_the_cpu_has_the_same_values_and_strides_and_training_does_not_reach_it():
    torch.manual_seed(0)
    model = models.resnet20(10).to(memory_format=torch.channels_last)
    optimizer = make_optimizer("sgd", model, 0.1, {"momentum": 0.9, "weight_decay": 2e-4})
    model(torch.randn(4, 3, 32, 32))[0].sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "memory": (np.zeros(2),)}
    copied, before = checkpoint.on_cpu(state), copy.deepcopy(state)
    with torch.no_grad():
        for tensor in [*state["model"].values(), *(s["momentum_buffer"] for s in state["optimizer"]["state"].values())]:
            tensor.add_(1)
    state["memory"][0][:] = 1
    assert copied["memory"][0].tolist() == [0, 0]
    for name, tensor in before["model"].items():
        assert torch.equal(copied["model"][name], tensor)
        assert copied["model"][name].stride() == tensor.stride()
    for index, entry in before["optimizer"]["state"].items():
        assert torch.equal(copied["optimizer"]["state"][index]["momentum_buffer"], entry["momentum_buffer"])


def test_a_file_is_written_beside_its_place_where_it_can_be_renamed(tmp_path):
    """A rename between file systems is a copy, which may be cut short. Others may read it."""
    seen, before = [], os.umask(0o022)
    try:
        files.write_atomically(tmp_path / "a.json", lambda file: seen.extend(os.listdir(tmp_path)))
    finally:
        os.umask(before)
    (name,) = seen
    assert re.fullmatch(r"\.a\.json\..+\.tmp", name)
    assert os.listdir(tmp_path) == ["a.json"]
    assert stat.S_IMODE(os.stat(tmp_path / "a.json").st_mode) == 0o644


# -------------------------------------------------------------------------------------- weights into a model


def model_of(classes):
    layers = {"body": torch.nn.Linear(3, 4), "bn": torch.nn.BatchNorm1d(4), "fc": torch.nn.Linear(4, classes)}
    return torch.nn.Sequential(collections.OrderedDict(layers))


@pytest.mark.parametrize(("classes", "taken"), [(2, ["body", "fc"]), (5, ["body"])])
def test_a_head_of_another_form_stays_as_the_model_has_it(classes, taken):
    own, source = model_of(2), model_of(classes).state_dict()
    before = copy.deepcopy(own.state_dict())
    checkpoint.load_weights(own, source, "PATH", new_head="fc")
    for name in ("body", "fc"):
        expected = (source if name in taken else before)[f"{name}.weight"]
        assert torch.equal(own.state_dict()[f"{name}.weight"], expected)


#: What others save, of the weights of a model.
FOREIGN = {
    "bare": lambda weights: weights,
    "torch.compile": lambda weights: {f"_orig_mod.{name}": w for name, w in weights.items()},
    "DataParallel of it": lambda weights: {"state_dict": {f"module._orig_mod.{n}": w for n, w in weights.items()}},
    "a part of a larger model": lambda weights: {"model_state_dict": {f"part.body.{n}": w for n, w in weights.items()}},
    "AveragedModel": lambda weights: {
        "n_averaged": torch.tensor(3),
        **{f"module.{n}": w for n, w in weights.items()},
    },
    "beside numpy's numbers": lambda weights: {
        "state_dict": weights, "best": np.float64(0.9), "epoch": np.int64(3), "counts": np.array([3, 2]), "day": "x",
    },
    "the average of a run with --ema": lambda weights: {
        "state_dict": {name: weight + 1 for name, weight in weights.items()},
        "ema": {"n_averaged": torch.tensor(3), **{f"module.{name}": weight for name, weight in weights.items()}},
    },
    "beside argparse's flags": lambda weights: {"state_dict": weights, "args": argparse.Namespace(lr=np.float32(0.1))},
}  # fmt: skip


@pytest.mark.parametrize("form", FOREIGN)
def test_weights_of_others_are_loaded(form, tmp_path):
    own, source = model_of(2), model_of(2).state_dict()
    torch.save(FOREIGN[form](source), tmp_path / "file.pth")
    assert checkpoint.load_weights(own, checkpoint.load_foreign(str(tmp_path / "file.pth")), "PATH") is False
    assert all(torch.equal(own.state_dict()[name], source[name]) for name in source)


def test_a_scalar_of_numpy_1_is_loaded(tmp_path):
    torch.save({"state_dict": model_of(2).state_dict(), "best": np.float64(0.9)}, tmp_path / "two.pth")
    with zipfile.ZipFile(tmp_path / "two.pth") as two, zipfile.ZipFile(tmp_path / "one.pth", "w") as one:
        for name in two.namelist():
            one.writestr(name, two.read(name).replace(b"numpy._core", b"numpy.core"))
    assert "fc.bias" in checkpoint.load_foreign(str(tmp_path / "one.pth"))


@pytest.mark.parametrize(
    ("content", "words"),
    [({"state_dict": {}, "args": argparse.Namespace(out=pathlib.Path("x"))}, "a pathlib."), ([1], "holds no weights")],
)
def test_what_holds_no_weights_or_may_run_code_is_refused(content, words, tmp_path):
    torch.save(content, tmp_path / "file.pth")
    with pytest.raises(DataError, match=words):
        checkpoint.load_foreign(str(tmp_path / "file.pth"))
    with pytest.raises(DataError):
        checkpoint.load(str(tmp_path / "file.pth"))


def test_ldams_head_is_known_by_its_missing_bias():
    for build in (models.resnet20, functools.partial(models.torchvision_model, "mobilenet_v3_small")):
        for use_norm in (False, True):
            weights = build(3, use_norm=use_norm).state_dict()
            assert checkpoint.has_normalised_head({f"module.{k}": v for k, v in weights.items()}) is use_norm


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_that_do_not_fit_are_named(prefix):
    source = {prefix + name: tensor for name, tensor in model_of(5).state_dict().items()}
    with pytest.raises(DataError, match=r"fc\.weight"):
        checkpoint.load_weights(model_of(2), source, "PATH")
    with pytest.raises(DataError, match=r"fc\.bias.*LDAM"):
        checkpoint.load_weights(model_of(5), {k: v for k, v in source.items() if k != prefix + "fc.bias"}, "PATH")
    with pytest.raises(DataError, match="more"):
        checkpoint.load_weights(model_of(5), {**source, prefix + "more": torch.zeros(1)}, "PATH")
    checkpoint.load_weights(model_of(5), source, "PATH")


# ------------------------------------------------------------------------- disks that are full or broken, signals


def test_a_file_that_may_not_grow_is_named_and_spares_the_last_one(tmp_path):
    """The kernel itself refuses to write on: a limit on the size of files."""
    path, limits = tmp_path / "ckpt.pth.tar", resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoint.save(str(path), STATE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large") as raised:
            checkpoint.save(str(path), {**STATE, "epoch": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(path)
    assert os.listdir(tmp_path) == ["ckpt.pth.tar"]
    assert checkpoint.load(str(path))["epoch"] == 1


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of three epochs that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    run_ok(THREE, folder)
    return folder


def failing(function, number, folder):
    """That call fails while the checkpoint of the second epoch is written."""
    save = checkpoint.save

    def save_on_a_bad_disk(path, state):
        patch = mock.patch(function, side_effect=OSError(number, os.strerror(number)))
        with patch if state["epoch"] == 2 else contextlib.nullcontext():
            save(path, state)

    return mock.patch.object(checkpoint, "save", save_on_a_bad_disk)


def signalled(owner, name, number, folder):
    """A signal comes in the second call of that function."""
    real, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    return mock.patch.object(owner, name, interrupted)


def full_disk_for_events(folder):
    """From the second epoch on: tensorboardX's own thread would die, and the process never end."""
    real = EventsWriter.write_event

    def write_event(writer, *args):
        if len(read_csv(log_folder(folder, "IB") / "log_train.csv")) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(writer, *args)

    return mock.patch.object(EventsWriter, "write_event", write_event)


def full_disk_for_csv(folder):
    """The kernel refuses to write on: the second epoch's row goes to /dev/full."""
    path, writer = log_folder(folder, "IB") / "log_test.csv", csv.writer

    def on_a_full_disk(file, **how):
        rows = read_csv(path) if path.exists() and path.resolve() == path else []
        if len(rows) == 1:
            path.unlink()
            path.symlink_to("/dev/full")
        return writer(file, **how)

    return mock.patch("experiment.records.csv.writer", on_a_full_disk)


FULL, STOPPED = f"log/{log_folder('', 'IB').name}: No space left on device", "the same command continues"
#: What happens in the second epoch, its arguments but for the folder of the run; the status, and words of the line.
FAULTS = {
    "fsync": (failing, ("os.fsync", errno.ENOSPC), 1, "No space left on device"),
    "rename": (failing, ("os.replace", errno.EIO), 1, "Input/output error"),
    "event files": (full_disk_for_events, (), 1, FULL),
    "CSV files": (full_disk_for_csv, (), 1, FULL),
    "SIGTERM in a write": (signalled, (torch, "save", signal.SIGTERM), 143, STOPPED),
    "SIGTERM in an evaluation": (signalled, (cifar_train, "evaluate", signal.SIGTERM), 143, STOPPED),
    "SIGTERM in the records": (signalled, (run.Records, "add", signal.SIGTERM), 143, STOPPED),
    "SIGHUP in an evaluation": (signalled, (cifar_train, "evaluate", signal.SIGHUP), 129, STOPPED),
}


@pytest.mark.parametrize(("fault", "of", "expected", "words"), FAULTS.values(), ids=FAULTS)
def test_a_fault_in_the_second_epoch_spares_the_first_and_costs_no_bit(fault, of, expected, words, whole, tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    with fault(*of, tmp_path):
        status, _, err = run_main(THREE, tmp_path)
    signal.signal(signal.SIGHUP, before)
    (line,) = messages(err)
    assert (status, words in line) == (expected, True), err
    model, log = model_folder(tmp_path, "IB"), log_folder(tmp_path, "IB")
    assert checkpoint.load(str(model / "ckpt.pth.tar"))["epoch"] == 1
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith((".tmp", ".lock"))]
    run_ok([*THREE, "--resume", "auto"], tmp_path)
    assert_same_run(model, model_folder(whole, "IB"))
    assert scalars(log) == scalars(log_folder(whole, "IB"))
