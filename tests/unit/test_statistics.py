"""The rule of the report: intervals by value and by simulation. `pytest -s` on this file prints the error rates."""

import math

import numpy as np
import pytest
from scipy import stats

from paper import statistics
from paper.statistics import Spread

SIGMA, CELLS, REPEATS = 0.6, 6, 4000


def test_the_spread_is_pooled_by_degrees_of_freedom():
    spread = statistics.pooled([[1.0, 2.0, 3.0], [5.0, 5.2], [9.0]])
    assert spread == (pytest.approx(math.sqrt((2 * 1.0 + 1 * 0.02) / 3)), 3)
    with_hint = statistics.pooled([[1.0, 2.0, 3.0]], [Spread(0.57, 2)])
    assert with_hint == (pytest.approx(math.sqrt((1.0 + 0.57**2) / 2)), 4)


def test_single_runs_and_hints_alone_give_no_spread():
    assert statistics.pooled([[78.0], [70.0]], [Spread(0.57, 2)]) is None
    assert statistics.pooled([]) is None


def test_the_limit_is_the_half_width_of_a_prediction_interval():
    """Against the t-test of two samples of equal variance: one of n values, one of m, with their pooled spread."""
    ours, theirs = [77.1, 78.4, 78.0], [76.2, 77.7]
    spread = statistics.pooled([ours, theirs])
    difference = np.mean(ours) - np.mean(theirs)
    p_value = stats.ttest_ind(ours, theirs).pvalue
    level = 2 * stats.t.sf(difference / statistics.limit(spread, 3, 2) * statistics.quantile(3), 3)
    assert level == pytest.approx(p_value)


def test_pairs_are_compared_as_in_a_paired_t_test():
    ours, others = np.array([77.1, 78.4, 78.0, 79.0]), np.array([76.0, 77.7, 77.5, 77.9])
    half = statistics.paired_limit(list(ours - others))
    interval = stats.ttest_rel(ours, others).confidence_interval(0.95)
    assert (interval.high - interval.low) / 2 == pytest.approx(half)
    assert statistics.paired_limit([1.0]) is None


@pytest.mark.parametrize(
    ("differences", "limits", "expected"),
    [
        ([2.0, 3.0], [1.0, 1.0], "yes"),
        ([-2.0, -3.0], [1.0, 1.0], "yes"),
        ([0.5, -0.9], [1.0, 1.0], "no"),
        ([0.0, 0.0], [0.0, 0.0], "no"),
        ([2.0, 0.5], [1.0, 1.0], "?"),
        ([2.0, -2.0], [1.0, 1.0], "?"),
        ([9.0, 9.0], [None, None], "?"),
    ],
)
def test_a_verdict_needs_limits_and_agreement_of_best_and_last(differences, limits, expected):
    assert statistics.verdict(differences, limits) == expected


def false_positives(n, generator):
    """Shares of "yes" where nothing differs: (one epoch alone, best and last together).

    One cell of `n` seeds against a published run, in a data set of CELLS cells of as many seeds; with n = 1 two others
    have three seeds, so that the spread is known. The paper's hint is one more estimate of it.
    """
    sizes = [n] * CELLS if n > 1 else [1, 3, 3]
    alone = both = 0
    for _ in range(REPEATS):
        common = [generator.normal(78, 0.9 * SIGMA, size) for size in sizes]  # best and last agree much
        views = [[list(c + generator.normal(0, 0.436 * SIGMA, len(c))) for c in common] for _ in range(2)]
        published = generator.normal(78, SIGMA)
        hint = Spread(SIGMA * math.sqrt(generator.chisquare(2) / 2), 2)
        limits = [statistics.limit(statistics.pooled(cells, [hint]), n, 1) for cells in views]
        differences = [float(np.mean(cells[0])) - published for cells in views]
        alone += statistics.verdict(differences[:1], limits[:1]) == "yes"
        both += statistics.verdict(differences, limits) == "yes"
    return alone / REPEATS, both / REPEATS


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_the_observed_error_rate_is_the_nominal_one(n):
    alone, both = false_positives(n, np.random.default_rng(n))
    print(f"\nn = {n}: nominal {statistics.LEVEL:.3f}, one epoch {alone:.4f}, best and last together {both:.4f}")
    tolerance = 4 * math.sqrt(statistics.LEVEL * (1 - statistics.LEVEL) / REPEATS)
    assert abs(alone - statistics.LEVEL) < tolerance
    assert both <= alone


@pytest.mark.parametrize("n", [2, 3, 5])
def test_the_observed_error_rate_of_pairs_is_the_nominal_one(n):
    generator = np.random.default_rng(n)
    differences = generator.normal(0, SIGMA, (REPEATS, n))
    found = [statistics.verdict([d.mean()], [statistics.paired_limit(list(d))]) for d in differences]
    share = found.count("yes") / REPEATS
    print(f"\nn = {n}: nominal {statistics.LEVEL:.3f}, pairs {share:.4f}")
    assert abs(share - statistics.LEVEL) < 4 * math.sqrt(statistics.LEVEL * (1 - statistics.LEVEL) / REPEATS)
