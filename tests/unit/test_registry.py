"""The registry of losses and rules: what an entry builds, and on what it depends."""

import pytest
import torch
from recipe_maker import CONSTANTS, recipe

import losses
from training import registry
from training.registry import CLASS_WEIGHTS, LOSSES, Stage

COUNTS = [50, 10, 5]
MADE = recipe()


def stage(loss="CE", class_weights="none", sampler="none"):
    return Stage(0.1, loss, class_weights, sampler)


def criterion_of(*names):
    return MADE.criterion(stage(*names), COUNTS)


def class_rates(sampler, counts=COUNTS, made=MADE):
    """The rate at which an image of each class is drawn."""
    return made.image_rates(stage(sampler=sampler), counts, torch.arange(len(counts)))


def test_every_entry_builds_a_criterion_from_its_constants():
    for name in LOSSES:
        criterion = criterion_of(name, "IB")
        assert criterion.weight.tolist() == losses.inverse_frequency_weights(COUNTS).tolist()
        assert criterion(torch.zeros(3, 3), torch.tensor([0, 1, 2]), torch.ones(3)).isfinite()


IB = {
    "alpha": 7.0, "epsilon": 1e-2, "norm": "l2", "detach": True, "auto_target": "gradient", "auto_ratio": 3.0,
}  # fmt: skip
ATTRIBUTES = {
    "CE": (losses.CrossEntropyLoss, {}),
    "Focal": (losses.FocalLoss, {"gamma": 2.0, "scale": 3.0}),
    "LDAM": (losses.LDAMLoss, {"s": 20.0}),
    "BS": (losses.BalancedSoftmaxLoss, {}),
    "LA": (losses.LogitAdjustedLoss, {}),
    "VS": (losses.VSLoss, {}),
    "IB": (losses.IBLoss, IB),
    "IBFocal": (losses.IB_FocalLoss, {**IB, "gamma": 2.0}),
}


def test_constants_reach_the_criterion():
    for name, (kind, attributes) in ATTRIBUTES.items():
        criterion = criterion_of(name)
        assert type(criterion) is kind
        assert criterion.weight is None
        assert {key: getattr(criterion, key) for key in attributes} == attributes
    assert torch.equal(criterion_of("LDAM").margins, losses.LDAMLoss(COUNTS, 0.4).margins)
    vs = losses.VSLoss(COUNTS, 0.1, 0.6)
    assert torch.equal(criterion_of("VS").scale, vs.scale)
    for name, shift in {"BS": vs.shift / 0.6, "LA": vs.shift * 1.5, "VS": vs.shift}.items():
        torch.testing.assert_close(criterion_of(name).shift, shift)


def test_class_weights_and_rates():
    weights = {name: criterion_of("CE", name).weight for name in CLASS_WEIGHTS}
    assert weights["none"] is None
    assert weights["CB"].tolist() == losses.effective_number_weights(COUNTS, 0.99).tolist()
    assert weights["IB"].tolist() == losses.inverse_frequency_weights(COUNTS).tolist()
    assert class_rates("none") is None
    rates = class_rates("Resample")
    assert rates.dtype == torch.float64
    assert rates.tolist() == losses.effective_number_rates(COUNTS, 0.99).tolist()


def test_class_balanced_sampling_draws_every_class_equally_often_and_effective_numbers_do_not():
    numbers = [5000, 500, 50, 1]
    counts, rates = torch.tensor(numbers, dtype=torch.float64), class_rates("Balanced", numbers)
    assert rates.dtype == torch.float64
    shares = counts * rates / (counts * rates).sum()
    torch.testing.assert_close(shares, torch.full((4,), 0.25, dtype=torch.float64), rtol=1e-6, atol=0)
    shares = counts * class_rates("Resample", numbers, recipe(beta=0.9999))
    assert (shares / shares.sum()).tolist() == pytest.approx([0.2958, 0.2385, 0.2333, 0.2325], abs=1e-3)


def test_a_stage_depends_on_each_constant_once():
    assert registry.constants_of(stage("Focal", "CB", "Resample")) == ("gamma", "focal_scale", "beta")
    assert registry.constants_of(stage("CE", "IB")) == ()
    assert {*registry.all_constants()} >= {*CONSTANTS}
