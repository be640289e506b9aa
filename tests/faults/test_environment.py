"""What surrounds a run: Jupyter's matplotlib, encodings, outputs that are closed or full, a full disk for the logs."""

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from image_runs import RUN, make_folder
from script_runner import (
    FOUR,
    REPOSITORY,
    TINY,
    TWO_EPOCHS,
    assert_same_weights,
    environment,
    load_checkpoint,
    log_folder,
    messages,
    model_folder,
    read_csv,
    read_logs,
    run_main,
    run_ok,
    run_process,
    scalars,
)
from tensorboardX.event_file_writer import EventsWriter

from utils import code_version, warn

#: cifar_train.py with the model 'tiny' beside the published ones.
DRIVER = REPOSITORY / "tests" / "helpers" / "distributed_run.py"
RUN_OF_TWO = [*TWO_EPOCHS, *TINY, "-p", "1"]
FIGURES = {"class_accuracy.png", "confusion.png", "curves.png"}


def check_finished(cwd, **where):
    """Two epochs in the logs and the checkpoint, and the figures."""
    log = log_folder(cwd, **where)
    assert [row["epoch_from_0"] for row in read_csv(log / "log_test.csv")] == ["0", "1"]
    assert {path.name for path in log.iterdir()} >= FIGURES
    assert load_checkpoint(model_folder(cwd, **where) / "ckpt.pth.tar")["epoch"] == 2


def test_the_backend_that_a_jupyter_cell_exports(tmp_path):
    done = run_process(RUN_OF_TWO, tmp_path, DRIVER, MPLBACKEND="module://matplotlib_inline.backend_inline")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    check_finished(tmp_path)


def test_compile_without_a_compiler_is_one_line(tmp_path):
    missing = {"CXX": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = run_process([*RUN_OF_TWO, "--compile"], tmp_path, DRIVER, **missing)
    assert done.returncode == 2
    (line,) = messages(done.stderr)
    assert "--compile needs a working compiler" in line


# ---------------------------------------------------------------------------------------------- encodings


def test_an_output_in_ascii_and_a_name_that_is_not(tmp_path):
    done = run_process([*RUN_OF_TWO, "--exp_str", "é"], tmp_path, DRIVER, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "run digits_tiny_CE_None_exp_0.01_\\xe9, seed 0" in done.stdout
    check_finished(tmp_path, exp="é")


def test_classes_that_neither_ascii_nor_utf8_can_say(tmp_path):
    names = ["chat é", "猫", os.fsdecode(b"caf\xe9")]
    make_folder(tmp_path / "images", names=names)
    args = ["--data_dir", "images", *RUN, "--epochs", "1", "--milestones", "--lr", "0.001"]
    done = run_process(args, tmp_path, REPOSITORY / "folder_train.py", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    lines = [line.rsplit(None, 3)[0] for line in done.stdout.splitlines() if line.startswith(("chat", "\\u", "caf"))]
    assert lines == ["caf\\udce9", "chat \\xe9", "\\u732b"]
    (log,) = (tmp_path / "log").iterdir()
    header = (log / "class_accuracy.csv").read_bytes().splitlines()[0]
    assert header == b"epoch_from_0,caf\xe9," + "chat é,猫".encode()
    assert json.loads((log / "summary.json").read_text())["classes"] == [names[2], names[0], names[1]]
    tags = {"class_accuracy/chat_é", "class_accuracy/猫", "class_accuracy/caf_"}  # tensorboardX's underscores
    assert tags <= scalars(log).keys()
    assert {path.name for path in log.iterdir()} >= FIGURES
    again = run_process(args, tmp_path, REPOSITORY / "folder_train.py", PYTHONIOENCODING="ascii")
    assert (again.returncode, again.stderr) == (0, "")
    assert "nothing to do" in again.stdout


# ------------------------------------------------------------------------------- outputs closed, gone, full


@pytest.mark.parametrize("closed", [">&-", "2>&-", "<&- >&- 2>&-"])
def test_outputs_that_are_closed(closed, tmp_path):
    command = ["bash", "-c", f'exec "$@" {closed}', "bash", sys.executable, DRIVER, *RUN_OF_TWO]
    done = subprocess.run([*map(str, command)], cwd=tmp_path, env=environment(), capture_output=True, timeout=240)
    assert done.returncode == 0
    assert done.stderr == b""
    assert (b"epoch 2/2 done" in done.stdout) == (closed == "2>&-")
    check_finished(tmp_path)


def read_until(args, cwd, line_start):
    """Run the driver, read its output until a line begins so, and close it: (exit status, standard error)."""
    command = [*map(str, [sys.executable, DRIVER, *args])]
    with subprocess.Popen(
        command, cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stdout:
            if line.startswith(line_start):
                break
        process.stdout.close()
        err = process.stderr.read()
    return process.returncode, err


def test_a_reader_that_has_gone_ends_the_run_as_it_ends_git_log(tmp_path):
    args = [*RUN_OF_TWO, "--epochs", "30"]
    assert read_until(args, tmp_path, "epoch 2/30  batch 1/") == (141, "")
    model = model_folder(tmp_path)
    assert load_checkpoint(model / "ckpt.pth.tar")["epoch"] >= 1
    assert sorted(path.name for path in model.iterdir() if path.name.startswith(".")) == []
    done = run_process([*args, "--resume", "auto"], tmp_path, DRIVER)
    assert done.returncode == 0, done.stderr
    whole = tmp_path / "whole"
    whole.mkdir()
    assert run_process(args, whole, DRIVER).returncode == 0
    assert_same_weights(model / "ckpt.pth.tar", model_folder(whole) / "ckpt.pth.tar")
    assert read_logs(log_folder(tmp_path)) == read_logs(log_folder(whole))


def test_a_reader_that_has_gone_before_an_evaluation_prints(tmp_path, capsys):
    run_ok([*TWO_EPOCHS, *TINY], tmp_path, capsys)
    reading, writing = os.pipe()
    os.close(reading)
    args = ["-e", "--resume", model_folder(tmp_path) / "ckpt.pth.tar", "--threads", "1"]
    with os.fdopen(writing, "w") as output:
        done = subprocess.run(
            [*map(str, [sys.executable, DRIVER, *args])], cwd=tmp_path, env=environment(), stdout=output,
            stderr=subprocess.PIPE, text=True, timeout=240,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")


def test_an_output_that_is_full_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*map(str, [sys.executable, DRIVER, *RUN_OF_TWO])], cwd=tmp_path, env=environment(), stdout=full,
            stderr=subprocess.PIPE, text=True, timeout=240,
        )  # fmt: skip
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "No space left on device" in line


# ------------------------------------------------------------------------------------ a full disk for the logs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run of four epochs that nothing happened to; made once, by whoever asks first."""
    folder = tmp_path_factory.mktemp("whole")

    def get(capsys):
        if not (folder / "log").exists():
            run_ok(FOUR, folder, capsys)
        return folder

    return get


def check_stopped_by_a_full_disk(status, err, cwd, reference, capsys):
    """Status 1, one line with the folder, a whole checkpoint; resumed, it is the run that nothing happened to."""
    assert status == 1
    (line,) = messages(err)
    log, newest = log_folder(cwd, "IB"), model_folder(cwd, "IB") / "ckpt.pth.tar"
    assert f"log/{log.name}: No space left on device" in line
    assert load_checkpoint(newest)["epoch"] == 1
    run_ok([*FOUR, "--resume", "auto"], cwd, capsys)
    assert_same_weights(newest, model_folder(reference, "IB") / "ckpt.pth.tar")
    assert read_logs(log) == read_logs(log_folder(reference, "IB"))
    assert scalars(log) == scalars(log_folder(reference, "IB"))


@pytest.mark.parametrize("function", ["write_event", "flush"])
def test_event_files_on_a_full_disk(function, whole, tmp_path, capsys):
    """The disk is full from the second epoch on: tensorboardX's own thread would die, and the process never end."""
    real = getattr(EventsWriter, function)

    def on_a_full_disk(writer, *args):
        if len(read_csv(log_folder(tmp_path, "IB") / "log_train.csv")) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(writer, *args)

    with mock.patch.object(EventsWriter, function, on_a_full_disk):
        status, _, err = run_main(FOUR, tmp_path, capsys)
    check_stopped_by_a_full_disk(status, err, tmp_path, whole(capsys), capsys)


def test_csv_files_on_a_full_disk(whole, tmp_path, capsys):
    """The kernel refuses to write on: the second epoch's row goes to /dev/full."""
    path, writer = log_folder(tmp_path, "IB") / "log_test.csv", csv.writer

    def on_a_full_disk(file, **how):
        rows = read_csv(path) if path.exists() and path.resolve() == path else []
        if len(rows) == 1:
            path.unlink()
            path.symlink_to("/dev/full")
        return writer(file, **how)

    with mock.patch("experiment.records.csv.writer", on_a_full_disk):
        status, _, err = run_main(FOUR, tmp_path, capsys)
    assert Path(path).is_symlink()
    check_stopped_by_a_full_disk(status, err, tmp_path, whole(capsys), capsys)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_standard_output_on_a_full_disk_is_named():
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "reproduce.py", "list"], cwd=REPOSITORY, stdout=full, stderr=subprocess.PIPE, text=True
        )
    line = "reproduce.py: error: standard output, or an open file: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, line)


def test_in_a_git_hook_the_commit_is_still_that_of_this_checkout(tmp_path, monkeypatch):
    expected = code_version()
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    assert code_version() == expected


def test_a_rank_alone_is_no_job_and_is_warned(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    warn("seen")
    monkeypatch.setenv("WORLD_SIZE", "2")
    warn("said by rank 0")
    assert capsys.readouterr().err == "warning: seen\n"


def test_files_have_the_permissions_that_the_user_gives(tmp_path):
    code = "import sys; from files import write_text; write_text(sys.argv[1], 'text')"
    for umask, mode in ((0o077, 0o600), (0o022, 0o644)):
        path = tmp_path / f"{umask}"
        subprocess.run([sys.executable, "-c", code, path], cwd=REPOSITORY, check=True, umask=umask)
        assert path.stat().st_mode & 0o777 == mode
