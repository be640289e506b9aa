"""An epoch of training and an evaluation: what every script shares. Knows no flags and no files."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from loaders.in_memory import TrainEpoch
from training import distributed
from training.cuda_graph import StepGraph
from training.metrics import CLASS_FIGURES, MetricAccumulator
from training.precision import Precision
from utils import DataError

#: called with the batch's number and the metrics so far
OnBatch = Callable[[int, MetricAccumulator], None]


class NonFiniteLoss(DataError):
    """The loss became NaN or infinite; `batch` is the first bad batch, counted from 0."""

    def __init__(self, batch: int) -> None:
        super().__init__(f"the loss is not finite in batch {batch + 1}")
        self.batch = batch


def train_one_epoch(
    model: torch.nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    criterion: Any,
    optimizer: torch.optim.Optimizer,
    num_classes: int,
    precision: Precision | None = None,
    on_batch: OnBatch | None = None,
    graph: StepGraph | None = None,
    after_step: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """One pass over `batches`, (images, targets) on the model's device: this rank's slices of the global batches.

    Within the epoch nothing waits for the device, unless `on_batch` does, or SyncBatchNorm, in each layer.

    Args:
        model: returns (logits, features); it is put into training mode.
        batches: targets are labels (N,), or soft ones (N, K) for a criterion that accepts them.
        criterion: see `losses.Loss`.
        num_classes: K.
        precision: None: float32.
        on_batch: called after each batch with its number, from 0, and the metrics so far.
        graph: trains most batches by replaying a captured step, if `batches` is a TrainEpoch; the same in every epoch.
        after_step: called after each step of the optimizer, for example to update an average of the weights.

    Returns:
        dict(loss, acc1, acc5, seen, seconds, ib_factor): `loss` is the mean of the criterion; accuracies are in
        percent, for soft targets of the likeliest class; `seen` is the number of images on all ranks. `ib_factor` is
        the mean factor of each class (None for a class without samples), or None for a criterion without a factor.

    Raises:
        NonFiniteLoss: with the number of the first bad batch.
    """
    started = time.monotonic()
    model.train()
    precision = precision or Precision()
    metrics = MetricAccumulator(num_classes, next(model.parameters()).device, by_class=False)
    if graph is not None and isinstance(batches, TrainEpoch):
        metrics = graph.hold(batches, metrics, model, criterion, optimizer)
    else:
        graph = None  # for images that are not drawn from memory

    def step(images, target):
        train_step(model, images, target, criterion, optimizer, precision, metrics)

    for batch, size in enumerate(_each_step(batches, step) if graph is None else graph.steps(step)):
        metrics.seen += size
        if after_step is not None:
            after_step()
        if on_batch is not None:
            on_batch(batch, metrics)
    figures = finite_figures(metrics)
    factors = metrics.mean_factors() if criterion.needs_features else None
    distributed.broadcast_buffers(model)
    return {**figures, "ib_factor": factors, "seconds": time.monotonic() - started}


def _each_step(batches, step):
    """Train the batches, one kernel after another; yields the size of each."""
    for images, target in batches:
        step(images, target)
        yield len(target)


def train_step(
    model: torch.nn.Module,
    images: torch.Tensor,
    target: torch.Tensor,
    criterion: Any,
    optimizer: torch.optim.Optimizer,
    precision: Precision,
    metrics: MetricAccumulator,
) -> None:
    """A step on one batch: images (N, 3, H, W), target (N,) or (N, K).

    Whatever changes from step to step is a tensor that is changed in place, and nothing is read from the device, so
    that a CUDA graph can hold the step. lr, criterion and N stay as they were when the graph was captured.
    """
    logits, features = forward(model, images, precision)
    loss, samples, factor = mean_over_ranks(criterion, logits, target, features)
    ranks = distributed.world_size()
    # data parallel averages the gradients
    precision.step(loss if ranks == 1 else loss * ranks, optimizer)
    labels = target if target.ndim == 1 else target.argmax(1)
    metrics.add(logits.detach(), labels, loss.detach() * samples)
    if factor is not None:
        metrics.add_factors(factor, labels)


def forward(model: torch.nn.Module, images: torch.Tensor, precision: Precision) -> tuple[torch.Tensor, torch.Tensor]:
    """(logits, features) of this rank's images in training mode; with several ranks a small batch may leave it none."""
    # an empty batch stays in float32: SyncBatchNorm then shares its statistics in the type of the other ranks'
    with precision.autocast() if len(images) else contextlib.nullcontext():
        # batch norm over all ranks takes a batch without images, and blank ones would enter it
        if len(images) or any(isinstance(part, torch.nn.SyncBatchNorm) for part in model.modules()):
            return model(images)
        logits, features = model(images.new_zeros((2, *images.shape[1:])))  # blank images that count nothing
    return logits[:0], features[:0]


def mean_over_ranks(
    criterion: Any, logits: torch.Tensor, target: torch.Tensor, features: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | int, torch.Tensor | None]:
    """This rank's share of the mean loss over the global batch, 0-d: the ranks' shares add up to the mean.

    Returns:
        (loss, samples of the global batch, IB factor of this rank's samples or None).
    """
    criterion.calibrate(logits, target, features, all_reduce_sum=distributed.all_reduce_sum)
    loss, count, factor = criterion.per_sample_and_factor(logits, target, features)
    if distributed.world_size() == 1:
        return loss.sum() / count.sum(), len(target), factor
    sums = torch.stack([count.sum().double(), torch.full_like(count.sum(), len(target)).double()])
    counted, samples = distributed.all_reduce_sum(sums)
    return loss.sum() / counted.to(loss.dtype), samples, factor  # of an empty slice a 0 that has its gradients


def finite_figures(metrics: MetricAccumulator) -> dict[str, Any]:
    """`metrics.read()`; raises NonFiniteLoss, on every rank, if a loss was not finite on any."""
    figures = metrics.read()
    if not math.isfinite(figures["loss"]):
        raise NonFiniteLoss(metrics.first_bad())
    return figures


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    class_counts: Sequence[int],
    precision: Precision | None = None,
    outputs: list | None = None,
) -> dict[str, Any]:
    """Accuracy and mean CE on `batches`. The loss is plain CE for every criterion, so that its curve does not jump.

    Args:
        model: returns (logits, features); it is left in evaluation mode.
        batches: (images, labels (n,)) on the model's device.
        class_counts: training images of each class, for the groups.
        outputs: a list that gets (logits (n, K), target (n,)) of each of this rank's batches that has images, on the
            CPU.

    Returns:
        dict(loss, acc1, acc5, seen, those of `metrics.CLASS_FIGURES`, per_class, confusion, seconds): accuracies in
        percent, None where there are no images; `seen` is the number of images on all ranks.
    """
    started = time.monotonic()
    distributed.broadcast_buffers(model)  # of an average, which each rank makes of its own
    model.eval()
    precision = precision or Precision()
    metrics = MetricAccumulator(len(class_counts), next(model.parameters()).device)
    for images, target in batches:
        if len(target) == 0:  # another rank's
            continue
        with precision.autocast():
            logits, _ = model(images)
        metrics.add(logits, target, F.cross_entropy(logits.float(), target, reduction="sum"))
        metrics.seen += len(target)
        if outputs is not None:
            outputs.append((logits.float().cpu(), target.cpu()))
    per_class, confusion = metrics.per_class()
    found = {name: figure(per_class, confusion, class_counts) for name, figure in CLASS_FIGURES.items()}
    figures = {name: None if value is None else float(value) for name, value in found.items()}
    seconds = time.monotonic() - started
    return {**metrics.read(), **figures, "per_class": per_class, "confusion": confusion, "seconds": seconds}
