"""One run, one writer."""

import json
import multiprocessing
import os
import time
from unittest import mock

import pytest
from script_runner import DIGITS, TINY, log_folder, messages, model_folder, run_main, run_ok

import files
from files import LOCK, run_lock
from utils import DataError

ONE = [*DIGITS, *TINY, "--epochs", "1", "--milestones"]


def hold(paths, pipe):
    """Take the folders, say so, and hold them until the other end of the pipe speaks."""
    try:
        with run_lock(*paths, patience=0):
            pipe.send("held")
            pipe.recv()
    except DataError:
        pipe.send("refused")


@pytest.fixture
def holder():
    """A function that starts a process which holds the folders given; all are killed at the end.

    It returns (process, pipe).
    """
    started, context = [], multiprocessing.get_context("fork")

    def start(*paths):
        ours, theirs = context.Pipe()
        process = context.Process(target=hold, args=([str(path) for path in paths], theirs))
        process.start()
        started.append(process)
        return process, ours

    yield start
    for process in started:
        process.kill()
        process.join()


def start_holding(holder, *paths):
    process, pipe = holder(*paths)
    assert pipe.recv() == "held"
    return process, pipe


def end(process, pipe):
    pipe.send("enough")
    process.join()


def test_a_second_process_is_refused_with_the_first_ones_id_and_host(holder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run_lock.__wrapped__, "__kwdefaults__", {"patience": 0.0})
    model = model_folder(tmp_path)
    first, pipe = start_holding(holder, model)
    status, out, err = run_main(ONE, tmp_path, capsys)
    assert status == 1
    (line,) = messages(err)
    assert f"checkpoint/{model.name} is in use by process {first.pid} on {os.uname().nodename}, since 20" in line
    assert out == ""
    assert not log_folder(tmp_path).exists(), "the refused run left something"
    end(first, pipe)
    assert not (model / LOCK).exists()
    run_ok(ONE, tmp_path, capsys)


def test_neither_a_dry_run_nor_an_evaluation_asks(holder, tmp_path, capsys):
    run_ok(ONE, tmp_path, capsys)
    start_holding(holder, model_folder(tmp_path), log_folder(tmp_path))
    assert run_ok([*ONE, "--dry_run"], tmp_path, capsys).startswith("epoch_from_0,lr")
    assert "\ntop-1 " in run_ok([*ONE, "-e", "--resume", "auto"], tmp_path, capsys)


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path, capsys):
    killed, _ = start_holding(holder, model_folder(tmp_path))
    killed.kill()
    killed.join()
    left = json.loads((model_folder(tmp_path) / LOCK).read_text())
    assert left["pid"] == killed.pid
    out = run_ok(ONE, tmp_path, capsys)
    assert f"took over the lock that process {killed.pid} on {os.uname().nodename}" in out
    assert not (model_folder(tmp_path) / LOCK).exists()


def test_a_run_waits_for_one_that_is_about_to_end(holder, tmp_path):
    first = start_holding(holder, tmp_path)
    ended = []

    def end_it(seconds):
        if not ended:
            end(*first)
            ended.append(seconds)

    with mock.patch.object(time, "sleep", end_it), run_lock(str(tmp_path)):
        assert ended
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()


def test_of_many_started_at_once_one_gets_it(holder, tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    processes = [holder(folder) for _ in range(8)]
    said = [pipe.recv() for _, pipe in processes]
    assert sorted(said) == ["held", *["refused"] * 7]
    end(*processes[said.index("held")])
    assert not (tmp_path / "not").exists(), "what was made for nothing is removed"


def test_a_lock_removed_by_its_holder_while_one_waits_is_not_enough(tmp_path):
    """Of two that wait, one must not hold the file that is gone, and the other one the new file."""
    real = files.fcntl.flock
    removed = []

    def remove_after_lock(file, how):
        real(file, how)
        if not removed:
            (tmp_path / LOCK).unlink()
            removed.append(file)

    with mock.patch.object(files.fcntl, "flock", remove_after_lock), run_lock(str(tmp_path)):
        assert (tmp_path / LOCK).exists()
        with pytest.raises(DataError, match="is in use by process"), run_lock(str(tmp_path), patience=0):
            pass


def test_one_folder_for_logs_and_checkpoints(tmp_path, capsys):
    run_ok([*ONE, "--root_log", "same", "--root_model", "./same"], tmp_path, capsys)
    assert not list(tmp_path.rglob(LOCK))


def test_a_file_system_without_locks_is_said(tmp_path, capsys):
    with (
        mock.patch.object(files.fcntl, "flock", side_effect=OSError(37, "No locks available")),
        run_lock(str(tmp_path)),
    ):
        pass
    assert "cannot be locked (No locks available)" in capsys.readouterr().err


def test_an_unreadable_lock_file_is_no_owner(tmp_path, capsys):
    (tmp_path / LOCK).write_text("\x1b[31m{")
    with run_lock(str(tmp_path)):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert capsys.readouterr().out == ""
