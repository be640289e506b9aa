"""What a difference between runs shows: intervals of its mean over seeds, from Student's t. Pure.

Everything is taken of what is compared: a list of differences, one a seed. Ours against a published figure: our
accuracy of each seed minus that figure, or our gain over CE of each seed minus the published gain. Ours against ours:
the paired differences over the seeds that both have, so that a first phase which two methods share cancels. No spread
is borrowed from another cell. A published figure counts as a number; that it is one run, with an error of its own that
nobody knows, is what the margin stands for.

Equivalence is shown by two one-sided tests (Schuirmann, 1987): the 90 % interval lies inside the margin. Holm's
adjustment: Holm, 'A simple sequentially rejective multiple test procedure', 1979.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from scipy.stats import t as student

Key = TypeVar("Key")

#: Level of a difference (two-sided) and of each of the two one-sided tests of an equivalence.
LEVEL = 0.05
#: Margins in percent points: ours against a published figure, ours against ours.
MARGIN, PAIRED_MARGIN = 1.0, 0.5
#: A number of seeds beyond which none is named.
MOST_SEEDS = 100

AGREES, HIGHER, LOWER = "agrees", "higher", "lower"
ADDS, TAKES_AWAY = "adds", "takes away"
NOT_KNOWN, ONE_SEED = "not known", "one seed"


class Against(NamedTuple):
    """Ours against a published figure: seeds, mean difference, its 95 % interval, a verdict.

    verdict: 'agrees', 'higher', 'lower', 'not known', or 'one seed'; seeds: how many would decide, None where that is
    more than MOST_SEEDS, or where a verdict stands or no spread is known.
    """

    n: int
    mean: float
    interval: tuple[float, float] | None
    verdict: str
    seeds: int | None = None


class Contrast(NamedTuple):
    """Ours against ours, paired over seeds. p: of 'no difference', NaN for one seed; see `paired`."""

    n: int
    mean: float
    interval: tuple[float, float] | None
    p: float
    verdict: str


@functools.cache
def quantile(n: int, level: float) -> float:
    """The two-sided quantile of Student's t for the mean of n values at 1 - `level`.

    >>> round(quantile(3, 0.05), 3)
    4.303
    """
    return float(student.ppf(1 - level / 2, n - 1))


def half_width(differences: Sequence[float], level: float, resolution: float = 0.0) -> float:
    """Half the width of the interval of the mean at 1 - `level`; at least `resolution`, what one image is worth."""
    n = len(differences)
    return max(quantile(n, level) * _spread(differences) / math.sqrt(n), resolution)


def _mean(differences):
    return float(np.mean(differences))


def _spread(differences):
    return float(np.std(differences, ddof=1))


def against(differences: Sequence[float], margin: float = MARGIN, resolution: float = 0.0) -> Against:
    """What differences to a published figure show, one a seed, in percent points.

    'agrees': the 90 % interval of the mean lies inside ± margin. 'higher', 'lower': the 95 % interval lies outside of
    ± margin, and so without 0.

    Args:
        resolution: what one test image is worth. No interval is narrower to either side.
    """
    n, mean = len(differences), _mean(differences)
    if n < 2:
        return Against(n, mean, None, ONE_SEED)
    half = half_width(differences, LEVEL, resolution)
    interval = (mean - half, mean + half)
    if abs(mean) + half_width(differences, 2 * LEVEL, resolution) < margin:
        return Against(n, mean, interval, AGREES)
    if abs(mean) - half > margin:
        return Against(n, mean, interval, HIGHER if mean > 0 else LOWER)
    return Against(n, mean, interval, NOT_KNOWN, seeds_to_decide(abs(mean) - margin, _spread(differences)))


def seeds_to_decide(distance: float, spread: float) -> int | None:
    """The fewest seeds, three or more, that decide with this mean and this spread; None beyond MOST_SEEDS.

    Args:
        distance: of the mean difference from the margin; negative inside it.

    >>> seeds_to_decide(2.0, 0.6), seeds_to_decide(-0.9, 0.6), seeds_to_decide(0.01, 0.6)
    (3, 4, None)
    """
    level = LEVEL if distance > 0 else 2 * LEVEL
    for n in range(3, MOST_SEEDS + 1):
        if quantile(n, level) * spread / math.sqrt(n) < abs(distance):
            return n
    return None


def paired(differences: Sequence[float], margin: float = PAIRED_MARGIN, resolution: float = 0.0) -> Contrast:
    """What paired differences show, one a seed, in percent points.

    'equal within ±margin': the 90 % interval of the mean lies inside ± margin. Else 'adds' or 'takes away': the 95 %
    interval leaves 0. Else 'not known'; 'one seed' for a single difference. For several contrasts, see `family`.
    """
    n, mean = len(differences), _mean(differences)
    if n < 2:
        return Contrast(n, mean, None, math.nan, ONE_SEED)
    half = half_width(differences, LEVEL, resolution)
    contrast = Contrast(n, mean, (mean - half, mean + half), _p_value(differences, resolution), NOT_KNOWN)
    return contrast._replace(verdict=_of_pair(contrast, differences, margin, resolution))


def _p_value(differences, resolution):
    """Of the paired t-test; 1 where the mean is no more than one image."""
    n, mean, spread = len(differences), abs(_mean(differences)), _spread(differences)
    if mean <= resolution:
        return 1.0
    return float(2 * student.sf(mean / spread * math.sqrt(n), n - 1)) if spread else 0.0


def _of_pair(contrast, differences, margin, resolution):
    if abs(contrast.mean) + half_width(differences, 2 * LEVEL, resolution) < margin:
        return f"equal within ±{margin:g}"
    low, high = contrast.interval
    if contrast.p < LEVEL and not low <= 0 <= high:
        return ADDS if contrast.mean > 0 else TAKES_AWAY
    return NOT_KNOWN


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p values, in the order given; NaN (one seed) stays NaN and does not count.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    adjusted, largest = list(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted


def family(
    contrasts: Mapping[Key, Sequence[float]], margin: float = PAIRED_MARGIN, resolution: float = 0.0
) -> dict[Key, Contrast]:
    """`paired` for several contrasts that are read together: p is Holm's, and 'adds' needs it below 5 % too.

    Intervals and equivalences are not adjusted.
    """
    found = {name: paired(differences, margin, resolution) for name, differences in contrasts.items()}
    adjusted = {
        name: contrast._replace(p=p)
        for (name, contrast), p in zip(found.items(), holm([c.p for c in found.values()]), strict=True)
    }
    return {
        name: c if c.n < 2 else c._replace(verdict=_of_pair(c, contrasts[name], margin, resolution))
        for name, c in adjusted.items()
    }
