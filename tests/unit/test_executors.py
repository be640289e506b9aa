"""Where runs are trained: which GPU a child sees, NVIDIA's MPS beside them, and parts for machines apart."""

import os
import pathlib
import signal
import subprocess
import sys
from unittest import mock

import pytest
from script_runner import REPOSITORY, wait_for

import reproduce
from paper import executors, runs

SHOW = "import os; print(*(os.environ.get(n, 'none') for n in ('CUDA_VISIBLE_DEVICES', 'CUDA_MPS_PIPE_DIRECTORY')))"
#: A stand-in for NVIDIA's daemon: the file `alive` in its pipe folder is the daemon.
FAKE = """#!/bin/sh
if [ "$1" = -d ]; then
    [ -e "$CUDA_MPS_PIPE_DIRECTORY/alive" ] && exit 1
    echo "$CUDA_VISIBLE_DEVICES" > "$CUDA_MPS_PIPE_DIRECTORY/alive"
elif [ "$(cat)" = quit ]; then
    rm "$CUDA_MPS_PIPE_DIRECTORY/alive"
fi
"""


def install(folder, monkeypatch, text=FAKE):
    """Put an MPS daemon first on the PATH."""
    path = folder / "bin" / executors.MPS
    path.parent.mkdir()
    path.write_text(text)
    path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")


def seen(executor, keys, folder):
    """What children print of their environment; all of them are there at the same time."""
    for key in keys:
        assert executor.room()
        executor.start(key, ["-c", SHOW], str(folder / key))
    wait_for(lambda: all(process.poll() is not None for process in executor.running.values()))
    return [(folder / key).read_text().split() for key in keys]


def test_children_are_spread_over_the_cards_and_an_ended_one_leaves_its_card(tmp_path):
    executor = executors.Local(4, 1, ["2", "GPU-5f"])
    assert [card for card, _ in seen(executor, "abcd", tmp_path)] == ["2", "GPU-5f", "2", "GPU-5f"]
    assert not executor.room()
    ended = executor.wait(10)
    assert dict(ended) == dict.fromkeys("abcd", 0)
    assert seen(executor, "e", tmp_path) == [["2", "none"]]
    assert seen(executor, "f", tmp_path) == [["GPU-5f", "none"]]


def test_without_cards_children_see_what_the_driver_sees(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    assert seen(executors.Local(2, 1, [], tmp_path), "ab", tmp_path) == [["5", "none"]] * 2


@pytest.mark.parametrize(
    ("visible", "count", "cards"),
    [(None, 3, ["0", "1", "2"]), ("GPU-5f, GPU-60", 2, ["GPU-5f", "GPU-60"]), (None, 0, [])],
)
def test_the_cards_are_those_that_this_process_may_use(visible, count, cards, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with mock.patch("torch.cuda.device_count", return_value=count):
        assert executors.visible_cards() == cards


def test_runs_that_share_a_card_get_a_daemon_of_mps_that_ends_with_them(tmp_path, monkeypatch):
    """It is told the cards that it serves; its clients count those from 0."""
    install(tmp_path, monkeypatch)
    alive = tmp_path / "out" / "mps" / "pipe" / "alive"
    alive.parent.mkdir(parents=True)
    alive.write_text("left by a crash")
    executor = executors.Local(3, 1, ["4", "6"], tmp_path / "out")
    assert alive.read_text() == "4,6\n"
    assert seen(executor, "abc", tmp_path) == [[card, str(alive.parent)] for card in "010"]
    executor.stop()
    assert not alive.exists()


DRIVER = """
import sys
from paper import executors
executor = executors.Local(2, 1, ["0"], sys.argv[1])
executor.start("run", ["-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"], sys.argv[2])
executor.wait(600)
"""


@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs Linux's /proc")
def test_neither_the_daemon_nor_a_child_outlives_a_killed_driver(tmp_path, monkeypatch):
    install(tmp_path, monkeypatch)
    alive, log = tmp_path / "mps" / "pipe" / "alive", tmp_path / "log"
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), str(log)], cwd=REPOSITORY)
    wait_for(lambda: log.exists() and log.read_text().endswith("\n"))
    assert alive.exists()
    child = pathlib.Path("/proc", log.read_text().strip())
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    wait_for(lambda: not child.exists() or ") Z" in (child / "stat").read_text())
    wait_for(lambda: not alive.exists())


@pytest.mark.parametrize("daemon", [None, "#!/bin/sh\nexit 1\n"], ids=["not installed", "does not start"])
def test_without_mps_there_is_one_line_and_the_runs_start(daemon, tmp_path, monkeypatch, capsys):
    if daemon:
        install(tmp_path, monkeypatch, daemon)
    else:  # a GPU's driver brings it
        script = executors.MPS_SCRIPT.replace(executors.MPS, "not-installed")
        monkeypatch.setattr(executors, "MPS_SCRIPT", script)
    executor = executors.Local(2, 1, ["3"], tmp_path / "out")
    (line,) = capsys.readouterr().err.splitlines()
    assert "no MPS" in line
    assert seen(executor, "ab", tmp_path) == [["3", "none"]] * 2
    executor.stop()


@pytest.mark.parametrize(("jobs", "variable"), [(2, None), (3, "/elsewhere")])
def test_no_daemon_is_started_where_no_card_is_shared_or_the_user_has_one(jobs, variable, tmp_path, monkeypatch):
    if variable:
        monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", variable)
    with mock.patch.object(executors, "start_mps") as start:
        executors.Local(jobs, 1, ["0", "1"], tmp_path)
    assert not start.called


def executor_of(*flags):
    """The executor that these flags of reproduce.py ask for."""
    options = reproduce.build_parser().parse_args(["run", "--table", "4", *flags])
    return reproduce._executor(options, None)


@pytest.mark.parametrize(
    ("flags", "jobs", "cards"), [([], 2, ["0", "1"]), (["--gpus", "0"], 1, []), (["--jobs", "8"], 8, ["0", "1"])]
)
def test_a_run_a_card_unless_a_flag_says_otherwise(flags, jobs, cards, monkeypatch):
    monkeypatch.setattr(executors, "visible_cards", lambda: ["0", "1"])
    executor = executor_of(*flags)
    assert (executor.jobs, executor.cards) == (jobs, cards)
    assert executor.variables == ({"CUDA_VISIBLE_DEVICES": ""} if "--gpus" in flags else {})


def test_parts_are_all_runs_once_and_no_family_is_in_two():
    chosen = runs.spread_over(runs.cells_of_table(4), [0, 1], [0], "full")
    parts = [runs.part_of(chosen, index, 7) for index in range(1, 8)]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in chosen)
    families = [{run.family for run in part} for part in parts]
    assert sum(map(len, families)) == len(set().union(*families)) == 96
    assert max(map(len, families)) - min(map(len, families)) <= 1
