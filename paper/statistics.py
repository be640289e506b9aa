"""When a difference is one: intervals from Student's t. Pure.

Published against ours: the mean of n future runs, predicted from a published mean of m runs of the same experiment,
lies within t(1 - LEVEL / 2, degrees of freedom) * s * sqrt(1 / n + 1 / m) of it (prediction interval for a mean:
Hahn and Meeker, Statistical Intervals, 1991, section 4.7). s is the spread between seeds, pooled over cells; the cells
are taken to have one spread. Ours against ours: a paired t-test over the seeds that both have.
"""

import functools
import math
from collections.abc import Iterable, Sequence
from statistics import stdev
from typing import NamedTuple

from scipy.stats import t as student

#: Share of false "yes" where nothing differs.
LEVEL = 0.05


class Spread(NamedTuple):
    """An estimate of the standard deviation between seeds, in percent points, and its degrees of freedom."""

    value: float
    degrees: int


def pooled(cells: Iterable[Sequence[float]], hints: Iterable[Spread] = ()) -> Spread | None:
    """The spread within cells: each a list of accuracies, one a seed. Cells of one seed add nothing.

    Args:
        hints: spreads from elsewhere, pooled with ours.

    Returns:
        None where no cell has two seeds: hints alone do not tell our spread.
    """
    spreads = [Spread(stdev(cell), len(cell) - 1) for cell in cells if len(cell) > 1]
    if not spreads:
        return None
    spreads += hints
    degrees = sum(spread.degrees for spread in spreads)
    squares = math.fsum(spread.value**2 * spread.degrees for spread in spreads)
    return Spread(math.sqrt(squares / degrees), degrees)


@functools.cache
def quantile(degrees: int) -> float:
    """The two-sided quantile of Student's t at LEVEL.

    >>> round(quantile(2), 3)
    4.303
    """
    return float(student.ppf(1 - LEVEL / 2, degrees))


def limit(spread: Spread, ours: int, published: int) -> float:
    """Half the width of the prediction interval for the difference of two means of so many runs."""
    return quantile(spread.degrees) * spread.value * math.sqrt(1 / ours + 1 / published)


def paired_limit(differences: Sequence[float]) -> float | None:
    """Half the width of the interval of the mean difference over seeds; None for fewer than two seeds."""
    if len(differences) < 2:
        return None
    return quantile(len(differences) - 1) * stdev(differences) / math.sqrt(len(differences))


def verdict(differences: Sequence[float], limits: Sequence[float | None]) -> str:
    """'yes' or 'no', where every view (best epoch, last epoch) says so and with the same sign; else '?'."""
    signs = set()
    for difference, within in zip(differences, limits, strict=True):
        if within is None:
            return "?"
        signs.add(0 if abs(difference) <= within else math.copysign(1, difference))
    if len(signs) > 1:
        return "?"
    return "no" if signs == {0} else "yes"
