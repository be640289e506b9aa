"""The tables of the pages, made from the records: `python -m paper.pages README.md docs/results/*.md` makes them again.

A table stands below a comment that names its kind and, for each folder of results/, its rows:

    <!-- table accuracy
    cifar10_lt100: CE; IB
    -->
"""

import collections
import functools
import json
import pathlib
import re
import sys
from collections.abc import Callable
from statistics import fmean, stdev
from typing import Any

from paper import records, report, rows, runs

RESULTS = pathlib.Path(__file__).parents[1] / "results"
MARKED = re.compile(r"<!-- table (.+)\n((?:.+\n)+?)-->\n((?:\|.*\n)*)")
ENDPOINTS = ("best", "plateau", "last")


def made_again(page: str) -> str:
    """The text of a page, with every marked table made from the records."""

    def make(found):
        kind, *base = found[1].split(" over ")
        named = [line.split(": ") for line in found[2].splitlines()]
        chosen = [(label, folder) for folder, labels in named for label in labels.split("; ")]
        heads, lines = apart(named) if kind == "apart" else KINDS[kind](chosen, *base)
        data = [] if kind == "apart" else [_data(folder, label) for label, folder in chosen]
        if len(set(data)) > 1:  # a column that tells the folders apart
            heads, lines = ["data", *heads], [[name, *line] for name, line in zip(data, lines, strict=True)]
        return "\n".join([f"<!-- table {found[1]}", f"{found[2]}-->", *report.table(heads, lines)])

    return MARKED.sub(make, page)


def apart(named):
    """How far two runs are apart: each line of the marker names what differs, and the files of two records."""
    lines = []
    for what, paths in named:
        one, other = (json.loads((RESULTS / f"{path}.json").read_text()) for path in paths.split("; "))
        lines.append([what, *(f"{abs(reached(one, when) - reached(other, when)):.2f}" for when in ENDPOINTS)])
    return ["what differs", *ENDPOINTS], lines


def _data(folder, label):
    record = of_folder(folder)[label][0]
    machine = record["device"].removeprefix("NVIDIA ").replace("cpu", "CPU")
    return f"{rows.DATASETS[record['settings']['dataset']]}, {machine}"


@functools.cache
def of_folder(folder: str) -> dict[str, list[dict]]:
    """{row: its records, one a seed} of a folder of results/, for the data and the ratio of most of its rows."""
    found = rows.group(records.read(RESULTS / folder)[0])[0]
    place = collections.Counter(row.place for row in found).most_common(1)[0][0]
    return {row.label: of_seeds for row, of_seeds in found.items() if row.place == place}


def reached(record: dict, when: str, name: str = "acc1") -> Any:
    """A figure of the best or the last epoch, or its mean over the last tenth of the epochs (when: 'plateau').

    Percent; None for a group without classes.
    """
    if when != "plateau":
        return record[when][name]
    figures = [epoch["test"][name] for epoch in record["history"][-max(1, len(record["history"]) // 10) :]]
    return None if None in figures else fmean(figures)


def shown(values: list, sign: str = "") -> str:
    """Mean, and ± sample standard deviation of two or more."""
    if not values or None in values:
        return "n/a"
    return f"{fmean(values):{sign}.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")


def accuracy(chosen):
    """Top-1 of each row beside Table 4's."""
    lines = []
    for label, folder in chosen:
        found = of_folder(folder)[label]
        figures = [shown([reached(record, when) for record in found]) for when in ENDPOINTS]
        lines.append([label, published(label, found[0]), len(found), *figures])
    return ["method", "published", "n", *ENDPOINTS], lines


def groups(chosen):
    """The groups of classes, on the plateau."""
    lines = []
    for label, folder in chosen:
        found = of_folder(folder)[label]
        names = ("class_mean", "many", "medium", "few")
        lines.append([label, len(found), *(shown([reached(r, "plateau", name) for r in found]) for name in names)])
    return ["plateau", "n", "class mean", "many", "medium", "few"], lines


def gain(chosen, base):
    """Top-1 of each row minus that of `base`, seed by seed, where both share their first phase."""
    lines = []
    for label, folder in chosen:
        found, others = of_folder(folder)[label], of_folder(folder).get(base, [])
        pairs = [(one, other) for one in found for other in others if share_first_phase(one, other)]
        figures = [shown([reached(one, w) - reached(other, w) for one, other in pairs], "+") for w in ENDPOINTS]
        both = [published(name, found[0]) for name in (label, base)]
        lines.append([label, "" if "" in both else f"{float(both[0]) - float(both[1]):+.2f}", len(pairs), *figures])
    return [f"minus {base}", "published", "n", *ENDPOINTS], lines


KINDS: dict[str, Callable[..., tuple[list, list]]] = {"accuracy": accuracy, "groups": groups, "gain": gain}


def published(label: str, record: dict) -> str:
    """What the authors print in Table 4 for the method, in the data and the length of the record, or ''."""
    settings = record["settings"]
    if settings["epochs"] != runs.SETUPS[settings["dataset"]].epochs:
        return ""
    place = (settings["dataset"], settings["imb_type"], round(1 / settings["imb_factor"]))
    for cell in runs.published():
        same = (cell["dataset"], cell["imb_type"], cell["ratio"]) == place and cell["whose"] == "authors"
        if same and cell["table"] == "4" and runs.titled(cell["method"], cell["variant"]) == label:
            return f"{cell['value']:.2f}"
    return ""


def share_first_phase(one: dict, other: dict) -> bool:
    """Whether the test figures of the epochs before the later loss agree: one is a fork of the other's first phase."""
    start = min(record["settings"]["start_ib_epoch"] for record in (one, other))
    first, second = ([epoch["test"]["acc1"] for epoch in record["history"][:start]] for record in (one, other))
    return first == second


if __name__ == "__main__":
    for path in map(pathlib.Path, sys.argv[1:]):
        path.write_text(made_again(path.read_text()))
