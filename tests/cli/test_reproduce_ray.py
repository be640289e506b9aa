"""The Ray executor on a real cluster of two nodes, one of which goes away in the middle."""

import os
import subprocess
import sys
import time

import pytest
import script_runner

from experiment.settings import FIELDS
from paper.runs import Run

RUNS = [Run("digits", "exp", 20, method, protocol="short") for method in ("CE", "BS")]
#: Flags after a run's own: four short epochs, a checkpoint after each.
EXTRA = ["--batch-size", "128", "--epochs", "4", "--milestones", "2", "--lr_factors", "0.1"]
EXTRA += ["--checkpoint_seconds", "0"] if "checkpoint_seconds" in FIELDS else []
#: Seconds after which something hangs, however busy the machine is.
HANGS = 1800


@pytest.fixture
def cluster(monkeypatch):
    """A head and a worker node, of one CPU each."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=small)
    cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
    yield cluster
    cluster.shutdown()


def parents(pid):
    """Process ids above `pid`."""
    while pid > 1:
        with open(f"/proc/{pid}/stat") as file:
            pid = int(file.read().rsplit(")", 1)[1].split()[1])
        yield pid


def run_below(raylet, out):
    """The run that trains now on the node of `raylet`, from /proc; None."""
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline") as file:
                words = set(file.read().split("\0"))
            found = [run for run in RUNS if words >= set(run.argv(out)[1:])]
            if found and raylet in parents(int(pid)):
                return found[0]
        except OSError:  # it has ended
            continue
    return None


@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs Linux's /proc")
def test_a_run_of_a_lost_node_continues_on_the_other_and_equals_a_local_one(cluster, tmp_path, capsys):
    out, printed = tmp_path / "ray", tmp_path / "printed"
    select = ["--dataset", "digits", "--ratio", "20", "--protocol", "short", "--method", "CE", "BS"]
    flags = [*select, "--out", str(out), "--executor", "ray", "--address", cluster.address]
    command = [sys.executable, str(script_runner.REPOSITORY / "reproduce.py"), "run", *flags, "--", *EXTRA]
    with open(printed, "w") as file:
        driver = subprocess.Popen(command, stdout=file, stderr=file, env=script_runner.environment())
    worker = cluster.worker_nodes.copy().pop()
    raylet, deadline = worker.all_processes["raylet"][0].process.pid, time.monotonic() + HANGS
    try:
        lost = None
        while lost is None:  # until the run on the worker node has an epoch behind it
            assert driver.poll() is None, printed.read_text()
            assert time.monotonic() < deadline, printed.read_text()
            lost = run_below(raylet, out)
            if lost and not (out / "checkpoint" / lost.name / "ckpt.pth.tar").exists():
                lost = None
            time.sleep(0.05)
        cluster.remove_node(worker, allow_graceful=False)
        assert driver.wait(HANGS) == 0, printed.read_text()
    finally:
        driver.kill()
    assert f"lost   {lost.name}" in printed.read_text()
    assert "resumes from" in (out / "output" / f"{lost.name}.txt").read_text()
    alone = lost.argv(tmp_path / "local")[1:]
    script_runner.run_ok([*alone, "--threads", "1", *EXTRA], tmp_path, capsys)
    checkpoints = [folder / "checkpoint" / lost.name / "ckpt.pth.tar" for folder in (out, tmp_path / "local")]
    script_runner.assert_same_weights(*checkpoints)
