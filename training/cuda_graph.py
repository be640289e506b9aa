"""A training step as one CUDA graph: a launch a step instead of hundreds, the same kernels in the same order."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from loaders.in_memory import TrainEpoch
from training.metrics import MetricAccumulator
from utils import warn

#: Full batches trained one kernel at a time before the capture, in which libraries choose algorithms and take memory.
WARM_UP = 3

Step = Callable[[torch.Tensor, torch.Tensor], None]


class StepGraph:
    """Trains batches of `loaders.in_memory.TrainEpoch` on CUDA by replaying a step that was captured once.

    A graph reads and writes fixed addresses, so this keeps the draws and the metrics of the epoch of the capture, and
    the later epochs' are copied there. The step is captured anew where one of the values that a graph freezes changes:
    those that `hold` is told of. Numbers that the model or the criterion keep in Python must not change. The last
    batch of an epoch, if it is smaller, is trained one kernel at a time. A step that cannot be captured is a warning,
    once, and all of them are trained so.
    """

    def __init__(self) -> None:
        self.frozen: tuple[Any, ...] = ()
        self.batches: Any = None  # a TrainEpoch: of the epoch whose memory the graph reads, and its metrics
        self.metrics: Any = None
        self.graph: torch.cuda.CUDAGraph | None = None
        self.failed = False
        self.warm = 0  # full batches with these frozen values

    @functools.cached_property
    def stream(self) -> torch.cuda.Stream:
        """For the steps before a capture, which wants them away from the default stream."""
        return torch.cuda.Stream()

    def hold(self, batches: TrainEpoch, metrics: MetricAccumulator, frozen: tuple[Any, ...]) -> MetricAccumulator:
        """Take in an epoch, before its first step; `metrics` are new.

        Args:
            frozen: what a step depends on beside `batches` and the tensors that it changes; compared with ==.

        Returns:
            The metrics that the steps of this epoch add to.
        """
        if frozen == self.frozen and batches.source is self.batches.source:
            self.batches.take_draws(batches)
            self.metrics.reset()
        else:
            self.graph, self.warm = None, 0  # frees the old graph's memory
            self.frozen, self.batches, self.metrics = frozen, batches, metrics
        return self.metrics

    def steps(self, step: Step) -> Iterator[int]:
        """Train the batches of the epoch; yields the size of each when it is queued on the device."""
        full = len(self.batches.places)
        for size in self.batches.sizes:
            if size == full and self.warm >= WARM_UP and self.graph is None and not self.failed:
                self._capture(step, size)
            if size == full and self.graph is not None:
                self.graph.replay()
            else:
                self._run(step, size)
                self.warm += size == full
            yield size

    def _run(self, step, size):
        """One step, kernel by kernel."""
        current = torch.cuda.current_stream()
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            step(*self.batches.take(size))
        current.wait_stream(self.stream)

    def _capture(self, step, size):
        """Record a step, which runs nothing. The thread that writes checkpoints may work meanwhile."""
        graph = torch.cuda.CUDAGraph()
        side = torch.cuda.stream(self.stream)  # left whatever happens, which a failed capture's own context is not
        try:
            with side, torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                step(*self.batches.take(size))
        except RuntimeError as error:
            cause = error.__context__ or error  # what broke the step; ending the capture then fails, too
            if not isinstance(cause, Exception):  # Ctrl-C, SIGTERM
                raise cause from None
            self.failed = True
            reason = next(iter(str(cause).splitlines()), type(cause).__name__)
            warn(f"this step cannot be a CUDA graph, so the run is slower: {reason}")
        else:
            self.graph = graph
