"""The Ray executor on a real cluster of two nodes, one of which goes away in the end."""

import time

import pytest
import script_runner

import reproduce
from paper import executors, records
from paper.runs import Run

#: Seconds after which something hangs, however busy the machine is.
HANGS = 1800
CE, BS = (Run("digits", "exp", 100, method, protocol="short") for method in ("CE", "BS"))


@pytest.fixture(scope="module")
def cluster():
    """A head and a worker node, of one CPU each."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", "/tmp")  # a socket's path has at most 107 bytes
        small = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
        cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=small)
        cluster.add_node(num_cpus=1, object_store_memory=80 * 2**20)
        yield cluster
        cluster.shutdown()


def test_runs_go_through_ray_and_a_failing_one_is_reported(cluster, tmp_path, capsys):
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / BS.name).touch()  # in the way of its folder
    select = ["--dataset", "digits", "--ratio", "100", "--protocol", "short", "--method", "CE", "BS"]
    flags = ["--out", str(tmp_path), "--executor", "ray", "--address", cluster.address]
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["run", *select, *flags, "--", "--epochs", "1", "--milestones", "--batch-size", "128"])
    out, err = capsys.readouterr()
    assert stop.value.code == 1
    assert "1 of 2 runs failed" in err
    assert f"failed: {BS.name}: cifar_train.py: error: {tmp_path}/log/{BS.name}" in out
    ((path, record),) = records.read(tmp_path / "results")[0]
    assert (path, record["epochs_done"]) == (str(tmp_path / "results" / f"{CE.name}.json"), 1)


def wait_for(executor, count):
    """{key: status} of the first `count` that end."""
    ended, deadline = {}, time.monotonic() + HANGS
    while len(ended) < count:
        assert time.monotonic() < deadline
        ended |= executor.wait(1)
    return ended


def test_statuses_come_back_and_the_run_of_a_lost_node_is_lost_not_failed(cluster, tmp_path):
    executor = executors.Ray(cluster.address, threads=1, gpus=0, jobs=None)
    try:
        for name, code in {"good": "print('said')", "bad": "raise SystemExit(3)"}.items():
            executor.start(name, ["-c", code], str(tmp_path / name))
        assert wait_for(executor, 2) == {"good": 0, "bad": 3}
        assert (tmp_path / "good").read_text() == "said\n"
        logs = [tmp_path / "one", tmp_path / "other"]  # one on each node
        for log in logs:
            executor.start(log, ["-c", "import time; print('begun', flush=True); time.sleep(3600)"], str(log))
        script_runner.wait_for(lambda: all(log.exists() and log.read_text() for log in logs), HANGS)
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        assert list(wait_for(executor, 1).values()) == [executors.LOST]
        assert len(executor.running) == 1
    finally:
        executor.stop()
