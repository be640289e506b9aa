"""The rule of the report: intervals and p values against scipy's own tests, verdicts, and error rates by simulation."""

import math

import numpy as np
import pytest
from scipy import stats

from benchmarks import verdicts as simulation
from paper import statistics

NARROW, WIDE = [0.1, -0.2, 0.15, 0.0, -0.05], [1.4, -1.1, 0.9, -0.7, 0.3]


def paired(differences, **how):
    """A contrast that is read alone."""
    return statistics.family({"": differences}, **how)[""]


def shifted(differences, by):
    return [value + by for value in differences]


@pytest.mark.parametrize(
    ("differences", "verdict"),
    [
        (shifted(NARROW, 0.7), "agrees"),
        (shifted(NARROW, 3), "higher"),
        (shifted(NARROW, -3), "lower"),
        (shifted(NARROW, 1), "not known"),
        (WIDE, "not known"),
        ([0.0, 0.01], "not known"),
        ([3.0, 3.01], "not known"),
        ([9.0], "one seed"),
    ],
)
def test_agreement_lies_inside_the_margin_and_a_difference_outside(differences, verdict):
    found = statistics.against(differences)
    assert (found.n, found.verdict) == (len(differences), verdict)
    assert found.mean == pytest.approx(np.mean(differences))


def test_intervals_and_p_values_are_those_of_the_t_test():
    ours, others = np.array([77.1, 78.4, 78.0, 79.0]), np.array([76.0, 77.7, 77.5, 77.9])
    differences = (ours - others).tolist()
    expected = stats.ttest_rel(ours, others)
    for found in (paired(differences), statistics.against(differences)):
        assert found.interval == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert paired(differences).p == pytest.approx(expected.pvalue)


def test_an_equivalence_is_two_one_sided_tests():
    """'agrees' exactly where both one-sided t-tests against the margin reject at 5 %."""
    rng = np.random.default_rng(0)
    seen = set()
    for differences in rng.normal(0.4, 0.6, (200, 4)):
        above = stats.ttest_1samp(differences, -1, alternative="greater").pvalue
        below = stats.ttest_1samp(differences, 1, alternative="less").pvalue
        agrees = statistics.against(differences.tolist()).verdict == "agrees"
        assert agrees == (max(above, below) < 0.05)
        seen.add(agrees)
    assert seen == {True, False}


@pytest.mark.parametrize("level", [0.05, 0.025])
def test_verdicts_of_a_level_are_those_of_the_t_tests(level):
    rng, seen = np.random.default_rng(1), set()
    for mean in (-1.0, 0.0, 0.3, 1.0):
        for differences in rng.normal(mean, 0.3, (100, 4)):
            differs = stats.ttest_1samp(differences, 0).pvalue < level
            sides = ((-0.5, "greater"), (0.5, "less"))
            is_small = all(stats.ttest_1samp(differences, at, alternative=side).pvalue < level for at, side in sides)
            sign = "adds" if differences.mean() > 0 else "takes away"
            other = "equal within ±0.5" if is_small else "not known"
            expected = sign + " (small)" * is_small if differs else other
            assert paired(differences.tolist(), level=level).verdict == expected
            seen.add(expected)
    assert {"adds", "takes away", "adds (small)", "equal within ±0.5", "not known"} <= seen
    assert paired([2.0]).verdict == "one seed"
    assert {paired(two).verdict for two in ([2.0, 2.01], [0.0, 0.01])} == {"not known"}


def test_no_p_is_smaller_than_that_of_the_printed_interval():
    (found,) = statistics.family({"": [0.4445, 0.4444, 0.4444]}, resolution=0.22).values()
    error = 0.22 / stats.t.ppf(0.975, 2)
    assert found.p == pytest.approx(2 * stats.t.sf(0.44443333 / error, 2))


def test_holm_against_his_rule_by_hand():
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.9, 0.8]) == [1.0, 1.0]
    first, second, third = statistics.holm([0.02, math.nan, 0.03])
    assert (first, third) == pytest.approx((0.04, 0.04))
    assert math.isnan(second), "one seed is no test"


def test_a_family_needs_the_adjusted_p():
    clear = [0.9, 1.1, 1.9, 1.0]
    assert paired(clear).verdict == "adds"
    found = statistics.family({"clear": clear, **{str(i): WIDE for i in range(9)}, "two": clear[:2]})
    assert found["clear"].p == pytest.approx(10 * paired(clear).p)
    assert found["clear"].verdict == "not known"


@pytest.mark.parametrize("differences", [[0.01, 0.01, 0.01], [0.0, 0.0, 0.0]])
def test_a_difference_of_one_image_is_no_finding(differences):
    assert paired(differences, margin=0.005, resolution=0.01).verdict == "not known"
    assert statistics.against(differences, margin=0.001, resolution=0.01).verdict == "not known"


def test_the_seeds_that_would_decide():
    assert statistics.against([0.995] * 3, 1.0, 0.01).seeds is None, "no number of seeds undercuts one image"
    n = statistics.seeds_to_decide(-0.5, 0.8)
    assert stats.t.ppf(0.95, n - 1) * 0.8 / n**0.5 < 0.5 < stats.t.ppf(0.95, n - 2) * 0.8 / (n - 1) ** 0.5
    assert statistics.seeds_to_decide(0.001, 1.0) is None


REPEATS = 1000
CASES = [{"what": "level"}, {"what": "gain", "correlation": 0.0}, {"what": "gain", "correlation": 0.9, "spread": 1.0}]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("n", [2, 10])
def test_errors_are_at_most_nominal_for_shared_seeds_and_unequal_spreads(n, case):
    nothing, at_margin, far = (
        simulation.shares(n, truth, repeats=REPEATS, seed=n, **case) for truth in simulation.TRUTHS
    )
    tolerance = 4 * math.sqrt(0.05 * 0.95 / REPEATS)
    assert nothing.differs < 0.01
    assert at_margin.agrees < 0.05 + tolerance
    assert at_margin.differs < 0.025 + tolerance
    assert far.agrees < 0.01
    if n == 10:
        assert far.decides > 0.85
        assert nothing.agrees > 0.75


def test_the_simulated_methods_correlate_as_asked():
    ce, method = simulation.draw(3, 0.9, 1.0, 4000, np.random.default_rng(0)).swapaxes(0, 1)
    assert np.corrcoef(ce.ravel(), method.ravel())[0, 1] == pytest.approx(0.9, abs=0.01)
    assert (ce.std(), method.std()) == (pytest.approx(0.4, rel=0.03), pytest.approx(1.0, rel=0.03))
