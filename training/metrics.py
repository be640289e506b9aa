"""Accuracy of each class, of the many/medium/few groups, and the confusion matrix, counted on the device."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from imbalance import groups
from training import distributed

#: A confusion matrix is kept up to this many classes.
MAX_CONFUSION_CLASSES = 1000


class MetricAccumulator:
    """Correct predictions and losses, summed on the device.

    Only `read`, `first_bad`, `mean_factors` and `per_class` wait for the device and the other ranks. All accuracies are
    percentages.

    Args:
        num_classes: K.
        by_class: also count by class, for `per_class()`.
    """

    def __init__(self, num_classes: int, device: torch.device | str, by_class: bool = True) -> None:
        self.num_classes, self.by_class = num_classes, by_class
        self.seen = 0  # images, counted on the host by whoever adds batches
        self.loss = torch.zeros((), device=device, dtype=torch.float64)
        self.hits = torch.zeros(min(5, num_classes), device=device, dtype=torch.int64)  # of each place in the ranking
        self.finite = torch.zeros((), device=device, dtype=torch.int64)  # batches before the first non-finite loss
        self.confusion = num_classes <= MAX_CONFUSION_CLASSES
        rows = (num_classes if self.confusion else 2) if by_class else 0
        self.table = torch.zeros(rows * num_classes, device=device, dtype=torch.int64)
        self.factors = torch.zeros(2, num_classes, device=device, dtype=torch.float64)  # sums by class, and counts

    def reset(self) -> None:
        """Count from zero again, in the same memory."""
        self.seen = 0
        for sums in (self.loss, self.hits, self.finite, self.table, self.factors):
            sums.zero_()

    @torch.no_grad()
    def add(self, logits: torch.Tensor, target: torch.Tensor, loss: torch.Tensor) -> None:
        """Add a batch: logits (N, K), target (N,), loss 0-d: this rank's share of N times the batch's mean."""
        top = logits.topk(len(self.hits), dim=1).indices
        hit = top == target[:, None]
        self.hits += hit.sum(0)
        self.loss += loss.detach()
        self.finite += self.loss - self.loss == 0  # NaN and infinity stay in a sum
        if not self.by_class:
            return
        if self.confusion:
            cell = target * self.num_classes + top[:, 0]
        else:  # row 0: misses, row 1: hits
            cell = hit[:, 0].long() * self.num_classes + target
        self.table.scatter_add_(0, cell, torch.ones_like(cell))  # bincount would wait for the device

    def add_factors(self, factor: torch.Tensor, target: torch.Tensor) -> None:
        """Add the IB factors of a batch: factor (N,) without gradient, target (N,)."""
        factor = factor.double()
        self.factors.index_add_(1, target, torch.stack([factor, torch.ones_like(factor)]))

    def read(self) -> dict[str, Any]:
        """dict(loss, acc1, acc5, seen): means over the images of all ranks, accuracies in percent, number of images.

        With at most 5 classes acc5 is 100. Waits for the device and the other ranks.
        """
        # one read from the device
        sums = torch.cat([self.loss.new_full((1,), self.seen), self.loss[None], self.hits.double()])
        seen, loss, *hits = distributed.all_reduce_sum(sums).tolist()
        n = max(seen, 1)
        return {"loss": loss / n, "acc1": 100 * hits[0] / n, "acc5": 100 * sum(hits) / n, "seen": int(seen)}

    def first_bad(self) -> int:
        """Number of the first batch whose loss was not finite on some rank; the number of batches where all were."""
        return min(distributed.gather(int(self.finite)))

    def mean_factors(self) -> list[float | None]:
        """Mean IB factor of each class; None for a class without samples."""
        sums, counts = distributed.all_reduce_sum(self.factors).tolist()
        return [s / n if n else None for s, n in zip(sums, counts, strict=True)]

    def per_class(self) -> tuple[list[float | None], list[list[int]] | None]:
        """(accuracy of each class, a list with None for a class without images; confusion matrix or None)."""
        table = distributed.all_reduce_sum(self.table).view(-1, self.num_classes).cpu()
        if self.confusion:
            hits, totals = table.diagonal(), table.sum(1)
        else:
            hits, totals = table[1], table.sum(0)
        accuracy = [100 * h / t if t else None for h, t in zip(hits.tolist(), totals.tolist(), strict=True)]
        return accuracy, table.tolist() if self.confusion else None


def class_mean(per_class: Sequence, confusion: Any = None, class_counts: Any = None) -> float | None:
    """Mean accuracy of the classes that have images; None where there are none."""
    values = [accuracy for accuracy in per_class if accuracy is not None]
    return sum(values) / len(values) if values else None


def macro_f1(per_class: Sequence, confusion: Sequence | None, class_counts: Sequence[int]) -> float | None:
    """Mean F1 of the classes that have test images, in percent; None where no confusion matrix is kept."""
    if confusion is None:
        return None
    predicted = [sum(column) for column in zip(*confusion, strict=True)]
    scores = [200 * row[k] / (sum(row) + predicted[k]) for k, row in enumerate(confusion) if sum(row)]
    return sum(scores) / len(scores) if scores else None


def _of_group(name):
    return lambda per_class, confusion, counts: class_mean([per_class[k] for k in groups(counts)[name]])


#: What an evaluation reports besides loss, top-1 and top-5. name -> a figure, or None, of (accuracy of each class in
#: percent or None, confusion matrix or None, training images of each class). A new entry reaches the CSV files,
#: TensorBoard, summary.json, the screen and the report.
CLASS_FIGURES: dict[str, Callable[[Sequence, Sequence | None, Sequence[int]], float | None]] = {
    "class_mean": class_mean,
    **{name: _of_group(name) for name in ("many", "medium", "few")},
    "macro_f1": macro_f1,
}
