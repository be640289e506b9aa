"""The rows of a report: which records belong together, and what they are called."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from paper import records, runs

DATASETS = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "Digits", "tinyimagenet": "Tiny ImageNet",
    "inaturalist": "iNaturalist 2018",
}  # fmt: skip
IMBALANCES = {"exp": "exponential", "step": "step"}


class Row(NamedTuple):
    """The runs of one row: their Run with seed 0, and the settings that are not its own."""

    run: runs.Run
    difference: tuple[records.Difference, ...] = ()

    @property
    def label(self) -> str:
        """Method, variant, another subset, settings that are not the paper's."""
        differs = ", ".join(f"{name} {value}" for name, value in self.difference)
        subset = f", subset {self.run.subset}" if self.run.subset else ""
        return self.run.title + subset + (f", but {differs}" if differs else "")

    @property
    def place(self) -> tuple[str, str, int, str]:
        """What tells one table of runs from another."""
        return self.run.dataset, self.run.imb_type, self.run.ratio, self.run.protocol


#: The records of each row, one a seed.
Rows = dict[Row, list[dict[str, Any]]]


def group(found: Iterable[tuple[str, dict[str, Any]]]) -> tuple[Rows, list[str]]:
    """The rows in the paper's order, their records by seed, and a line for each record that has no row.

    A run that is found twice counts once; two different runs of one seed are all left out, and so are two seeds with
    one history, of which one is a copy.
    """
    same, seeds, left_out = collections.defaultdict(dict), collections.defaultdict(list), []
    for path, record in found:
        run, difference = records.identify(record)
        if run is None:
            left_out.append(f"{path}: a method or a data set that the paper does not have")
            continue
        curve = tuple(round(epoch["test"]["acc1"], 4) for epoch in record["history"])
        same[run, difference].setdefault(curve, (path, record))
    for (run, difference), curves in sorted(same.items(), key=lambda item: item[0][0].seed):
        if len(curves) > 1:
            paths = " and ".join(path for path, _ in curves.values())
            left_out.append(f"{paths}: different runs of one seed; keep one of them")
            continue
        seeds[Row(dataclasses.replace(run, seed=0), difference)] += curves.values()
    rows = {}
    for row, of_seeds in seeds.items():
        histories = collections.defaultdict(list)
        for path, record in of_seeds:
            histories[_history(record)].append((path, record))
        for copies in histories.values():
            if len(copies) > 1:
                paths = " and ".join(path for path, _ in copies)
                left_out.append(f"{paths}: the same history under different seeds; keep the true one")
        rows[row] = [copies[0][1] for copies in histories.values() if len(copies) == 1]
    methods, variants = list(runs.METHODS), list(runs.VARIANTS)

    def order(row):
        return row.place, methods.index(row.run.method), variants.index(row.run.variant), row.run.subset, row.difference

    return {row: rows[row] for row in sorted(rows, key=order) if rows[row]}, left_out


def _history(record):
    """The figures of all epochs, the same for a run's summary.json and for the small record made from it."""
    figures = [[epoch["train"]["loss"], *map(epoch["test"].get, records.TEST_FIGURES)] for epoch in record["history"]]
    return str(records.rounded(figures))


def title(where: tuple[str, str, int, str]) -> str:
    """A place for people.

    >>> title(("cifar10", "exp", 100, "short"))
    'CIFAR-10, exponential imbalance, ratio 100, short length'
    """
    dataset, imb_type, ratio, protocol = where
    shape = f"{IMBALANCES[imb_type]} imbalance, ratio {ratio}" if imb_type in IMBALANCES else "as the data are"
    return f"{DATASETS[dataset]}, {shape}, {protocol} length"


def values(found: Iterable[dict[str, Any]], when: str, metric: str) -> list[Any]:
    """A figure of each record; when: 'best' or 'last'."""
    return [record[when][metric] for record in found]
