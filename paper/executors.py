"""Where runs are trained: child processes of this machine, or Ray's workers.

No child outlives what started it.
"""

import contextlib
import ctypes
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

from utils import UsageError

LOST = None
#: Option of Linux's prctl: the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1


class Executor(Protocol):
    """Where runs are trained. A key names a run, whatever it is."""

    def room(self) -> bool:
        """Whether another run can start now."""

    def start(self, key: Any, command: Sequence[str], log: str) -> None:
        """Start `python command`, its output appended to the file `log`."""

    def wait(self, seconds: float) -> list[tuple[Any, int | None]]:
        """(key, exit status) of what has ended, at once where something has; LOST where the machine went away."""

    def stop(self) -> None:
        """End what runs."""


def start_child(command: Sequence[str], folder: str, threads: int, log: str) -> subprocess.Popen:
    """Popen of `python command` in `folder`, its output appended to the file `log`; it dies with its parent.

    It must be called from a thread that lives as long as the child may: Linux takes the thread for the parent.
    """
    parent = os.getpid()

    def die_with_parent():
        with contextlib.suppress(OSError, AttributeError):  # not Linux
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    # a spinning thread of OpenMP waits for the one that lost its core to another run, see docs/speed.md
    environment = {"GOMP_SPINCOUNT": "0", **os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, preexec_fn=die_with_parent,
        )  # fmt: skip


class Local:
    """Up to `jobs` child processes at a time, each with `threads` CPU threads."""

    def __init__(self, jobs: int, threads: int) -> None:
        self.jobs, self.threads = jobs, threads
        self.running: dict[Hashable, subprocess.Popen] = {}

    def room(self) -> bool:
        return len(self.running) < self.jobs

    def start(self, key: Any, command: Sequence[str], log: str) -> None:
        self.running[key] = start_child(command, os.getcwd(), self.threads, log)

    def wait(self, seconds: float) -> list[tuple[Any, int | None]]:
        deadline = time.monotonic() + seconds
        while True:
            ended = [(key, process.returncode) for key, process in self.running.items() if process.poll() is not None]
            if ended or time.monotonic() > deadline:
                for key, _ in ended:
                    del self.running[key]
                return ended
            time.sleep(0.1)

    def stop(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ray_task(command, folder, threads, log):
    """What a Ray worker does: a run as a child process. Returns its exit status."""
    return start_child(command, folder, threads, log).wait()


class Ray:
    """Runs as tasks of a Ray cluster; code, data and `log` lie in folders that all machines share.

    Args:
        address: of the cluster ('auto': the one that runs here); None starts one on this machine.
        threads, gpus: what a run takes up; a fraction of a GPU lets runs share it.
        jobs: runs at a time, None: as many as fit.

    Raises:
        UsageError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, address: str | None, threads: int, gpus: float, jobs: int | None) -> None:
        try:
            import ray
        except ImportError:
            raise UsageError("--executor ray needs Ray: pip install -r requirements-ray.txt") from None
        self.ray, self.threads, self.jobs = ray, threads, jobs
        self.running: dict[Any, Any] = {}
        # the workers need not find this module: it is sent to them
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        handler = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except (ConnectionError, ValueError) as error:
            raise UsageError(f"no Ray cluster at {address}: {error}") from None
        signal.signal(signal.SIGTERM, handler)  # Ray's prints its frames and ends with status 1
        # no retries by Ray: a lost run starts with another command, from its newest checkpoint
        self.task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=0)(_ray_task)

    def room(self) -> bool:
        return self.jobs is None or len(self.running) < self.jobs

    def start(self, key: Any, command: Sequence[str], log: str) -> None:
        self.running[self.task.remote(command, os.getcwd(), self.threads, log)] = key

    def wait(self, seconds: float) -> list[tuple[Any, int | None]]:
        if not self.running:
            return []
        deadline = time.monotonic() + seconds
        while True:
            ready, _ = self.ray.wait(list(self.running), num_returns=1, timeout=0)
            if ready or time.monotonic() > deadline:
                return [(self.running.pop(reference), self._status(reference)) for reference in ready]
            time.sleep(0.1)  # a signal comes here: Ray's own wait turns SIGTERM into Ctrl-C

    def _status(self, reference):
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError:
            return 1
        except self.ray.exceptions.RayError:  # its worker or its node is gone
            return LOST

    def stop(self) -> None:
        for reference in self.running:
            self.ray.cancel(reference, force=True)
        self.ray.shutdown()
