"""What a difference between runs shows: intervals of its mean over seeds, from Student's t. Pure.

The input is a list of differences, one a seed. Ours against a published figure: our accuracy of each seed minus that
figure, or our gain over CE of each seed minus the published gain. Ours against ours: paired differences over the seeds
that both have, so that a shared first phase cancels. No spread is borrowed from another cell. A published figure counts
as a number; its own error, which nobody knows, is what the margin stands for.

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
#: Seeds that a verdict needs, as two may lie close by chance; seeds beyond which no number is named.
LEAST_SEEDS, MOST_SEEDS = 3, 100

AGREES, HIGHER, LOWER = "agrees", "higher", "lower"
NOT_KNOWN, ONE_SEED = "not known", "one seed"


class Contrast(NamedTuple):
    """What differences show: seeds, mean, its 95 % interval, and a verdict, see `against` and `family`.

    p: of 'no difference', of `family` alone; NaN below LEAST_SEEDS. seeds: how many would decide, where `against`
    says 'not known'; None where that is more than MOST_SEEDS.
    """

    n: int
    mean: float
    interval: tuple[float, float] | None
    verdict: str
    p: float = math.nan
    seeds: int | None = None

    @property
    def texts(self) -> tuple[str, str, str]:
        """Interval, p and verdict as a table has them; blank where one seed has none."""
        interval = "" if self.interval is None else "{:+.2f} to {:+.2f}".format(*self.interval)
        return interval, "" if math.isnan(self.p) else f"{self.p:.3f}", self.verdict


@functools.cache
def quantile(n: int, level: float) -> float:
    """The two-sided quantile of Student's t for the mean of n values at 1 - `level`.

    >>> round(quantile(3, 0.05), 3)
    4.303
    """
    return float(student.ppf(1 - level / 2, n - 1))


def _summary(differences, resolution, level=LEVEL):
    """Mean, sample standard deviation, and half the widths of the 95 % interval and of that for equivalence (90 %)."""
    n, mean = len(differences), float(np.mean(differences))
    if n < 2:
        return mean, math.nan, math.nan, math.nan
    spread = float(np.std(differences, ddof=1))
    halves = [max(quantile(n, at) * spread / math.sqrt(n), resolution) for at in (LEVEL, 2 * level)]
    return mean, spread, *halves


def against(differences: Sequence[float], margin: float = MARGIN, resolution: float = 0.0) -> Contrast:
    """What differences to a published figure show, one a seed, in percent points.

    'agrees': the 90 % interval of the mean lies inside ± margin. 'higher', 'lower': the 95 % interval lies outside of
    ± margin, and so without 0. Fewer than LEAST_SEEDS have no verdict.

    Args:
        resolution: what one test image is worth. No interval is narrower to either side.
    """
    n, (mean, spread, half, half_90) = len(differences), _summary(differences, resolution)
    if n < 2:
        return Contrast(n, mean, None, ONE_SEED)
    verdict, seeds = NOT_KNOWN, None
    if n >= LEAST_SEEDS and abs(mean) + half_90 < margin:
        verdict = AGREES
    elif n >= LEAST_SEEDS and abs(mean) - half > margin:
        verdict = HIGHER if mean > 0 else LOWER
    else:
        seeds = seeds_to_decide(abs(mean) - margin, spread, resolution)
    return Contrast(n, mean, (mean - half, mean + half), verdict, seeds=seeds)


def seeds_to_decide(distance: float, spread: float, resolution: float = 0.0) -> int | None:
    """The fewest seeds, LEAST_SEEDS or more, that decide with this mean and spread; None beyond MOST_SEEDS.

    Args:
        distance: of the mean difference from the margin; negative inside it.
        resolution: see `against`.

    >>> seeds_to_decide(2.0, 0.6), seeds_to_decide(-0.9, 0.6), seeds_to_decide(0.01, 0.6)
    (3, 4, None)
    """
    level = LEVEL if distance > 0 else 2 * LEVEL
    halves = ((n, quantile(n, level) * spread / math.sqrt(n)) for n in range(LEAST_SEEDS, MOST_SEEDS + 1))
    return next((n for n, half in halves if max(half, resolution) < abs(distance)), None)


def family(
    contrasts: Mapping[Key, Sequence[float]], margin: float = PAIRED_MARGIN, resolution: float = 0.0,
    level: float = LEVEL, size: int | None = None,
) -> dict[Key, Contrast]:  # fmt: skip
    """What paired differences show, one a seed, in percent points, for contrasts that are read together.

    'adds' or 'takes away': Holm's p is below `level`, and the 95 % interval leaves 0; with '(small)' where the mean is
    shown to lie inside ± margin, too. Else 'equal within ±margin': the interval of two one-sided tests at `level`
    (90 % by default) lies inside ± margin. Else, and with fewer than LEAST_SEEDS, 'not known'; 'one seed' for one.
    Intervals and equivalences are not adjusted. size: see `holm`.
    """
    ps = holm([_p_value(differences, resolution) for differences in contrasts.values()], size)
    found = {}
    for (name, differences), p in zip(contrasts.items(), ps, strict=True):
        n, (mean, _, half, half_equal) = len(differences), _summary(differences, resolution, level)
        verdict, is_enough = NOT_KNOWN if n > 1 else ONE_SEED, n >= LEAST_SEEDS
        is_small = is_enough and abs(mean) + half_equal < margin
        if is_enough and p < level and abs(mean) > half:
            verdict = ("adds" if mean > 0 else "takes away") + is_small * " (small)"
        elif is_small:
            verdict = f"equal within ±{margin:g}"
        found[name] = Contrast(n, mean, (mean - half, mean + half) if n > 1 else None, verdict, p)
    return found


def _p_value(differences, resolution):
    """Of the paired t-test, its error no smaller than that of the 95 % interval; NaN below LEAST_SEEDS."""
    n, (mean, _, half, _) = len(differences), _summary(differences, resolution)
    if n < LEAST_SEEDS:
        return math.nan
    error = half / quantile(n, LEVEL)
    return float(2 * student.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)


def holm(ps: Sequence[float], size: int | None = None) -> list[float]:
    """Holm's adjusted p values, in the order given; NaN (one seed) stays NaN and does not count.

    Args:
        size: tests of the family, if more are planned than have a p so far.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    adjusted, largest = list(ps), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, ((size or len(order)) - rank) * ps[i]))
        adjusted[i] = largest
    return adjusted
