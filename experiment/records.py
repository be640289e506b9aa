"""What a run leaves in its log folder: CSV files, TensorBoard events, summary.json, progress lines.

The history (one dict an epoch) in the checkpoint is the truth. Files are made from it when a run starts or resumes,
so a line cut by a crash is mended and no epoch is duplicated. Files count epochs from 0, as the published flags
do; what people read on the screen and in figures counts from 1.
"""

import csv
import glob
import io
import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import IO, Any

from files import errors_name, write_text
from utils import duration, format_metric

#: Scalars of each class go to TensorBoard up to this many classes.
MAX_CLASSES_IN_TENSORBOARD = 200

FILES = ("args.json", "summary.json", "log_train.csv", "log_test.csv", "class_accuracy.csv")
TRAIN_COLUMNS = ("epoch_from_0", "lr", "loss", "acc1", "acc5", "criterion", "class_weights", "sampler", "seconds")
TEST_COLUMNS = (
    "epoch_from_0", "acc1", "acc5", "loss", "best_acc1", "class_mean", "many", "medium", "few", "val_class_mean",
    "seconds",
)  # fmt: skip


def best_epoch(history: Sequence[dict]) -> dict:
    """The record of the best epoch: by top-1 on the test set, or, where there is a validation part, by its
    mean class accuracy. The first one wins a tie."""
    return max(history, key=lambda record: (record["score"], -record["epoch"]))


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text with a final newline; what is not finite becomes null, which every reader of JSON takes."""

    def finite(value):
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {name: finite(item) for name, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(finite(value), indent=indent) + "\n"


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

    def __init__(self, folder: str, class_names: Sequence[str], info: dict, history: Sequence[dict] = ()) -> None:
        self.folder, self.class_names, self.info = folder, class_names, info
        self.history = list(history)
        self._json = [to_json(record).rstrip() for record in history]  # made once: it is most of summary.json
        self._writer: Any = None
        os.makedirs(folder, exist_ok=True)
        write_text(self._path("args.json"), to_json(info["settings"], indent=1))
        for name, header, row in self._tables():
            write_text(self._path(name), _csv([header, *(row(record) for record in self.history)]))
        if self.history:
            self._summary()
            self._tensorboard()

    def add(self, record: dict) -> None:
        """Add an epoch's record to every file."""
        self.history.append(record)
        self._json.append(to_json(record).rstrip())
        with errors_name(self.folder):
            for name, _, row in self._tables():
                with open(self._path(name), "a", encoding="utf-8", errors="surrogateescape", newline="") as file:
                    file.write(_csv([row(record)]))
            self._tensorboard()
        self._summary()

    def close(self) -> None:
        if self._writer is not None:
            with errors_name(self.folder):
                self._writer.close()

    def _path(self, name):
        return os.path.join(self.folder, name)

    def _tables(self):
        """(file name, header, function from an epoch's record to its row) of each CSV file."""
        return (
            ("log_train.csv", TRAIN_COLUMNS, _train_row),
            ("log_test.csv", TEST_COLUMNS, lambda record: _test_row(record, self.history)),
            ("class_accuracy.csv", ("epoch_from_0", *self.class_names), _class_row),
        )

    def _summary(self):
        best, last = best_epoch(self.history), self.history[-1]
        head = {**self.info, "epochs_count_from": 0, "epochs_done": len(self.history)}
        tail = {
            "best": {"epoch": best["epoch"], **_without_matrix(best["test"])},
            "last": {"epoch": last["epoch"], **_without_matrix(last["test"])},
        }
        history = ", ".join(self._json)
        text = f'{to_json(head)[:-2]}, "history": [{history}], {to_json(tail)[1:]}'
        write_text(self._path("summary.json"), text)

    def _tensorboard(self):
        if self._writer is not None:
            self._scalars(self.history[-1])
        else:  # the first epoch of this process: write all epochs, then drop the older files
            # the writer of the main thread: a SummaryWriter's own thread dies unseen when the disk is full, and the
            # process then waits for it for ever
            from tensorboardX.event_file_writer import EventsWriter

            old = glob.glob(os.path.join(glob.escape(self.folder), "events.out.tfevents.*"))
            self._writer = EventsWriter(self._path("events"), f".{os.getpid()}.{time.time_ns()}")
            for record in self.history:
                self._scalars(record)
            self._writer.flush()
            for path in old:
                os.unlink(path)
        self._writer.flush()

    def _scalars(self, record):
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        def add(tag, value):
            if value is not None and math.isfinite(value):
                event = Event(wall_time=record["time"], step=record["epoch"], summary=scalar(tag, value))
                self._writer.write_event(event)

        for part in ("train", "test"):
            for name in ("loss", "acc1", "acc5"):
                add(f"{part}/{name}", record[part][name])
        for name in ("class_mean", "many", "medium", "few"):
            add(f"test/{name}", record["test"][name])
        add("lr", record["stage"]["lr"])
        if len(self.class_names) <= MAX_CLASSES_IN_TENSORBOARD:
            for tag, values in (("class_accuracy", record["test"]["per_class"]), ("ib_factor", record["ib_factor"])):
                for name, value in zip(self.class_names, values or [], strict=False):
                    add(f"{tag}/{name.encode(errors='replace').decode()}", value)


def _train_row(record):
    values = {**record["train"], **record["stage"], "loss": record["train"]["loss"]}
    values |= {"epoch_from_0": record["epoch"], "criterion": record["stage"]["loss"]}
    return [_cell(values[name]) for name in TRAIN_COLUMNS]


def _test_row(record, history):
    so_far = history[: record["epoch"] - history[0]["epoch"] + 1]
    values = {**record["test"], "epoch_from_0": record["epoch"], "best_acc1": best_epoch(so_far)["test"]["acc1"]}
    values["val_class_mean"] = record["val"]["class_mean"] if record.get("val") else None
    return [_cell(values[name]) for name in TEST_COLUMNS]


def _class_row(record):
    return [record["epoch"], *map(_cell, record["test"]["per_class"])]


def _without_matrix(test):
    return {name: value for name, value in test.items() if name != "confusion"}


def _csv(rows):
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


class Progress:
    """A bar with the time left on a terminal, a plain line every `print_freq` batches elsewhere."""

    def __init__(self, epochs: int, print_freq: int, stream: IO[str] | None = None) -> None:
        self.epochs, self.print_freq = epochs, max(print_freq, 1)
        self.stream = stream or sys.stdout
        self.seconds = []  # of the epochs done in this process

    def epoch(self, epoch: int, batches: int, lr: float) -> None:
        self.number, self.batches, self.lr, self.started = epoch, batches, lr, time.monotonic()
        self.bar = None
        if self.stream.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=batches, desc=f"epoch {epoch + 1}/{self.epochs}", leave=False, file=self.stream)

    def due(self, batch: int) -> bool:
        """Whether figures are wanted after this batch (counted from 0): every print_freq, and the very first."""
        return (batch + 1) % self.print_freq == 0 or (batch == 0 and not self.seconds)

    def show(self, batch: int, figures: dict) -> None:
        left = self._time_left(batch + 1)
        text = f"loss {figures['loss']:.4f}  acc1 {figures['acc1']:.2f}"
        if self.bar is not None:
            self.bar.update(batch + 1 - self.bar.n)
            self.bar.set_postfix_str(f"{text}, run ends in {left}")
        else:
            where = f"epoch {self.number + 1}/{self.epochs}  batch {batch + 1}/{self.batches}"
            print(f"{where}  lr {self.lr:g}  {text}  left {left}", file=self.stream, flush=True)

    def done(self, seconds: float, line: str) -> None:
        if self.bar is not None:
            self.bar.close()
        self.seconds.append(seconds)
        print(line, file=self.stream, flush=True)

    def _time_left(self, batches_done):
        elapsed = time.monotonic() - self.started
        epoch = self.seconds[-1] if self.seconds else elapsed / batches_done * self.batches
        return duration(max(epoch - elapsed, 0) + epoch * (self.epochs - self.number - 1))


def epoch_line(record: dict, history: Sequence[dict], epochs: int) -> str:
    """What an epoch came to, for people."""
    test, best = record["test"], best_epoch(history)
    groups = " ".join(f"{name} {format_metric(test[name])}" for name in ("many", "medium", "few"))
    parts = [
        f"epoch {record['epoch'] + 1}/{epochs} done in {record['seconds']:.1f} s",
        f"{record['stage']['loss']} loss {record['train']['loss']:.4f}",
        f"test acc1 {test['acc1']:.2f} acc5 {test['acc5']:.2f}",
        groups,
        f"best {best['test']['acc1']:.2f} (epoch {best['epoch'] + 1})",
    ]
    return "  ".join(parts)
