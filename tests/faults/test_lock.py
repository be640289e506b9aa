"""One run, one writer."""

import errno
import multiprocessing
import os
import threading
from unittest import mock

import pytest
from script_runner import DIGITS, TINY, log_folder, model_folder, refused, run_ok

import files
from files import LOCK, OWNER, folder_lock, run_lock
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
        theirs.close()  # so that the end of a process ends a wait for it
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


def test_a_second_process_is_refused_with_the_first_ones_id_and_host(holder, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock.__wrapped__, "__kwdefaults__", {"patience": 0.0})
    model = model_folder(tmp_path)
    first, pipe = start_holding(holder, model)
    who = f"process {first.pid} on {os.uname().nodename}, since 20"
    refused(ONE, tmp_path, f"checkpoint/{model.name} is in use by {who}", status=1)
    assert "\ntop-1" not in run_ok([*ONE, "--dry_run"], tmp_path), "a dry run does not ask"
    end(first, pipe)
    assert list(tmp_path.iterdir()) == [], "what was made for nothing is removed"
    run_ok(ONE, tmp_path)
    start_holding(holder, model, log_folder(tmp_path))
    assert "\ntop-1 " in run_ok([*ONE, "-e", "--resume", "auto"], tmp_path), "nor does an evaluation"


def test_the_lock_of_a_killed_process_is_taken_over(holder, tmp_path):
    killed, _ = start_holding(holder, model_folder(tmp_path))
    killed.kill()
    killed.join()
    assert (model_folder(tmp_path) / OWNER).read_text().startswith(f"process {killed.pid} on ")
    run_ok(ONE, tmp_path)
    assert not {LOCK, OWNER} & {path.name for path in tmp_path.rglob("*")}


def test_a_run_waits_for_one_that_is_about_to_end(holder, tmp_path):
    """As a driver's child does, which may outlive it for a moment."""
    first = start_holding(holder, tmp_path)
    threading.Timer(0.2, end, first).start()
    with run_lock(str(tmp_path)):
        assert (tmp_path / OWNER).read_text().startswith(f"process {os.getpid()} on ")


def test_of_many_started_at_once_one_gets_it(holder, tmp_path):
    folder = tmp_path / "not" / "there" / "yet"
    processes = [holder(folder) for _ in range(8)]
    said = [pipe.recv() for _, pipe in processes]
    assert sorted(said) == ["held", *["refused"] * 7]
    end(*processes[said.index("held")])


def test_one_folder_for_logs_and_checkpoints(tmp_path):
    run_ok([*ONE, "--root_log", "same", "--root_model", "./same"], tmp_path)
    assert not list(tmp_path.rglob(LOCK))


def test_a_folder_of_data_that_is_read_only_is_read_without_a_lock(tmp_path):
    error = OSError(errno.EROFS, os.strerror(errno.EROFS))
    with mock.patch.object(files.FileLock, "acquire", side_effect=error):
        with folder_lock(tmp_path):
            pass
        with pytest.raises(OSError, match="Read-only"), run_lock(str(tmp_path)):
            pass


def test_one_process_at_a_time_has_a_folder_of_data(holder, tmp_path):
    with folder_lock(tmp_path):
        _, pipe = holder(tmp_path)  # the same lock
        assert pipe.recv() == "refused"
    assert list(tmp_path.iterdir()) == []
    start_holding(holder, tmp_path)
