"""The Ray executor on a real cluster of two nodes, one of which goes away in the middle."""

import os
import subprocess
import time

import pytest
import script_runner
from test_reproduce import EXTRA, arguments, newest

from paper.runs import Run

METHODS = ("CE", "IB", "IB+CB", "IB+Focal", "BS", "LA")
CHOSEN = [Run("digits", "exp", 20, method, protocol="short") for method in METHODS]


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


def where_it_runs(process):
    """Run names -> ids of the training processes that are at work now, from /proc."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                words = file.read().decode().split("\0")
        except OSError:
            continue
        if "--root_log" in words and str(process) in words[words.index("--root_log") + 1]:
            found[int(pid)] = words
    return found


def parents(pid):
    """Process ids above `pid`."""
    while pid > 1:
        with open(f"/proc/{pid}/stat") as file:
            pid = int(file.read().rsplit(")", 1)[1].split()[1])
        yield pid


@pytest.mark.skipif(not os.path.exists("/proc"), reason="needs Linux's /proc")
def test_runs_of_a_lost_node_continue_on_the_other_and_equal_the_local_ones(cluster, tmp_path, capsys):
    out, local = tmp_path / "ray", tmp_path / "local"
    flags = ["--executor", "ray", "--address", cluster.address]
    environment = script_runner.environment()
    with open(tmp_path / "printed", "w") as printed:
        driver = subprocess.Popen(arguments(out, METHODS, *flags), stdout=printed, stderr=printed, env=environment)
    worker = cluster.worker_nodes.copy().pop()
    raylet = worker.all_processes["raylet"][0].process.pid
    deadline = time.monotonic() + 240
    lost = None
    while lost is None:  # until a run on the worker node has an epoch behind it
        assert driver.poll() is None, (tmp_path / "printed").read_text()
        assert time.monotonic() < deadline
        for pid, words in where_it_runs(out).items():
            try:
                is_there = raylet in parents(pid)
            except OSError:
                continue
            name = next(run.name for run in CHOSEN if {*run.argv(out)[1:]} <= {*words})
            log = out / "log" / name / "log_test.csv"
            if is_there and log.exists() and log.read_text().count("\n") >= 2:
                lost = name
        time.sleep(0.05)
    cluster.remove_node(worker, allow_graceful=False)
    assert driver.wait(600) == 0, (tmp_path / "printed").read_text()
    text = (tmp_path / "printed").read_text()
    assert f"lost   {lost}" in text
    assert "resumes from" in (out / "output" / f"{lost}.txt").read_text()
    for run in CHOSEN:  # alone, without a fork, in this process: the same bits as of the local executor
        script_runner.run_ok([*run.argv(local)[1:], "--threads", "1", *EXTRA], tmp_path, capsys)
        script_runner.assert_same_weights(newest(out, run), newest(local, run))
