"""The rows of a report: which records belong together, what they are called, and which may be compared."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from experiment.records import plateau
from paper import records, runs
from training.registry import all_constants

DATASETS = {
    "cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "digits": "Digits", "tinyimagenet": "Tiny ImageNet",
    "inaturalist": "iNaturalist 2018",
}  # fmt: skip
IMBALANCES = {"exp": "exponential", "step": "step"}
#: What `when` may be: the run's best epoch, the mean over the last tenth of its epochs, its last epoch.
WHEN = ("best", "plateau", "last")


class Row(NamedTuple):
    """The runs of one row: their Run with seed 0, and the settings that are not its own."""

    run: runs.Run
    difference: records.Differences = ()

    @property
    def label(self) -> str:
        """Method, variant, another subset, settings that are not the paper's."""
        differs = ", ".join(f"{name} {value}" for name, value in self.difference)
        subset = f", subset {self.run.subset}" if self.run.subset else ""
        return self.run.title + subset + (f", but {differs}" if differs else "")

    @property
    def place(self) -> tuple[str, str, int, str]:
        """What tells one table of runs from another; a run of other epochs than its protocol's is in none of both."""
        epochs = dict(self.difference).get("epochs")
        protocol = f"{epochs} epochs" if epochs and self.run.protocol != "own" else self.run.protocol
        return self.run.dataset, self.run.imb_type, self.run.ratio, protocol

    @property
    def metric(self) -> str:
        """What rows are compared by: top-1, on data sets that the paper does not have the class mean."""
        return "class_mean" if self.run.protocol == "own" else "acc1"


#: The records of each row, one a seed.
Rows = dict[Row, list[dict[str, Any]]]


def group(found: Iterable[tuple[str, dict[str, Any]]]) -> tuple[Rows, list[str]]:
    """The rows in the paper's order, their records by seed, and a line for each record that has no row.

    A run that is found twice counts once; two different runs of one seed are left out.
    """
    same, seeds, left_out = collections.defaultdict(dict), collections.defaultdict(list), []
    identified = [(path, record, *records.identify(record)) for path, record in found]
    usual = _usual_settings(identified)
    for path, record, run, difference in identified:
        if run.protocol == "own":
            difference = tuple(d for d in difference if d not in usual[run.dataset, run.imb_type, run.ratio])
        curve = tuple(round(epoch["test"]["acc1"], 4) for epoch in record["history"])
        same[run, difference].setdefault(curve, (path, record))
    for (run, difference), curves in sorted(same.items(), key=lambda item: item[0][0].seed):
        if len(curves) > 1:
            paths = " and ".join(path for path, _ in curves.values())
            left_out.append(f"{paths}: different runs of one seed; keep one of them")
            continue
        seeds[Row(dataclasses.replace(run, seed=0), difference)] += [record for _, record in curves.values()]
    return {row: seeds[row] for row in sorted(seeds, key=order)}, left_out


def order(row: Row) -> tuple:
    """A key to sort rows by: places, the paper's methods in its order, other ones, variants, subsets."""
    methods, run = list(runs.METHODS), row.run
    at = methods.index(run.method) if run.method in methods else len(methods)
    return row.place, at, run.method, list(runs.VARIANTS).index(run.variant), run.subset, row.difference


def _usual_settings(identified):
    """{place: the (setting, value) that most records have} of the data sets that the paper does not have.

    The constants of methods are not among them: with one a method is another.
    """
    counts = collections.defaultdict(collections.Counter)
    for _, _, run, difference in identified:
        if run.protocol == "own":
            ours = [one for one in difference if one[0] not in all_constants()]
            counts[run.dataset, run.imb_type, run.ratio].update(ours)
    rising = {place: sorted(of.items(), key=lambda item: (item[1], item[0])) for place, of in counts.items()}
    return {place: set({one[0]: one for one, _ in of}.values()) for place, of in rising.items()}


def by_place(rows: Rows) -> dict[tuple[str, str, int, str], Rows]:
    """The rows of each place, in the order in which the places first appear."""
    places = collections.defaultdict(dict)
    for row, found in rows.items():
        places[row.place][row] = found
    return places


def shared(here: Iterable[Row]) -> set[tuple[str, str]]:
    """What sets all of several rows apart from their Runs; nothing for one row."""
    differences = [set(row.difference) for row in here]
    return set.intersection(*differences) if len(differences) > 1 else set()


def labels(here: Rows) -> tuple[dict[Row, str], records.Differences]:
    """What the rows of a place are called there: their labels without the settings that all share, and those."""
    of_all = shared(here)
    named = {row: Row(row.run, tuple(one for one in row.difference if one not in of_all)).label for row in here}
    return named, tuple(one for one in next(iter(here)).difference if one in of_all)


def title(where: tuple[str, str, int, str]) -> str:
    """A place as a heading.

    >>> title(("cifar10", "exp", 100, "short"))
    'CIFAR-10, exponential imbalance, ratio 100, short length'
    >>> title(("my_images", "none", 1, "own"))
    'my_images, as the data are'
    >>> title(("cifar10", "pareto", 10, "full"))
    'CIFAR-10, pareto imbalance, ratio 10, full length'
    """
    dataset, imb_type, ratio, protocol = where
    shape = f"{IMBALANCES.get(imb_type, imb_type)} imbalance, ratio {ratio}"
    shape = "as the data are" if imb_type == "none" else shape
    length = {"full": ", full length", "short": ", short length", "own": ""}.get(protocol, f", {protocol}")
    return f"{DATASETS.get(dataset, dataset)}, {shape}{length}"


def values(found: Iterable[dict[str, Any]], when: str, metric: str) -> list[Any]:
    """A figure of each record, None where it has none; when: one of WHEN. 'val' is the class mean of the validation
    images, of the plateau alone."""
    tests = [plateau(record["history"]) if when == "plateau" else record[when] for record in found]
    return [(of.get("val") or {}).get("class_mean") if metric == "val" else of.get(metric) for of in tests]


def gaps(both: Sequence[tuple[dict[str, Any], dict[str, Any]]], when: str, metric: str) -> list[float]:
    """The first minus the second of each pair of records."""
    mine, theirs = (values([pair[i] for pair in both], when, metric) for i in (0, 1))
    return [one - other for one, other in zip(mine, theirs, strict=True)]


def published(row: Row) -> float | None:
    """The figure of the paper's Table 4 or 5 for the row, None where there is none of the same experiment."""
    if row.run.protocol != "full" or row.difference:
        return None
    cells = (c for c in runs.published() if c["table"] in "45" and c["same_experiment"] and row.run in runs.runs_of(c))
    return next((cell["value"] for cell in cells), None)


def by_seed(found: Iterable[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """The records by their seeds."""
    return {record["settings"]["seed"]: record for record in found}


def one_image(found: Iterable[dict[str, Any]]) -> float:
    """What one test image is worth, in points."""
    return max(100 / (record["last"].get("seen") or 10_000) for record in found)


# ------------------------------------------------------------------------------------------ what may be compared


def share_first_phase(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """False for two runs that both start with plain CE whose figures differ: neither is a fork of the other's first
    phase. True for methods that differ from the first epoch on.

    The last of the common epochs may differ: cRT trains the last epoch of CE again, on a GPU with other bits.
    """
    same = []
    for mine, theirs in zip(one["history"], other["history"], strict=False):
        same_lr = math.isclose(mine["stage"]["lr"], theirs["stage"]["lr"], rel_tol=1e-3)  # small records are rounded
        if not (_is_plain(mine) and _is_plain(theirs) and same_lr):
            break
        same.append(round(mine["test"]["acc1"], 4) == round(theirs["test"]["acc1"], 4))
    return all(same[:-1] or same)


def _is_plain(epoch):
    """Whether it is an epoch of plain CE."""
    stage = epoch["stage"]
    return stage["loss"] == "CE" and stage["class_weights"] == stage["sampler"] == "none"


def may_be_compared(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two runs of one seed have one precision and, see `share_first_phase`, one first phase."""
    return records.precision(one) == records.precision(other) and share_first_phase(one, other)


def pairs(found: Rows, one: Row, other: Row) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Records of the two rows for every seed that both have: of one choice of images, one precision, one first phase,
    and of settings that differ in constants of the methods alone. Rows of one Run may differ in all but the images."""
    if one.run.subset != other.run.subset:
        return []
    mine, theirs = by_seed(found[one]), by_seed(found[other])
    both = [(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
    if one.run == other.run:
        return both
    if _conditions(one) != _conditions(other):
        return []
    return [pair for pair in both if may_be_compared(*pair)]


def _conditions(row):
    """The settings of a row that are no constants of its method; of own data a method brings its lengths, too."""
    own = {*all_constants(), *(records.SCHEDULE if row.run.protocol == "own" else ())}
    return {one for one in row.difference if one[0] not in own}


def first_phases(here: Rows) -> dict[Row, str]:
    """A letter for each first phase among the rows of a place: 'A', or where the seeds have several 'A, B, A'.

    Empty where no seed has two. Two rows of the same seeds with the same letters started from the same epochs.
    """
    letters, several = collections.defaultdict(list), False
    for seed in sorted({seed for found in here.values() for seed in by_seed(found)}):
        phases: list[dict] = []
        for row, found in here.items():
            record = by_seed(found).get(seed)
            if record and _is_plain(record["history"][0]):
                at = next((i for i, other in enumerate(phases) if share_first_phase(record, other)), len(phases))
                phases += [record] * (at == len(phases))
                letters[row].append(chr(ord("A") + at))
        several = several or len(phases) > 1
    short = {row: found if len({*found}) > 1 else found[:1] for row, found in letters.items()}
    return {row: ", ".join(found) for row, found in short.items()} if several else {}
