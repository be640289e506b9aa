"""Kill a training run at random moments, again and again, and resume it: python tests/faults/storm.py --kills 100

Each run is killed with SIGKILL and resumed until it is done; then its weights, momentum and logs must be those of a run
that was never killed, bit for bit. Every try is a fork of this process, which has imported everything and computed
nothing.
"""

import argparse
import json
import os
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "helpers"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import matplotlib.pyplot  # noqa: F401  (what a run imports late)
import script_runner
import sklearn.datasets  # noqa: F401
import tensorboardX.event_file_writer  # noqa: F401
import torch

import cifar_train
import models

FLAGS = [*script_runner.FOUR, "--train_rule", "IBReweight", "--alpha", "auto", "--checkpoint_seconds", "0"]
#: Kills of one run: then it may end, however busy the machine has become.
MOST = 6


def start(folder):
    """A child that trains in `folder`; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        os.chdir(folder)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        cifar_train.main(FLAGS)
        status = 0
    except SystemExit as stop:
        status = stop.code
    finally:
        os._exit(status)


def train(folder, kill_after=None):
    """Train in `folder` and kill it after so many seconds: the exit status, or None if it was killed in time."""
    pid = start(folder)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)  # of a child that has ended, and was not waited for, it does nothing
    _, status = os.waitpid(pid, 0)
    return None if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status)


def check(folder, reference):
    """AssertionError unless the run in `folder` equals the one in `reference`."""
    run = {"loss": "IB", "rule": "IBReweight"}
    script_runner.assert_same_run(*(script_runner.model_folder(where, **run) for where in (folder, reference)))
    summary = json.loads((script_runner.log_folder(folder, **run) / "summary.json").read_text())
    assert [record["epoch"] for record in summary["history"]] == list(range(4)), "an epoch is missing or duplicated"


def storm(kills, seed):
    """Figures of a storm of at least `kills` kills: dict(kills, runs, while_writing, seconds_of_a_run)."""
    torch.set_num_threads(1)
    generator = random.Random(seed)
    models.CIFAR_MODELS["tiny"] = script_runner.tiny
    figures = {"kills": 0, "runs": 0, "while_writing": 0, "seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        reference = pathlib.Path(scratch) / "reference"
        reference.mkdir()
        started = time.monotonic()
        assert train(reference) == 0, (reference / "output.txt").read_text()
        whole = figures["seconds_of_a_run"] = time.monotonic() - started
        while figures["kills"] < kills:
            folder = pathlib.Path(scratch) / "run"
            folder.mkdir()
            status, killed = None, 0
            while status is None:
                status = train(folder, generator.uniform(0, 1.1 * whole) if killed < MOST else None)
                killed += status is None
                figures["while_writing"] += any(folder.rglob(".*.tmp"))
            figures["kills"] += killed
            assert status == 0, (folder / "output.txt").read_text()
            check(folder, reference)
            figures["runs"] += 1
            shutil.rmtree(folder)
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(json.dumps(storm(options.kills, options.seed)))
