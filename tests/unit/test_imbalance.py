"""The long tail against the official choice, by-hand counts and the limits that it promises."""

import inspect

import numpy as np
import pytest
from conftest import golden

import imbalance

SPLITS = golden("splits.json")


#: '10/exp' and so on: the keys of one data set and one shape of the tail.
KINDS = sorted({key.rsplit("/", 2)[0] for key in SPLITS["splits"]})


def splits_of(kind):
    """(classes, images of each, type, factor, rand_number, what is published) of each split of that kind."""
    for key, expected in SPLITS["splits"].items():
        if key.rsplit("/", 2)[0] == kind:
            classes, imb_type, factor, rand_number = key.split("/")
            each = SPLITS["per_class"][classes] if isinstance(SPLITS["per_class"], dict) else SPLITS["per_class"]
            yield int(classes), each, imb_type, float(factor), int(rand_number), expected


@pytest.mark.parametrize("kind", KINDS)
def test_golden_splits(kind):
    for classes, each, imb_type, factor, rand_number, expected in splits_of(kind):
        order = np.random.RandomState(1000 + classes + SPLITS["seed"]).permutation(classes * each)
        targets = np.repeat(np.arange(classes), each)[order]
        counts = imbalance.class_counts([each] * classes, imb_type, factor)
        chosen = imbalance.choose(targets, counts, rand_number)
        assert counts == expected["counts"]
        assert chosen[: len(expected["first"])].tolist() == expected["first"]
        assert imbalance.split_sha256(chosen) == expected["sha256"]


@pytest.mark.parametrize(
    ("classes", "each", "imb_type", "totals"),
    [
        (10, 5000, "exp", [11203, 12406, 13996, 17023, 20431]),
        (10, 5000, "step", [25125, 25250, 25500, 26250, 27500]),
        (100, 500, "exp", [9502, 10847, 12608, 15907, 19573]),
        (100, 500, "step", [25100, 25250, 25500, 26250, 27500]),
        (200, 500, "exp", [18836, 21549, 25082, 31711, 39072]),
        (200, 500, "step", [50200, 50500, 51000, 52500, 55000]),
    ],
)
def test_published_totals(classes, each, imb_type, totals):
    counts = [imbalance.class_counts([each] * classes, imb_type, 1 / ratio) for ratio in (200, 100, 50, 20, 10)]
    assert [sum(c) for c in counts] == totals


def test_an_odd_number_of_classes_keeps_every_class():
    assert imbalance.class_counts([10] * 5, "step", 0.1) == [10, 10, 10, 1, 1]


def test_no_class_gets_more_than_it_has_and_n_max_is_the_largest():
    assert imbalance.class_counts([50, 100, 5], "exp", 0.25) == [50, 50, 5]


def test_none_and_factor_one_keep_everything():
    assert imbalance.class_counts([3, 1, 2], "none", 0.01) == [3, 1, 2]
    assert imbalance.class_counts([4, 4], "exp", 1.0) == [4, 4]
    assert imbalance.class_counts([7], "exp", 0.5) == [7]


@pytest.mark.parametrize("factor", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_a_factor_outside_its_range_is_refused(factor):
    with pytest.raises(ValueError, match="must lie in"):
        imbalance.class_counts([10, 10], "exp", factor)


def test_an_unknown_type_and_an_empty_class_are_refused_by_name():
    with pytest.raises(ValueError, match="'pareto'"):
        imbalance.class_counts([10, 10], "pareto", 0.5)
    with pytest.raises(ValueError, match=r"leaves 1 of 2 classes empty.*class 1"):
        imbalance.class_counts([10, 10], "exp", 0.05)


def test_the_choice_is_seeded_and_leaves_the_global_generator_alone():
    targets = np.arange(300) % 3
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    first = imbalance.choose(targets, [50, 20, 5], 1)
    assert np.array_equal(first, imbalance.choose(targets, [50, 20, 5], 1))
    assert not np.array_equal(first, imbalance.choose(targets, [50, 20, 5], 2))
    assert np.array_equal(before, np.random.get_state()[1])
    assert targets[first].tolist() == [0] * 50 + [1] * 20 + [2] * 5
    assert len(set(first.tolist())) == 75


@pytest.mark.parametrize("kind", KINDS)
def test_left_out_images_are_the_next_ones_of_the_published_shuffle(kind):
    for classes, each, imb_type, factor, rand_number, _ in list(splits_of(kind))[::4]:
        targets = np.repeat(np.arange(classes), each)
        counts = imbalance.class_counts([each] * classes, imb_type, factor)
        left_out = imbalance.choose_left_out(targets, counts, 7, rand_number)
        more = [min(n + 7, each) for n in counts]  # a longer choice: what is kept, then what is left out
        expected = np.split(imbalance.choose(targets, more, rand_number), np.cumsum(more)[:-1])
        assert left_out.tolist() == [i for n, part in zip(counts, expected, strict=True) for i in part[n:]]
        assert not set(left_out) & set(imbalance.choose(targets, counts, rand_number))
        assert imbalance.count_classes(targets[left_out], classes) == [min(7, each - n) for n in counts]


def test_hold_out_is_a_stratified_partition_that_keeps_each_class():
    targets = np.repeat([0, 1, 2], [100, 10, 1])
    train, validation = imbalance.hold_out(targets, 0.2)
    assert sorted([*train, *validation]) == list(range(111))
    assert np.bincount(targets[validation], minlength=3).tolist() == [20, 2, 0]
    assert imbalance.hold_out(targets, 0.0)[0].tolist() == list(range(111))
    train, _ = imbalance.hold_out(targets, 0.9)
    assert np.bincount(targets[train], minlength=3).tolist() == [10, 1, 1]
    _, validation = imbalance.hold_out(targets, 0.04)
    assert np.bincount(targets[validation], minlength=3).tolist() == [4, 1, 0], (
        "of small classes one, though 10 * 0.04 < 0.5"
    )


def test_classes_are_counted_up_to_the_last_one():
    assert imbalance.count_classes([2, 0, 2], 4) == [1, 0, 2, 0]
    assert [type(n) for n in imbalance.count_classes(np.array([0]), 1)] == [int]


def test_defaults_are_the_published_ones():
    def defaults(function):
        return {p.name: p.default for p in inspect.signature(function).parameters.values() if p.default is not p.empty}

    assert defaults(imbalance.class_counts) == {"imb_type": "exp", "imb_factor": 0.01}
    assert defaults(imbalance.choose) == {"rand_number": 0}
    assert defaults(imbalance.hold_out) == {"seed": 0}


def test_group_limits():
    assert imbalance.groups([101, 100, 20, 19, 0]) == {"many": [0], "medium": [1, 2], "few": [3, 4]}


@pytest.mark.parametrize("fraction", [-0.1, 1, 2, float("nan")])
def test_hold_out_refuses_a_fraction_outside_its_range(fraction):
    with pytest.raises(ValueError, match="must lie in"):
        imbalance.hold_out([0, 0, 1], fraction)


def test_hold_out_is_seeded_and_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()
    first = imbalance.hold_out([0] * 100, 0.3, seed=1)[1]
    assert np.array_equal(first, imbalance.hold_out([0] * 100, 0.3, seed=1)[1])
    assert not np.array_equal(first, imbalance.hold_out([0] * 100, 0.3, seed=2)[1])
    assert np.array_equal(before, np.random.get_state()[1])


def test_hold_out_refuses_data_of_which_it_can_hold_out_nothing():
    with pytest.raises(ValueError, match="no class has two images"):
        imbalance.hold_out([0, 1, 2], 0.9)


class Numbers(imbalance.LabelledImages):
    classes, targets, chosen = ["even", "odd"], [0, 1, 0, 1, 0, 0], np.arange(6)


def test_a_subset_is_a_data_set_of_its_own():
    whole = Numbers()
    part = whole.subset([5, 1, 3])
    assert (part.targets, part.chosen.tolist(), part.get_cls_num_list()) == ([0, 1, 1], [5, 1, 3], [1, 2])
    assert (part.num_classes, part.class_names) == (2, ["even", "odd"])
    again = part.subset(np.array([2, 0]))
    assert (again.targets, again.chosen.tolist()) == ([1, 0], [3, 5])
    assert (whole.targets, whole.chosen.tolist()) == ([0, 1, 0, 1, 0, 0], list(range(6)))


def test_a_subset_is_made_imbalanced_among_its_own():
    part = Numbers().subset([5, 4, 2, 1, 3])
    part.make_imbalanced("exp", 0.4, 3)
    assert part.targets == [0, 0, 0, 1]
    assert part.chosen.tolist() == [[5, 4, 2, 1, 3][i] for i in imbalance.choose([0, 0, 0, 1, 1], [3, 1], 3)]
