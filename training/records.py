"""What a run leaves in its log folder: CSV files, TensorBoard events, summary.json, progress lines.

The history (one dict an epoch) in the checkpoint is the truth; files are made anew from it when a run starts
or goes on, so a line cut by a crash is mended and no epoch stands twice.
"""

import csv
import glob
import io
import json
import os
import sys
import time
from typing import Any

from training.checkpoint import write_atomically
from utils import duration

#: Scalars of each class go to TensorBoard up to this many classes.
MAX_CLASSES_IN_TENSORBOARD = 200

FILES = ("args.json", "summary.json", "log_train.csv", "log_test.csv", "class_accuracy.csv")
TRAIN_COLUMNS = ("epoch", "lr", "loss", "acc1", "acc5", "criterion", "class_weights", "sampler", "seconds")
TEST_COLUMNS = (
    "epoch", "acc1", "acc5", "loss", "best_acc1", "class_mean", "many", "medium", "few", "val_class_mean", "seconds",
)  # fmt: skip


def best_epoch(history):
    """The record of the best epoch: by top-1 on the test set, or, where there is a validation part, by its
    mean class accuracy. The first one wins a tie."""
    return max(history, key=lambda record: (record["score"], -record["epoch"]))


def shown(value, digits=2):
    """A figure for people: 'n/a' for None."""
    return "n/a" if value is None else f"{value:.{digits}f}"


def _cell(value):
    return "n/a" if value is None else repr(value) if isinstance(value, float) else str(value)


class Records:
    """The files of one run.

    Args:
        folder: log/<store_name>.
        class_names: K names.
        info: what does not change during the run (settings, versions, split), for summary.json.
        history: records of the epochs already done.
    """

    def __init__(self, folder, class_names, info, history=()):
        self.folder, self.class_names, self.info = folder, class_names, info
        self.history = list(history)
        self._writer: Any = None
        os.makedirs(folder, exist_ok=True)
        self._write_json("args.json", info["settings"], indent=1)
        tables = self._tables()
        for name, (header, rows) in tables.items():
            lines = [header, *(row for record in self.history for row in rows(record, self.history))]
            write_atomically(self._path(name), lambda file, lines=lines: file.write(_csv(lines)))
        if self.history:
            self._summary()
            self._tensorboard()

    def add(self, record):
        """Add an epoch's record to every file."""
        self.history.append(record)
        for name, (_, rows) in self._tables().items():
            with open(self._path(name), "ab") as file:
                file.write(_csv(rows(record, self.history)))
        self._tensorboard()
        self._summary()

    def close(self):
        if self._writer is not None:
            self._writer.close()

    def _path(self, name):
        return os.path.join(self.folder, name)

    def _tables(self):
        """name -> (header, function from (record, history) to rows)."""
        return {
            "log_train.csv": (TRAIN_COLUMNS, lambda r, h: [_train_row(r)]),
            "log_test.csv": (TEST_COLUMNS, lambda r, h: [_test_row(r, h)]),
            "class_accuracy.csv": (
                ("epoch", *self.class_names),
                lambda r, h: [[r["epoch"], *map(_cell, r["test"]["per_class"])]],
            ),
        }

    def _write_json(self, name, content, indent=None):
        text = json.dumps(content, indent=indent) + "\n"
        write_atomically(self._path(name), lambda file: file.write(text.encode()))

    def _summary(self):
        best, last = best_epoch(self.history), self.history[-1]
        content = {**self.info, "epochs_done": len(self.history), "history": self.history}
        content["best"] = {"epoch": best["epoch"], **_without_matrix(best["test"])}
        content["last"] = {"epoch": last["epoch"], **_without_matrix(last["test"])}
        self._write_json("summary.json", content)

    def _tensorboard(self):
        if self._writer is not None:
            self._scalars(self.history[-1])
        else:  # the first epoch of this process: write all epochs anew, then drop the older files
            from tensorboardX import SummaryWriter

            old = glob.glob(os.path.join(glob.escape(self.folder), "events.out.tfevents.*"))
            self._writer = SummaryWriter(self.folder, filename_suffix=f".{os.getpid()}.{time.time_ns()}")
            for record in self.history:
                self._scalars(record)
            self._writer.flush()
            for path in old:
                os.unlink(path)
        self._writer.flush()

    def _scalars(self, record):
        def add(tag, value):
            if value is not None:
                self._writer.add_scalar(tag, value, record["epoch"], walltime=record["time"])

        for part in ("train", "test"):
            for name in ("loss", "acc1", "acc5"):
                add(f"{part}/{name}", record[part][name])
        for name in ("class_mean", "many", "medium", "few"):
            add(f"test/{name}", record["test"][name])
        add("lr", record["stage"]["lr"])
        if len(self.class_names) <= MAX_CLASSES_IN_TENSORBOARD:
            for tag, values in (("class_accuracy", record["test"]["per_class"]), ("ib_factor", record["ib_factor"])):
                for name, value in zip(self.class_names, values or [], strict=False):
                    add(f"{tag}/{name}", value)


def _train_row(record):
    values = {**record["train"], **record["stage"], "loss": record["train"]["loss"]}
    values |= {"epoch": record["epoch"], "criterion": record["stage"]["loss"]}
    return [_cell(values[name]) for name in TRAIN_COLUMNS]


def _test_row(record, history):
    so_far = history[: record["epoch"] - history[0]["epoch"] + 1]
    values = {**record["test"], "epoch": record["epoch"], "best_acc1": best_epoch(so_far)["test"]["acc1"]}
    values["val_class_mean"] = record["val"]["class_mean"] if record.get("val") else None
    return [_cell(values[name]) for name in TEST_COLUMNS]


def _without_matrix(test):
    return {name: value for name, value in test.items() if name != "confusion"}


def _csv(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


class Progress:
    """A bar with the time left on a terminal, a plain line every `print_freq` batches elsewhere."""

    def __init__(self, epochs, print_freq, stream=None):
        self.epochs, self.print_freq = epochs, max(print_freq, 1)
        self.stream = stream or sys.stdout
        self.seconds = []  # of the epochs done in this process

    def epoch(self, epoch, batches, lr):
        self.number, self.batches, self.lr, self.started = epoch, batches, lr, time.monotonic()
        self.bar = None
        if self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=batches, desc=f"epoch {epoch + 1}/{self.epochs}", leave=False, file=self.stream)

    def due(self, batch):
        """Whether figures are wanted after this batch (counted from 0): every print_freq, and the very first."""
        return (batch + 1) % self.print_freq == 0 or (batch == 0 and not self.seconds)

    def show(self, batch, figures):
        left = self._time_left(batch + 1)
        text = f"loss {figures['loss']:.4f}  acc1 {figures['acc1']:.2f}"
        if self.bar is not None:
            self.bar.update(batch + 1 - self.bar.n)
            self.bar.set_postfix_str(f"{text}, run ends in {left}")
        else:
            where = f"epoch {self.number + 1}/{self.epochs}  batch {batch + 1}/{self.batches}"
            print(f"{where}  lr {self.lr:g}  {text}  left {left}", file=self.stream, flush=True)

    def done(self, seconds, line):
        if self.bar is not None:
            self.bar.close()
        self.seconds.append(seconds)
        print(line, file=self.stream, flush=True)

    def _time_left(self, batches_done):
        elapsed = time.monotonic() - self.started
        epoch = self.seconds[-1] if self.seconds else elapsed / batches_done * self.batches
        return duration(max(epoch - elapsed, 0) + epoch * (self.epochs - self.number - 1))
