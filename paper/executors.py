"""Where runs are trained: child processes of this machine, or Ray's workers.

No child outlives what started it (on macOS: unless that is killed).
"""

import collections
import contextlib
import ctypes
import logging
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from utils import UsageError, warn

LOST = None
#: Option of Linux's prctl: the signal that a process gets when its parent dies.
PR_SET_PDEATHSIG = 1


class Executor:
    """Where runs are trained, `jobs` at a time (None: as many as fit). A key names a run, whatever it is."""

    def __init__(self, jobs: int | None, threads: int) -> None:
        self.jobs, self.threads = jobs, threads
        self.running: dict[Any, Any] = {}

    def room(self) -> bool:
        """Whether another run can start now."""
        return self.jobs is None or len(self.running) < self.jobs

    def start(self, key: Any, command: Sequence[str], log: str) -> None:
        """Start `python command`, its output appended to the file `log`."""
        raise NotImplementedError

    def wait(self, seconds: float) -> list[tuple[Any, int | None]]:
        """(key, exit status) of what has ended, at once where something has; LOST where the machine went away."""
        deadline = time.monotonic() + seconds
        while not (ended := self._ended()) and time.monotonic() < deadline:
            time.sleep(0.1)
        for key, _ in ended:
            del self.running[key]
        return ended

    def _ended(self) -> list[tuple[Any, int | None]]:
        raise NotImplementedError

    def stop(self) -> None:
        """End what runs."""
        raise NotImplementedError


def start_child(
    command: Sequence[str], folder: str, threads: int, log: str, variables: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """Popen of `python command` in `folder`, its output appended to the file `log`; it dies with its parent.

    It must be called from a thread that lives as long as the child may: Linux takes the thread for the parent.

    Args:
        threads: CPU threads of the child.
        variables: of its environment, beside this process's.
    """
    parent = os.getpid()
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None  # not in the fork: it locks

    def die_with_parent():
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    # a spinning thread of OpenMP waits for the one that lost its core to another run, see docs/speed.md
    environment = {"GOMP_SPINCOUNT": "0", **os.environ, "OMP_NUM_THREADS": str(threads), **(variables or {})}
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, preexec_fn=die_with_parent,
            start_new_session=True,  # Ctrl-C is the parent's: a second signal would end the child's last write
        )  # fmt: skip


def visible_cards() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; empty without CUDA."""
    import torch

    count = torch.cuda.device_count()
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    return [name.strip() for name in names.split(",")][:count]


class Local(Executor):
    """Child processes with `threads` CPU threads each, spread evenly over GPUs.

    Args:
        cards: GPUs as CUDA_VISIBLE_DEVICES names them; each child sees one. Empty: children see what this process sees.
        out: folder for the files of NVIDIA's MPS, which is started where runs share a GPU; None: it is not. Where
            CUDA_MPS_PIPE_DIRECTORY is set, it is there already.
    """

    def __init__(
        self, jobs: int, threads: int, cards: Sequence[str] = (), out: str | os.PathLike | None = None
    ) -> None:
        if os.name == "nt":
            raise UsageError("reproduce.py run needs Linux or macOS")
        super().__init__(jobs, threads)
        self.cards = list(cards)
        self.card_of: dict[Any, str] = {}
        self.mps: subprocess.Popen | None = None
        self.variables: dict[str, str] = {}
        if out is not None and 0 < len(self.cards) < jobs and "CUDA_MPS_PIPE_DIRECTORY" not in os.environ:
            self.mps, self.variables = start_mps(os.path.abspath(os.path.join(out, "mps")), self.cards)

    def start(self, key: Any, command: Sequence[str], log: str) -> None:
        variables = dict(self.variables)
        if self.cards:
            taken = collections.Counter(self.card_of[other] for other in self.running)
            card = self.card_of[key] = min(self.cards, key=lambda card: taken[card])
            # MPS counts the GPUs that it was started with from 0
            variables["CUDA_VISIBLE_DEVICES"] = str(self.cards.index(card)) if self.mps else card
        self.running[key] = start_child(command, os.getcwd(), self.threads, log, variables)

    def _ended(self):
        return [(key, process.returncode) for key, process in self.running.items() if process.poll() is not None]

    def stop(self) -> None:
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self.mps:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.mps.communicate(timeout=10)


MPS = "nvidia-cuda-mps-control"
#: It waits for the end of its standard input. A daemon that a machine's crash left behind is stopped first.
MPS_SCRIPT = f"""
    echo quit | {MPS} >"$CUDA_MPS_LOG_DIRECTORY/start.txt" 2>&1
    {MPS} -d >>"$CUDA_MPS_LOG_DIRECTORY/start.txt" 2>&1 || exit 1
    echo started
    cat >/dev/null
    echo quit | {MPS} >/dev/null 2>&1
"""


def start_mps(folder: str, cards: Sequence[str]) -> tuple[subprocess.Popen | None, dict[str, str]]:
    """Start NVIDIA's MPS daemon, which lets processes work on one GPU at the same time instead of in turn.

    Its pipes and logs are in `folder`, see docs/speed.md.

    Returns:
        (process, variables): the daemon ends with the standard input of the process, and so with this one, whatever
        ends that; its clients need the variables of the environment. (None, {}), with a warning, where there is no MPS.
    """
    variables = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
    for path in variables.values():
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    keeper = subprocess.Popen(
        ["sh", "-c", MPS_SCRIPT], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**os.environ, **variables, "CUDA_VISIBLE_DEVICES": ",".join(cards)},
        start_new_session=True,  # Ctrl-C is the driver's
    )  # fmt: skip
    assert keeper.stdout is not None
    if keeper.stdout.readline() == b"started\n":
        return keeper, variables
    keeper.communicate()
    warn(f"no MPS ({folder}/log/start.txt says why): runs that share a GPU take turns on it, which is slow")
    return None, {}


def _ray_task(command, folder, threads, log):
    """What a Ray worker does: a run as a child process. Returns its exit status."""
    return start_child(command, folder, threads, log).wait()


class Ray(Executor):
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
        super().__init__(jobs, threads)
        self.ray = ray
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

    def start(self, key: Any, command: Sequence[str], log: str) -> None:
        self.running[key] = self.task.remote(command, os.getcwd(), self.threads, log)

    def _ended(self):
        """Without waiting: Ray's own wait turns SIGTERM into Ctrl-C."""
        references = list(self.running.values())
        ready = self.ray.wait(references, num_returns=len(references), timeout=0)[0] if references else []
        return [(key, self._status(reference)) for key, reference in self.running.items() if reference in ready]

    def _status(self, reference):
        try:
            status = self.ray.get(reference)
            # a node that dies kills the child, and its worker may live long enough to say so
            return LOST if status == -signal.SIGKILL else status
        except self.ray.exceptions.RayTaskError:
            return 1
        except self.ray.exceptions.RayError:  # its worker or its node is gone
            return LOST

    def stop(self) -> None:
        for reference in self.running.values():
            self.ray.cancel(reference, force=True)
        self.ray.shutdown()
