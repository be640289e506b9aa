"""Checkpoints: damage is noticed wherever it is, the one before is taken, nothing good is given up for a bad one."""

import collections
import contextlib
import copy
import errno
import os
import random
import re
import signal
import stat
import subprocess
import sys
import zipfile
from unittest import mock

import pytest
import torch
from script_runner import (
    DIGITS,
    REPOSITORY,
    TINY,
    assert_same_weights,
    environment,
    load_checkpoint,
    log_folder,
    messages,
    model_folder,
    read_logs,
    run_main,
    run_ok,
    snapshot,
)

from experiment import checkpoint, fit, run
from utils import DataError

THREE = [*DIGITS, *TINY, "--epochs", "3", "--milestones", "2", "--loss_type", "IB", "--start_ib_epoch", "1"]
STATE = {"epoch": 1, "arch": "tiny", "state_dict": {"weight": torch.arange(512.0), "bias": torch.zeros(3)}}


def sealed(folder, state=None):
    checkpoint.save(str(folder), [checkpoint.NEWEST], STATE if state is None else state)
    return folder / checkpoint.NEWEST


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


def unnoticed(path, versions):
    """What was done to those damaged versions that load."""
    found = []
    for what, content in versions:
        path.write_bytes(content)
        with contextlib.suppress(DataError):
            checkpoint.load(str(path))
            found.append(what)
    return found


def test_200_damaged_checkpoints_are_noticed(tmp_path):
    path = sealed(tmp_path)
    assert not unnoticed(path, damaged_versions(path.read_bytes(), random.Random(0), 200))


def test_every_length_and_every_bit_of_the_end_is_noticed(tmp_path):
    path = sealed(tmp_path)
    content = path.read_bytes()
    cuts = ((f"cut to {n}", content[:n]) for n in range(len(content) - 300, len(content)))
    assert not unnoticed(path, cuts)

    def flips():
        for place in range(len(content) - 130, len(content)):
            for bit in range(8):
                flipped = bytes([content[place] ^ 1 << bit])
                yield f"bit {bit} of byte {place}", content[:place] + flipped + content[place + 1 :]

    assert not unnoticed(path, flips())


def test_other_readers_read_it(tmp_path):
    path = sealed(tmp_path)
    state = torch.load(path, weights_only=True)
    assert torch.equal(state["state_dict"]["weight"], STATE["state_dict"]["weight"])
    mapped = torch.load(path, weights_only=True, mmap=True)
    assert torch.equal(mapped["state_dict"]["weight"], STATE["state_dict"]["weight"])
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        # the very last bytes, of the length that the archive's last record says
        assert path.read_bytes().endswith(archive.comment)
        assert re.fullmatch(rb"\nsha256 of all bytes before this line: [0-9a-f]{64}", archive.comment)


@pytest.mark.parametrize("how", ["zip", "legacy", "edited"])
def test_files_without_a_checksum_are_read(how, tmp_path):
    path = tmp_path / "foreign.pth.tar"
    state = torch.load(sealed(tmp_path), weights_only=True) if how == "edited" else STATE
    torch.save(state, path, _use_new_zipfile_serialization=how != "legacy")
    assert checkpoint.load(str(path))["epoch"] == 1


def test_a_copy_has_the_same_bytes_and_a_damaged_file_is_not_read(tmp_path):
    path, copy = sealed(tmp_path), tmp_path / "copy.pth.tar"
    content, state = checkpoint.read(str(path))
    checkpoint.write(str(copy), content)
    assert copy.read_bytes() == path.read_bytes()
    assert state["epoch"] == 1
    damaged = bytearray(content)
    damaged[len(content) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(DataError, match="checksum"):
        checkpoint.read(str(path))


def test_a_file_is_written_beside_its_place_where_it_can_be_renamed(tmp_path):
    """A rename between file systems is a copy, which may be cut short."""
    seen = []
    checkpoint.write_atomically(tmp_path / "a.json", lambda file: seen.extend(os.listdir(tmp_path)))
    (name,) = seen
    assert re.fullmatch(r"\.a\.json\..+\.tmp", name)
    assert os.listdir(tmp_path) == ["a.json"]
    assert stat.S_IMODE(os.stat(tmp_path / "a.json").st_mode) == 0o644  # others may read it; mkstemp's may not


def test_what_cannot_be_read_back_replaces_nothing(tmp_path):
    sealed(tmp_path)
    before = snapshot(tmp_path)
    read = checkpoint._read
    with (
        mock.patch.object(checkpoint, "_read", lambda path: read(path)[:-1]),
        pytest.raises(DataError, match="read back"),
    ):
        sealed(tmp_path, {**STATE, "epoch": 2})
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "names", [[checkpoint.NEWEST], [checkpoint.PREVIOUS], [checkpoint.NEWEST, checkpoint.PREVIOUS]]
)
def test_a_folder_with_the_newest_or_the_one_before_can_be_continued_from(names, tmp_path):
    assert not checkpoint.exists(tmp_path)
    (tmp_path / checkpoint.BEST).touch()
    assert not checkpoint.exists(tmp_path)
    for name in names:
        (tmp_path / name).touch()
    assert checkpoint.exists(tmp_path)


def test_the_one_before_is_kept_and_no_more(tmp_path):
    for epoch in range(1, 5):
        sealed(tmp_path, {**STATE, "epoch": epoch})
    assert sorted(os.listdir(tmp_path)) == ["ckpt.previous.pth.tar", "ckpt.pth.tar"]
    assert [load_checkpoint(tmp_path / name)["epoch"] for name in sorted(os.listdir(tmp_path))] == [3, 4]


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


def test_weights_without_batch_norms_counter_are_taken_for_a_new_head_only():
    own, source = model_of(2), model_of(2).state_dict()
    own.bn.num_batches_tracked.fill_(7)
    del source["bn.num_batches_tracked"]
    with pytest.raises(DataError, match=r"PATH does not fit this model: the checkpoint lacks bn\.num_batches_tracked"):
        checkpoint.load_weights(own, source, "PATH")
    checkpoint.load_weights(own, source, "PATH", new_head="fc")
    assert torch.equal(own.body.weight, source["body.weight"])
    assert own.bn.num_batches_tracked == 7


def test_bare_weights_are_taken_only_where_they_are_asked_for(tmp_path):
    torch.save(model_of(2).state_dict(), tmp_path / "bare.pth")
    with pytest.raises(DataError, match="it has no 'state_dict'"):
        checkpoint.load(tmp_path / "bare.pth")
    assert list(checkpoint.load(tmp_path / "bare.pth", bare=True)) == ["state_dict"]


def test_ldams_head_is_known_by_its_missing_bias():
    assert checkpoint.has_normalised_head({"linear.weight": 0, "conv.bias": 0}) is True
    for name in ("linear.bias", "fc.bias", "module.linear.bias"):
        assert checkpoint.has_normalised_head({"linear.weight": 0, name: 0}) is False


@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_that_do_not_fit_are_named(prefix):
    source = {prefix + name: tensor for name, tensor in model_of(5).state_dict().items()}
    with pytest.raises(DataError, match=re.escape("fc.weight has shape (5, 4) there, (2, 4) here")):
        checkpoint.load_weights(model_of(2), source, "PATH")
    with pytest.raises(DataError, match=re.escape("the checkpoint lacks fc.bias (one of the two has LDAM's")):
        checkpoint.load_weights(model_of(5), {k: v for k, v in source.items() if k != prefix + "fc.bias"}, "PATH")
    with pytest.raises(DataError, match=r"the model lacks more$"):
        checkpoint.load_weights(model_of(5), {**source, prefix + "more": torch.zeros(1)}, "PATH")
    checkpoint.load_weights(model_of(5), source, "PATH")


# ---------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of three epochs that nothing happened to; made once, by whoever asks first."""
    folder = tmp_path_factory.mktemp("whole")

    def get(capsys):
        if not (folder / "log").exists():
            run_ok(THREE, folder, capsys)
        return folder

    return get


def damage(path, how):
    if how == "gone":  # as a kill between two renames leaves it
        path.unlink()
    elif how == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 4
        path.write_bytes(content)


@pytest.mark.parametrize("how", ["cut", "flipped", "gone"])
@pytest.mark.parametrize("after", [2, 3])
def test_resume_auto_takes_the_one_before_and_ends_in_the_same_bits(after, how, whole, tmp_path, capsys):
    real = fit.train_one_epoch

    def stop_after(model, batches, *rest):
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(1)
        return real(model, batches, *rest)

    calls = []
    with mock.patch.object(fit, "train_one_epoch", stop_after):
        run_main(THREE, tmp_path, capsys)
    newest = model_folder(tmp_path, "IB") / "ckpt.pth.tar"
    assert load_checkpoint(newest)["epoch"] == after
    damage(newest, how)
    status, out, err = run_main([*THREE, "--resume", "auto"], tmp_path, capsys)
    assert status == 0
    (warning,) = [line for line in err.splitlines() if "ckpt" in line]
    assert ("ckpt.pth.tar is damaged" in warning) == (how != "gone")
    previous = newest.with_name("ckpt.previous.pth.tar").relative_to(tmp_path)
    assert f"continuing from the previous one, {previous}, after {after - 1} epochs" in warning
    assert f"after {after - 1} epochs" in out
    for name in ("ckpt.pth.tar", "ckpt.best.pth.tar", "ckpt.previous.pth.tar"):
        assert_same_weights(newest.with_name(name), model_folder(whole(capsys), "IB") / name)
    assert read_logs(log_folder(tmp_path, "IB")) == read_logs(log_folder(whole(capsys), "IB"))


def test_evaluating_the_newest_takes_the_one_before_and_says_so(tmp_path, capsys):
    run_ok(THREE, tmp_path, capsys)
    damage(model_folder(tmp_path, "IB") / "ckpt.pth.tar", "flipped")
    status, _, err = run_main([*THREE, "-e", "--resume", "auto"], tmp_path, capsys)
    assert status == 0
    assert "continuing from the previous one" in err
    written = (log_folder(tmp_path, "IB") / "evaluate" / "evaluation.json").read_text()
    assert '"epoch": 2' in written
    assert "ckpt.previous.pth.tar" in written
    named = model_folder(tmp_path, "IB").relative_to(tmp_path) / "ckpt.pth.tar"
    status, _, err = run_main([*THREE, "-e", "--resume", named], tmp_path, capsys)
    assert status == 1, "a file that is named is that file"
    assert "damaged" in err


# --------------------------------------------------------------------------------- disks that are full or broken


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("function", ["os.fsync", "tempfile.mkstemp", "os.replace"])
def test_a_write_that_fails_spares_the_last_good_checkpoint(function, number, whole, tmp_path, capsys):
    """The call fails while the checkpoint of the second epoch is written."""
    save = checkpoint.save

    def save_on_a_bad_disk(folder, names, state):
        failing = mock.patch(function, side_effect=OSError(number, os.strerror(number)))
        with failing if state["epoch"] == 2 else contextlib.nullcontext():
            save(folder, names, state)

    with mock.patch.object(checkpoint, "save", save_on_a_bad_disk):
        status, _, err = run_main(THREE, tmp_path, capsys)
    assert status == 1
    (line,) = messages(err)
    assert os.strerror(number) in line
    model = model_folder(tmp_path, "IB")
    assert checkpoint.load_newest(str(model))[1]["epoch"] == 1
    assert not [name for name in os.listdir(model) if name.endswith(".tmp") or name == ".lock"]
    run_ok([*THREE, "--resume", "auto"], tmp_path, capsys)
    assert_same_weights(model / "ckpt.pth.tar", model_folder(whole(capsys), "IB") / "ckpt.pth.tar")
    assert read_logs(log_folder(tmp_path, "IB")) == read_logs(log_folder(whole(capsys), "IB"))


LIMITED = """
import resource, sys
import torch
from experiment import checkpoint
from utils import command
state = lambda epoch: {"epoch": epoch, "arch": "x", "state_dict": {"w": torch.zeros(100_000)}}
@command
def main(argv=None):
    checkpoint.save(argv[0], ["ckpt.pth.tar"], state(1))
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
    checkpoint.save(argv[0], ["ckpt.pth.tar"], state(2))
main(sys.argv[1:])
"""


def test_a_file_that_may_not_grow_is_one_line_and_spares_the_last_one(tmp_path):
    """The kernel itself refuses to write on: a limit on the size of files."""
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith(f"error: {tmp_path}/ckpt.pth.tar: File too large")
    assert len(done.stderr.splitlines()) == 1
    assert os.listdir(tmp_path) == ["ckpt.pth.tar"]
    assert checkpoint.load(str(tmp_path / "ckpt.pth.tar"))["epoch"] == 1


# ------------------------------------------------------------------------------------------------- SIGTERM


@pytest.mark.parametrize("at", ["write", "evaluate", "records"])
def test_sigterm_at_a_bad_moment_leaves_a_good_checkpoint(at, whole, tmp_path, capsys):
    """The signal comes in the second epoch, while that function runs; what is being written is written to its end."""
    place = {
        "write": (torch, "save"),
        "evaluate": (fit, "evaluate"),
        "records": (run.Records, "add"),
    }[at]
    real, calls = getattr(*place), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with mock.patch.object(*place, interrupted):
        status, _, err = run_main(THREE, tmp_path, capsys)
    assert status == 143
    (line,) = messages(err)
    assert "--resume auto to continue" in line
    model = model_folder(tmp_path, "IB")
    assert checkpoint.load(str(model / "ckpt.pth.tar"))["epoch"] == (1 if at == "evaluate" else 2)
    assert not (model / ".lock").exists()
    run_ok([*THREE, "--resume", "auto"], tmp_path, capsys)
    assert_same_weights(model / "ckpt.pth.tar", model_folder(whole(capsys), "IB") / "ckpt.pth.tar")
    assert read_logs(log_folder(tmp_path, "IB")) == read_logs(log_folder(whole(capsys), "IB"))
