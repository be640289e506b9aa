"""The small record of a finished run, and reading records: settings, versions, split, per-epoch figures."""

import json
import pathlib

from training.checkpoint import write_atomically

#: Settings that say where a run was, not what it was.
PLACES = ("data_dir", "root_log", "root_model", "resume", "gpu", "workers", "print_freq", "force", "overwrite",
          "dry_run", "evaluate")  # fmt: skip
TEST_FIGURES = ("loss", "acc1", "acc5", "class_mean", "many", "medium", "few")


def collect(summary, path):
    """Write the small form of a run's summary.json to `path`: figures rounded, class accuracies best and last only."""
    text = json.dumps(small(json.loads(pathlib.Path(summary).read_text()))) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def small(summary):
    """The small form of a summary, a dict of the same shape."""
    kept = {name: value for name, value in summary.items() if name not in ("history", "settings")}
    kept["settings"] = {name: value for name, value in summary["settings"].items() if name not in PLACES}
    kept["history"] = [
        {
            "epoch": record["epoch"],
            "seconds": record["seconds"],
            "stage": record["stage"],
            "alpha": record["alpha"],
            "train": {name: record["train"][name] for name in ("loss", "acc1")},
            "test": {name: record["test"][name] for name in TEST_FIGURES},
        }
        for record in summary["history"]
    ]
    return rounded(kept)


def rounded(value):
    """Floats from 0.01 on to four digits after the point; settings untouched."""
    if isinstance(value, float):
        return value if abs(value) < 1e-2 else round(value, 4)
    if isinstance(value, dict):
        return {name: item if name == "settings" else rounded(item) for name, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value


def read(folder):
    """Every record below `folder`, of a run's own summary.json as well, sorted by path; unfinished runs left out."""
    found = []
    for path in sorted(pathlib.Path(folder).rglob("*.json")):
        try:
            record = json.loads(path.read_text())
        except (OSError, ValueError):
            continue
        is_record = isinstance(record, dict) and {"settings", "history", "best", "last"} <= record.keys()
        if is_record and record["epochs_done"] >= record["settings"]["epochs"]:
            found.append(record)
    return found
