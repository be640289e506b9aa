"""What a run prints for the user: progress, the line of an epoch, the table of classes."""

import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from experiment.records import best_epoch
from training.loop import finite_figures
from training.metrics import CLASS_FIGURES, MetricAccumulator
from utils import format_metric, one_line

#: Rows of the per-class table; of more classes the worst and the best are shown.
MOST_ROWS, SHOWN_OF_MANY = 200, 10


class Progress:
    """One bar for the run on a terminal, with the time left; a plain line every `print_freq` batches elsewhere."""

    def __init__(self, first: int, epochs: int, print_freq: int) -> None:
        self.epochs, self.print_freq = epochs, print_freq
        self.number, self.seconds = first, 0.0  # of the epoch before
        self.bar: Any = None
        if sys.stdout.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=epochs, initial=first, unit="epoch", file=sys.stdout)

    def epoch(self, epoch: int, batches: int, lr: float) -> None:
        """An epoch begins."""
        self.number, self.batches, self.lr, self.started = epoch, batches, lr, time.monotonic()

    def on_batch(self, batch: int, metrics: MetricAccumulator) -> None:
        """Show the figures so far every `print_freq` batches, and after the very first one."""
        if (batch + 1) % self.print_freq and (batch or self.seconds):
            return
        figures = finite_figures(metrics)
        text = f"loss {figures['loss']:.4f}  acc1 {figures['acc1']:.2f}"
        if self.bar is not None:
            self.bar.set_postfix_str(text)
            return
        where = f"epoch {self.number + 1}/{self.epochs}  batch {batch + 1}/{self.batches}"
        left = self._time_left(batch + 1)
        print(f"{where}  lr {self.lr:g}  {text}  left {left}", flush=True)

    def done(self, record: dict, history: Sequence[dict]) -> None:
        """An epoch has ended: print its line."""
        self.seconds = record["seconds"]
        line = epoch_line(record, history, self.epochs)
        if self.bar is None:
            print(line, flush=True)
        else:
            self.bar.write(line)
            self.bar.update()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()

    def _time_left(self, batches_done):
        elapsed = time.monotonic() - self.started
        epoch = self.seconds or elapsed / batches_done * self.batches
        return timedelta(seconds=round(max(epoch - elapsed, 0) + epoch * (self.epochs - self.number - 1)))


def epoch_line(record: dict, history: Sequence[dict], epochs: int) -> str:
    """The line that is printed after an epoch. epochs: their number in the run."""
    test, best = record["test"], best_epoch(history)
    parts = [
        f"epoch {record['epoch'] + 1}/{epochs} done in {record['seconds']:.1f} s",
        f"{record['stage']['loss']} loss {record['train']['loss']:.4f}",
        f"test acc1 {test['acc1']:.2f} acc5 {test['acc5']:.2f}",
        " ".join(f"{name} {format_metric(test.get(name))}" for name in ("many", "medium", "few")),
        *([f"val class mean {format_metric(record['val']['class_mean'])}"] if record.get("val") else []),
        f"best {best['test']['acc1']:.2f} (epoch {best['epoch'] + 1})",
    ]
    return "  ".join(parts)


def summary_line(test: dict) -> str:
    """The figures of a test."""
    titles = {"acc1": "top-1", "acc5": "top-5", "class_mean": "class mean"}
    names = ("acc1", "acc5", *CLASS_FIGURES)
    return "  ".join(f"{titles.get(name, name)} {format_metric(test.get(name))}" for name in names)


def print_classes(names: Sequence[str], counts: Sequence[int], *results: dict) -> None:
    """The per-class table: training images, and accuracy in the best and the last epoch."""
    rows = list(range(len(names)))
    if len(rows) > MOST_ROWS:
        last = results[-1]["per_class"]
        ranked = sorted((k for k in rows if last[k] is not None), key=lambda k: last[k])
        rows = [*ranked[:SHOWN_OF_MANY], *ranked[-SHOWN_OF_MANY:]]
        print(f"the {SHOWN_OF_MANY} worst and best of {len(names)} classes; the logs have all of them")
    shown = {k: one_line(names[k]) for k in rows}
    width = max(len(name) for name in [*shown.values(), "class"])
    heads = ("best", "last")[: len(results)] if len(results) > 1 else ("acc",)
    print(f"{'class':<{width}}  {'train':>6}" + "".join(f"  {head:>6}" for head in heads))
    for k, name in shown.items():
        figures = "".join(f"  {format_metric(result['per_class'][k]):>6}" for result in results)
        print(f"{name:<{width}}  {counts[k]:>6}{figures}")
