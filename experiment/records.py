"""What a run leaves in its log folder: CSV files, TensorBoard events, summary.json.

The history (one dict per epoch) in the checkpoint is the truth. Files are made from it when a run starts or resumes,
so a line cut by a crash is mended and no epoch is duplicated. CSV files and TensorBoard get a row after each epoch,
summary.json is written with each checkpoint. Files count epochs from 0, as the published flags do; what is printed for
the user and drawn in figures counts from 1.
"""

import csv
import glob
import io
import json
import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from files import errors_name, write_text
from training.metrics import CLASS_FIGURES

#: Scalars of each class go to TensorBoard up to this many classes.
MAX_CLASSES_IN_TENSORBOARD = 200

TRAIN_COLUMNS = ("epoch_from_0", "lr", "loss", "acc1", "acc5", "criterion", "class_weights", "sampler", "seconds")


def best_epoch(history: Sequence[dict]) -> dict:
    """The record of the best epoch: by top-1 on the test set, or by mean class accuracy on the validation set.

    Only epochs with the validation set of the last one count, as a fork may have another set, or none. The first epoch
    wins a tie.
    """
    sets = [(record.get("val") or {}).get("seen") for record in history]
    of_last = [record for record, images in zip(history, sets, strict=True) if images == sets[-1]]
    return max(of_last, key=lambda record: (record["score"], -record["epoch"]))


def plateau(history: Sequence[dict]) -> dict[str, Any]:
    """Means over the last tenth of the epochs, 180 to 199 of 200, counted from 0: figures that no epoch was chosen for.

    Of a run whose last stage is shorter (cRT's new head), over that stage.

    Returns:
        each figure of the tests, None where an epoch lacks it; `val`: class_mean and acc1 of the validation set, where
        there is one; `epochs`: how many they are.
    """
    tail = history[-max(1, (history[-1]["epoch"] + 1) // 10) :]
    tail = [record for record in tail if {**record["stage"], "lr": 0} == {**tail[-1]["stage"], "lr": 0}]
    tests, vals = [record["test"] for record in tail], [record.get("val") for record in tail]
    names = [name for name, value in tests[-1].items() if value is None or isinstance(value, (int, float))]
    found: dict[str, Any] = {"epochs": len(tail), **{name: _mean(tests, name) for name in names}}
    if all(vals):
        found["val"] = {name: _mean(vals, name) for name in ("class_mean", "acc1")}
    return found


def _mean(tests, name):
    values = [test.get(name) for test in tests]
    return None if None in values else fmean(values)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON text with a final newline; what is not finite becomes null, which every reader of JSON takes."""

    def finite(value):
        if isinstance(value, float):
            return value if math.isfinite(value) else None
        if isinstance(value, Mapping):
            return {name: finite(item) for name, item in value.items()}
        return [finite(item) for item in value] if isinstance(value, (list, tuple)) else value

    return json.dumps(finite(value), indent=indent) + "\n"


class Records:
    """The files of one run.

    Args:
        folder: of the logs.
        class_names: K names.
        info: what does not change during the run (settings, versions, split), for summary.json.
        history: records of the epochs already done.
    """

    def __init__(self, folder: str, class_names: Sequence[str], info: dict, history: Sequence[dict] = ()) -> None:
        self.folder, self.class_names, self.info = folder, class_names, info
        self.history = list(history)
        self._events: Any = None
        os.makedirs(folder, exist_ok=True)
        write_text(self._path("args.json"), to_json(info["settings"], indent=1))
        for name, header, row in self._tables():
            write_text(self._path(name), csv_text([header, *(row(record) for record in self.history)]))
        if self.history:
            self._write_events()
            self.write_summary(self.history)

    def add(self, record: dict) -> None:
        """Add an epoch's record to the CSV files and to TensorBoard."""
        self.history.append(record)
        with errors_name(self.folder):
            for name, _, row in self._tables():
                with open(self._path(name), "a", encoding="utf-8", errors="surrogateescape", newline="") as file:
                    file.write(csv_text([row(record)]))
            self._write_events()

    def write_summary(self, history: Sequence[dict]) -> None:
        """Write summary.json: the facts of the run, the record of each epoch, and dict(best, last, plateau)."""
        counts = {"epochs_count_from": 0, "epochs_done": len(history)}
        ends = {"best": best_epoch(history), "last": history[-1]}
        found = {name: {"epoch": record["epoch"], **record["test"]} for name, record in ends.items()}
        content = {**self.info, **counts, "history": history, **found, "plateau": plateau(history)}
        write_text(self._path("summary.json"), to_json(content))

    def close(self) -> None:
        if self._events is not None:
            with errors_name(self.folder):
                self._events.close()

    def _path(self, name):
        return os.path.join(self.folder, name)

    def _tables(self):
        """(file name, header, function from an epoch's record to its row) of each CSV file."""
        return (
            ("log_train.csv", TRAIN_COLUMNS, _train_row),
            ("log_test.csv", _test_columns(), lambda record: _test_row(record, self.history)),
            ("class_accuracy.csv", ("epoch_from_0", *self.class_names), _class_row),
        )

    def _write_events(self):
        if self._events is not None:
            self._write_scalars(self.history[-1])
            self._events.flush()
            return
        # the first epoch of this process: write all epochs, then remove the older files. The writer of the main thread:
        # a SummaryWriter's own thread dies unseen when the disk is full, and the process then waits for it for ever
        from tensorboardX.event_file_writer import EventsWriter

        old = glob.glob(os.path.join(glob.escape(self.folder), "events.out.tfevents.*"))
        self._events = EventsWriter(self._path("events"), f".{os.getpid()}.{time.time_ns()}")
        for record in self.history:
            self._write_scalars(record)
        self._events.flush()
        for path in old:
            os.unlink(path)

    def _write_scalars(self, record):
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        def add(tag, value):
            if value is not None and math.isfinite(value):
                event = Event(wall_time=record["time"], step=record["epoch"], summary=scalar(tag, value))
                self._events.write_event(event)

        for part, names in (("train", ()), ("test", CLASS_FIGURES)):
            for name in ("loss", "acc1", "acc5", *names):
                add(f"{part}/{name}", record[part].get(name))
        add("val/class_mean", (record.get("val") or {}).get("class_mean"))
        add("lr", record["stage"]["lr"])
        if len(self.class_names) <= MAX_CLASSES_IN_TENSORBOARD:
            for tag, values in (("class_accuracy", record["test"]["per_class"]), ("ib_factor", record["ib_factor"])):
                for name, value in zip(self.class_names, values or [], strict=False):
                    add(f"{tag}/{name.encode(errors='replace').decode()}", value)


def _train_row(record):
    stage = {**record["stage"], "criterion": record["stage"]["loss"], "epoch_from_0": record["epoch"]}
    values = {**stage, **record["train"]}
    return [_cell(values.get(name)) for name in TRAIN_COLUMNS]


def _test_columns():
    return ("epoch_from_0", "acc1", "acc5", "loss", "best_acc1", *CLASS_FIGURES, "val_class_mean", "seconds")


def _test_row(record, history):
    so_far = history[: record["epoch"] - history[0]["epoch"] + 1]
    values = {**record["test"], "epoch_from_0": record["epoch"], "best_acc1": best_epoch(so_far)["test"]["acc1"]}
    values["val_class_mean"] = record["val"]["class_mean"] if record.get("val") else None
    return [_cell(values.get(name)) for name in _test_columns()]


def _class_row(record):
    return [record["epoch"], *map(_cell, record["test"]["per_class"])]


def _cell(value):
    """A figure in a CSV file; n/a for one that an older checkpoint's history lacks, too."""
    return "n/a" if value is None else value


def csv_text(rows: Iterable[Sequence]) -> str:
    """CSV with a line feed after each row."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
