"""The long tail against the official choice, by-hand counts and the limits that it promises."""

import numpy as np
import pytest
from conftest import golden

import imbalance
from imbalance_cifar import IMBALANCEDIGITS

SPLITS = golden("splits.json")


@pytest.mark.parametrize("imb_type", ["exp", "step", "none"])
def test_golden_splits(imb_type):
    """Classes, images of each, type, factor and rand_number; what is published of that split."""
    for key, expected in SPLITS["splits"].items():
        of_classes, of_type, factor, rand_number = key.split("/")
        if of_type == imb_type:
            each, classes = SPLITS["per_class"], int(of_classes)
            each = each[of_classes] if isinstance(each, dict) else each
            order = np.random.RandomState(1000 + classes + SPLITS["seed"]).permutation(classes * each)
            targets = np.repeat(np.arange(classes), each)[order]
            counts = imbalance.class_counts([each] * classes, imb_type, float(factor))
            chosen = imbalance.choose(targets, counts, int(rand_number))
            assert counts == expected["counts"], key
            assert chosen[: len(expected["first"])].tolist() == expected["first"], key
            assert imbalance.split_sha256(chosen) == expected["sha256"], key


def test_counts_by_hand():
    assert imbalance.class_counts([10] * 5, "step", 0.1) == [10, 10, 10, 1, 1]
    assert imbalance.class_counts([50, 100, 5], "exp", 0.25) == [50, 50, 5], "no more than there are; n_max the largest"
    assert imbalance.class_counts([3, 1, 2], "none", 0.01) == [3, 1, 2]
    assert imbalance.class_counts([4, 4], "exp", 1.0) == [4, 4]
    assert imbalance.class_counts([7], "exp", 0.5) == [7]
    assert imbalance.class_counts([500, 500, 500]) == [500, 50, 5], "as published without arguments"


@pytest.mark.parametrize("factor", [0, 1.01, float("nan")])
def test_a_factor_outside_its_range_is_refused(factor):
    with pytest.raises(ValueError, match="must lie in"):
        imbalance.class_counts([10, 10], "exp", factor)


def test_an_unknown_type_and_an_empty_class_are_refused_by_name():
    with pytest.raises(ValueError, match="'pareto'"):
        imbalance.class_counts([10, 10], "pareto", 0.5)
    with pytest.raises(ValueError, match=r"leaves 1 of 2 classes empty.*class 1"):
        imbalance.class_counts([10, 10], "exp", 0.05)


def test_classes_that_are_too_small_for_the_imbalance_are_a_warning(capsys):
    images = imbalance.LabelledImages()
    images.classes, images.targets = ["a", "b", "c"], [0] * 40 + [1] * 100 + [2] * 90
    images.chosen = np.arange(len(images.targets))
    images.subset(range(230)).make_imbalanced("none", 1.0, 0)
    images.make_imbalanced("exp", 0.25, 0)
    assert images.get_cls_num_list() == [40, 50, 25]
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 of 3 classes have fewer" in line
    assert "(class 0: 40 of 100); the largest class has 2 times" in line


@pytest.mark.parametrize("imb_type", ["exp", "step"])
def test_the_digits_have_enough_images_for_the_imbalance(imb_type, capsys):
    assert IMBALANCEDIGITS(imb_type=imb_type).tail == (imb_type, 0.01, 0)
    assert capsys.readouterr().err == ""


def test_a_new_shape_is_a_function_of_the_class(monkeypatch):
    monkeypatch.setitem(imbalance.SHAPES, "halved", lambda n_max, k, classes, factor: n_max // 2**k)
    monkeypatch.setattr(imbalance, "IMB_TYPES", ("halved",))
    assert imbalance.class_counts([100, 100, 20], "halved", 0.1) == [100, 50, 20]


def chosen(*seed):
    return imbalance.choose(np.arange(300) % 3, [50, 20, 5], *seed)


def held_out(*seed):
    return imbalance.hold_out([0] * 100, 0.3, *seed)[1]


@pytest.mark.parametrize("draw", [chosen, held_out])
def test_a_choice_is_seeded_and_leaves_the_global_generator_alone(draw):
    np.random.seed(5)  # so that the next draw changes the key
    before = np.random.get_state()[1].copy()
    assert np.array_equal(draw(1), draw(1))
    assert not np.array_equal(draw(1), draw(2))
    assert np.array_equal(draw(), draw(0))
    assert np.array_equal(before, np.random.get_state()[1])


def test_a_choice_is_of_different_images_by_class():
    assert (chosen() % 3).tolist() == [0] * 50 + [1] * 20 + [2] * 5
    assert len(set(chosen().tolist())) == 75


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


def test_group_limits():
    assert imbalance.groups([101, 100, 20, 19, 0]) == {"many": [0], "medium": [1, 2], "few": [3, 4]}


def test_hold_out_refuses_what_cannot_be():
    for fraction in (-0.1, 1, float("nan")):
        with pytest.raises(ValueError, match="must lie in"):
            imbalance.hold_out([0, 0, 1], fraction)
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


class Mixed(imbalance.InMemoryImages):
    """Four classes of 9 to 6 images, in any order; an image is its number."""

    def __init__(self, root, imb_type="exp", imb_factor=0.01, rand_number=0):
        self.root, self.classes = root, list("abcd")
        self.targets = np.random.RandomState(1).permutation(np.repeat(range(4), [9, 8, 7, 6])).tolist()
        self.data = np.arange(30)
        self.make_split(True, imb_type, imb_factor, rand_number)


@pytest.mark.parametrize("imb_type", ["exp", "step"])
def test_left_out_images_are_the_next_ones_of_the_shuffle(imb_type):
    train = Mixed("root", imb_type, 0.3, rand_number=5)
    counts = train.get_cls_num_list()
    part, whole = train.left_out(3), Mixed("root", "none", rand_number=2)
    targets = np.asarray(whole.targets)[np.argsort(whole.chosen)]  # in the order of the files
    more = [min(n + 3, each) for n, each in zip(counts, [9, 8, 7, 6], strict=True)]
    kept_and_left_out = np.split(imbalance.choose(targets, more, 5), np.cumsum(more)[:-1])
    expected = [i for n, indices in zip(counts, kept_and_left_out, strict=True) for i in indices[n:]]
    assert part.chosen.tolist() == part.data.tolist() == expected
    assert part.targets == targets[expected].tolist()
    assert not set(part.chosen) & set(train.chosen)
    assert train.subset(range(10)).left_out(3).chosen.tolist() == expected
