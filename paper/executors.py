"""Where runs are trained: child processes of this machine, or Ray's workers.

No child outlives what started it.
"""

import collections
import contextlib
import ctypes
import logging
import os
import pathlib
import shutil
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

    def die_with_parent():
        with contextlib.suppress(OSError, AttributeError):  # not Linux
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

    # a spinning thread of OpenMP waits for the one that lost its core to another run, see docs/speed.md
    environment = {"GOMP_SPINCOUNT": "0", **os.environ, "OMP_NUM_THREADS": str(threads), **(variables or {})}
    with open(log, "ab") as output:
        return subprocess.Popen(
            [sys.executable, *command], cwd=folder, env=environment, stdin=subprocess.DEVNULL,
            stdout=output, stderr=subprocess.STDOUT, preexec_fn=die_with_parent,
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
        super().__init__(jobs, threads)
        self.cards = list(cards)
        self.card_of: dict[Any, str] = {}
        self.mps = None
        if out is not None and 0 < len(self.cards) < jobs and "CUDA_MPS_PIPE_DIRECTORY" not in os.environ:
            self.mps = Mps.start(os.path.join(out, "mps"), self.cards)

    def start(self, key: Any, command: Sequence[str], log: str) -> None:
        variables = dict(self.mps.variables) if self.mps else {}
        if self.cards:
            taken = collections.Counter(self.card_of[other] for other in self.running)
            card = self.card_of[key] = min(self.cards, key=lambda card: taken[card])
            variables["CUDA_VISIBLE_DEVICES"] = self.mps.name_of(card) if self.mps else card
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
            self.mps.stop()


class Mps:
    """NVIDIA's MPS daemon, which lets processes work on one GPU at the same time instead of in turn.

    A shell starts it, waits for the end of its standard input, and stops it. That input ends with this process,
    whatever ends it, so the daemon does not outlive the driver. See docs/speed.md.
    """

    CONTROL = "nvidia-cuda-mps-control"
    # one that a machine's crash left behind is stopped first
    SCRIPT = """
        echo quit | {control} >"$CUDA_MPS_LOG_DIRECTORY/start.txt" 2>&1
        {control} -d >>"$CUDA_MPS_LOG_DIRECTORY/start.txt" 2>&1 || exit 1
        echo started
        cat >/dev/null
        echo quit | {control} >/dev/null 2>&1
    """

    def __init__(self, keeper: subprocess.Popen, variables: Mapping[str, str], cards: Sequence[str]) -> None:
        self.keeper, self.variables, self.cards = keeper, variables, list(cards)

    @classmethod
    def start(cls, folder: str, cards: Sequence[str]) -> "Mps | None":
        """Start the daemon for `cards`, its pipes and logs in `folder`; None, with a warning, where it cannot be."""
        if not shutil.which(cls.CONTROL):
            warn(f"{cls.CONTROL} is not installed: runs that share a GPU take turns on it, which is slow")
            return None
        folder = os.path.abspath(folder)
        variables = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in variables.values():
            pathlib.Path(path).mkdir(parents=True, exist_ok=True)
        keeper = subprocess.Popen(
            ["sh", "-c", cls.SCRIPT.format(control=cls.CONTROL)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, **variables, "CUDA_VISIBLE_DEVICES": ",".join(cards)},
            start_new_session=True,  # Ctrl-C is the driver's
        )  # fmt: skip
        assert keeper.stdout is not None
        if keeper.stdout.readline() != b"started\n":
            warn(f"MPS did not start ({folder}/log/start.txt): runs that share a GPU take turns on it, which is slow")
            keeper.communicate()
            return None
        return cls(keeper, variables, cards)

    def name_of(self, card: str) -> str:
        """What a run calls `card`: the daemon counts the GPUs that it was started with from 0."""
        return str(self.cards.index(card))

    def stop(self) -> None:
        """Stop the daemon. Runs must have ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.keeper.communicate(timeout=10)


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
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError:
            return 1
        except self.ray.exceptions.RayError:  # its worker or its node is gone
            return LOST

    def stop(self) -> None:
        for reference in self.running.values():
            self.ray.cancel(reference, force=True)
        self.ray.shutdown()
