"""A training step as one CUDA graph: one launch per step instead of hundreds, the same kernels in the same order."""

import collections
import functools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from loaders.in_memory import TrainEpoch
from training import distributed
from training.metrics import MetricAccumulator
from utils import warn

#: Batches of a size trained one kernel at a time before the capture, in which libraries choose algorithms and take
#: memory. In the first one the step may also set up things of its own; from the second on it is watched.
WARM_UP = 3

Step = Callable[[torch.Tensor, torch.Tensor], None]


class StepGraph:
    """Trains batches of `loaders.in_memory.TrainEpoch` on CUDA by replaying a step, captured once for each batch size.

    A graph reads and writes fixed addresses, so the draws and metrics of the captured epoch stay in memory, and those
    of later epochs are copied there. A graph also freezes every value that Python computes. Therefore

    - the step is captured again if the model, the criterion or an option of the optimizer changes, or if one of their
      `host_values` changes between two epochs;
    - a step trains without a graph if it draws from the CPU's random states (torch, numpy, random), changes one of the
      `host_values`, or cannot be captured. A warning gives the reason, once.

    Not detected: Python values elsewhere (globals, closures, lists), and what a step does for the first time after the
    warm-up.
    """

    def __init__(self) -> None:
        self.held: tuple[Any, ...] = ()  # model, criterion, optimizer, and their `host_values`
        self.options: list[dict] = []  # of the optimizer's groups, without their parameters
        self.batches: Any = None  # a TrainEpoch: of the epoch whose memory the graphs read, and its metrics
        self.metrics: Any = None
        self.graphs: dict[int, torch.cuda.CUDAGraph] = {}  # by batch size
        self.warm: collections.Counter[int] = collections.Counter()  # batches of a size since the last `_forget`
        self.failed = False

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """For the steps before a capture, which wants them away from the default stream."""
        return torch.cuda.Stream()

    def hold(
        self, batches: TrainEpoch, metrics: MetricAccumulator, model: torch.nn.Module, criterion: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
    ) -> MetricAccumulator:  # fmt: skip
        """Prepare an epoch, before its first step; `metrics` are new. Returns those that its steps add to."""
        held = (model, criterion, optimizer, host_values(model, criterion, optimizer))
        if held == self.held and batches.source is self.batches.source:
            self.batches.take_draws(batches)
            self.metrics.reset()
        else:
            self._forget()
            self.held, self.batches, self.metrics = held, batches, metrics
        return self.metrics

    def steps(self, step: Step) -> Iterator[int]:
        """Train the batches of the epoch; yields the size of each when it is queued on the device."""
        for size in self.batches.sizes:
            before, self.options = self.options, self._options()
            if self.options != before:  # another epoch's, or a schedule that changes the lr in each step
                self._forget()
            if self.warm[size] >= WARM_UP and size not in self.graphs and not self.failed:
                self._capture(step, size)
            if size in self.graphs:
                self.graphs[size].replay()
            else:
                self._run(step, size)
            yield size

    def _forget(self):
        """Start again with the warm-up; frees the graphs' memory."""
        self.graphs.clear()
        self.warm.clear()

    def _options(self):
        _, _, optimizer, _ = self.held
        return [{k: value for k, value in group.items() if k != "params"} for group in optimizer.param_groups]

    def _run(self, step, size):
        """One step, kernel by kernel."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            self._watched(step, size)
        current.wait_stream(self.stream)

    def _watched(self, step, size):
        """The step as Python code; gives up graphs where it does on the host what a replayed one would not."""
        if self.failed:
            return step(*self.batches.take(size))
        before = host_state(*self.held[:3])
        step(*self.batches.take(size))
        self.warm[size] += 1
        if self.warm[size] > 1:
            after = host_state(*self.held[:3])
            changes = [what for what in after if after[what] != before.get(what)]
            if changes:
                self._give_up(f"each step {changes[0]}, which a CUDA graph would freeze")

    def _capture(self, step, size):
        """Record a step, which runs nothing. A thread that writes files may work meanwhile."""
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.stream(self.stream)  # left whatever happens, which a failed capture's own context is not
        try:
            with side, torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self._watched(step, size)
        except Exception as error:
            cause = error.__context__ or error  # what broke the step; ending the capture then fails, too
            if not isinstance(cause, Exception):  # Ctrl-C, SIGTERM
                raise cause from None
            reason = next(iter(str(cause).splitlines()), type(cause).__name__)
            self._give_up(f"this step cannot be a CUDA graph ({reason})")
        else:
            if not self.failed:
                self.graphs[size] = graph

    def _give_up(self, reason):
        self.failed = True
        self.graphs.clear()
        warn(f"{reason}: training continues without one, slower")


def step_graph(device: torch.device, amp: str = "none", wanted: bool = True) -> StepGraph | None:
    """A StepGraph for a run whose steps can be captured: on a GPU, in a single process, without fp16's loss scaler,
    with which it was not tried. None for the others, and where it is not wanted."""
    can = device.type == "cuda" and distributed.world_size() == 1 and amp != "fp16"
    return StepGraph() if can and wanted else None


def host_values(model: torch.nn.Module, criterion: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a graph freezes, by 'part.attribute of Class': numbers and strings among the attributes of the modules, of
    their parts, of the optimizer and of its state; of tensors there the address, and the value of one on the host.
    """
    device = next(model.parameters()).device

    def fixed(value):
        if not torch.is_tensor(value):
            return value
        return value.item() if value.ndim == 0 and value.device != device else value.data_ptr()

    holders: list[tuple[str, Any, dict]] = [
        (f"{name}." if name else "", module, {**vars(part), **part._parameters, **part._buffers})
        for module in (model, criterion)
        for name, part in module.named_modules()
    ]
    holders.append(("", optimizer, vars(optimizer)))
    holders += [(f"state {number}.", optimizer, state) for number, state in enumerate(optimizer.state.values())]
    return {
        f"{prefix}{attribute} of {type(owner).__name__}": fixed(value)
        for prefix, owner, attributes in holders
        for attribute, value in attributes.items()
        if isinstance(value, (bool, int, float, str, torch.Tensor))
    }


def host_state(*of_step: Any) -> dict[str, Any]:
    """What a replayed step cannot change, by what a step does that changes it; arguments as of `host_values`."""
    numpy_state: Any = np.random.get_state()
    _, keys, *position = numpy_state
    return {
        "draws from torch's random state on the host": torch.get_rng_state().numpy().tobytes(),
        "draws from numpy's random state": (keys.tobytes(), *position),
        "draws from Python's random state": random.getstate(),
        **{f"changes {name}": value for name, value in host_values(*of_step).items()},
    }
