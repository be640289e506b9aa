"""The tables of the pages, made from the records. `python -m paper.pages README.md docs/factor.md docs/results.md
docs/results/*.md` makes them again.

A table stands below a comment that names its kind and, for each folder of results/, its rows:

    <!-- table accuracy
    cifar10_lt100: CE; IB
    -->

The tables of `paper.factor` have the kinds 'factor runs', 'factor ratios' and so on.
"""

import collections
import functools
import pathlib
import re
import sys
from typing import Any

from files import write_text
from paper import factor, records, report, rows
from paper.rows import WHEN, Row, gaps, values

RESULTS = pathlib.Path(__file__).parents[1] / "results"
MARKED = re.compile(r"<!-- table (.+)\n((?:.+\n)+?)-->\n((?:\|.*\n)*)")
GROUPS = ("class_mean", "many", "medium", "few")


def made_again(page: str) -> str:
    """The text of a page, with every marked table made from the records."""

    def make(found):
        kind, *base = found[1].split(" over ")
        named = [line.split(": ") for line in found[2].splitlines()]
        if kind.startswith("factor "):
            heads, lines = of_experiment(named[0][0])[kind.removeprefix("factor ")]
        else:
            heads, lines = apart(named) if kind == "apart" else _of_rows(kind, named, *base)
        return "\n".join([f"<!-- table {found[1]}", f"{found[2]}-->", *report.table(heads, lines)])

    return MARKED.sub(make, page)


def apart(named):
    """How far two runs are apart: each line of the marker names what differs, and the files of two records."""
    lines = []
    for what, paths in named:
        both: Any = tuple(records.load(RESULTS / f"{path}.json") for path in paths.split("; "))
        lines.append([what, *(f"{abs(gaps([both], when, 'acc1')[0]):.2f}" for when in WHEN)])
    return ["what differs", *WHEN], lines


def _of_rows(kind, named, base=None):
    """Heads and lines of the rows that a marker names; a column tells the data apart where they differ."""
    heads = {
        "accuracy": ["method", "published", "n", *WHEN],
        "groups": ["plateau", "n", "class mean", "many", "medium", "few"],
        "gain": [f"minus {base}", "published", "n", *WHEN],
    }[kind]
    lines, data = [], []
    for folder, label in [(folder, label) for folder, labels in named for label in labels.split("; ")]:
        here = of_folder(folder)
        row, found = here[label]
        printed, whens = rows.published(row), [(when, "acc1") for when in WHEN]
        both: Any = found
        if kind == "groups":
            whens = [("plateau", name) for name in GROUPS]
        elif kind == "gain":
            base_row, _ = here[base]
            both, of_base = rows.pairs(dict(here.values()), row, base_row), rows.published(base_row)
            printed = None if printed is None or of_base is None else printed - of_base
        sign = "+" if kind == "gain" else ""
        cells = [] if kind == "groups" else ["" if printed is None else f"{printed:{sign}.2f}"]
        figures = [gaps(both, *when) if sign else values(both, *when) for when in whens]
        lines.append([label, *cells, len(both), *(report.mean_and_spread(of, sign=sign) for of in figures)])
        machine = found[0]["device"].removeprefix("NVIDIA ").replace("cpu", "CPU")
        data.append(f"{rows.DATASETS[row.run.dataset]}, {machine}")
    if len(set(data)) > 1:
        heads, lines = ["data", *heads], [[name, *line] for name, line in zip(data, lines, strict=True)]
    return heads, lines


@functools.cache
def of_experiment(folder: str) -> dict[str, tuple[list[str], list[list[Any]]]]:
    """`factor.tables` of a folder of results/."""
    return factor.tables(factor.read(RESULTS / folder))


@functools.cache
def of_folder(folder: str) -> dict[str, tuple[Row, list[dict[str, Any]]]]:
    """{label: row and its records} of a folder of results/, for the data and the ratio of most of its rows."""
    found = rows.group(records.read(RESULTS / folder)[0])[0]
    place = collections.Counter(row.place for row in found).most_common(1)[0][0]
    return {row.label: (row, of_seeds) for row, of_seeds in found.items() if row.place == place}


if __name__ == "__main__":
    for path in map(pathlib.Path, sys.argv[1:]):
        write_text(path, made_again(path.read_text(encoding="utf-8")))
