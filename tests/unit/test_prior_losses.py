"""Balanced Softmax, logit adjustment and VS: against a slow formula and against each other."""

import math

import pytest
import torch

from losses import (
    BalancedSoftmaxLoss,
    CrossEntropyLoss,
    IBLoss,
    LogitAdjustedLoss,
    VSLoss,
    balanced_softmax,
    ib_factor,
    log_prior,
    logit_adjusted_cross_entropy,
    vs_loss,
    vs_scales,
)

COUNTS = [100, 40, 12, 5, 2]
WEIGHT = torch.tensor([0.25, 0.5, 0.875, 1.25, 2.125])


def batch(dtype=torch.float64, spread=3.0):
    generator = torch.Generator().manual_seed(1)
    logits = spread * torch.randn(12, 5, generator=generator, dtype=torch.float64)
    return logits.to(dtype).requires_grad_(), torch.randint(5, (12,), generator=generator)


def slow(rows, target, tau, weight, gamma=0.0):
    """Value, and gradient in the logits, one number at a time."""
    share = [n / sum(COUNTS) for n in COUNTS]
    scale = [(n / max(COUNTS)) ** gamma for n in COUNTS]
    total = sum(weight[y] for y in target)
    value, gradient = 0.0, []
    for row, y in zip(rows, target, strict=True):
        scores = [math.exp(d * z) * p**tau for z, p, d in zip(row, share, scale, strict=True)]
        value -= weight[y] / total * math.log(scores[y] / sum(scores))
        gradient.append([weight[y] / total * scale[k] * (s / sum(scores) - (k == y)) for k, s in enumerate(scores)])
    return value, gradient


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0, 2.0])
def test_logit_adjustment_is_the_slow_formula(tau, weight):
    logits, target = batch()
    value, gradient = slow(logits.tolist(), target.tolist(), tau, [1.0] * 5 if weight is None else weight.tolist())
    loss = logit_adjusted_cross_entropy(logits, target, COUNTS, tau, weight)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(logits.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
@pytest.mark.parametrize(("gamma", "tau"), [(0.15, 1.25), (0.3, 0.0), (0.0, 0.7), (1.0, 1.0)])
def test_vs_is_the_slow_formula(gamma, tau, weight):
    logits, target = batch()
    weights = [1.0] * 5 if weight is None else weight.tolist()
    value, gradient = slow(logits.tolist(), target.tolist(), tau, weights, gamma)
    loss = vs_loss(logits, target, COUNTS, gamma, tau, weight)
    loss.backward()
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(logits.grad, torch.tensor(gradient, dtype=torch.float64), rtol=1e-10, atol=1e-14)
    module = VSLoss(COUNTS, gamma, tau, weight)(logits, target)
    torch.testing.assert_close(module, loss, rtol=1e-6, atol=0)


def test_vs_without_its_multiplier_is_logit_adjustment_and_without_both_cross_entropy():
    logits, target = batch(torch.float32)
    vs = VSLoss(COUNTS, 0.0, 0.7, WEIGHT)(logits, target)
    assert torch.equal(vs, LogitAdjustedLoss(COUNTS, 0.7, WEIGHT)(logits, target))
    plain = VSLoss(COUNTS, 0.0, 0.0, WEIGHT)(logits, target)
    assert torch.equal(plain, CrossEntropyLoss(WEIGHT)(logits, target))
    assert VSLoss(COUNTS, weight=WEIGHT).state_dict() == {}


def test_vs_multiplies_by_the_share_of_the_largest_class():
    assert vs_scales([16, 4, 1], 0.5).tolist() == [1.0, 0.5, 0.25]
    assert vs_scales([7, 7], 0.3).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["unweighted", "weighted"])
def test_balanced_softmax_weighs_the_exponentials_by_the_counts(weight):
    logits, target = batch()
    exponentials = logits.detach().exp() * torch.tensor(COUNTS)
    rows = -(exponentials / exponentials.sum(1, keepdim=True)).log()[torch.arange(12), target]
    weights = torch.ones(12) if weight is None else weight[target]
    expected = (weights * rows).sum() / weights.sum()
    assert balanced_softmax(logits, target, COUNTS, weight).item() == pytest.approx(expected.item(), rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_modules_their_functions_and_their_limits_agree(dtype):
    logits, target = batch(dtype)
    one = BalancedSoftmaxLoss(COUNTS, WEIGHT)(logits, target)
    two = LogitAdjustedLoss(COUNTS, 1.0, WEIGHT)(logits, target)
    assert torch.equal(one, two)
    torch.testing.assert_close(one, balanced_softmax(logits, target, COUNTS, WEIGHT), rtol=1e-6, atol=0)
    assert torch.equal(LogitAdjustedLoss(COUNTS, 0.0, WEIGHT)(logits, target), CrossEntropyLoss(WEIGHT)(logits, target))
    assert one.dtype == dtype
    assert LogitAdjustedLoss(COUNTS).tau == 1.0
    assert LogitAdjustedLoss(COUNTS, weight=WEIGHT).state_dict() == {}


@pytest.mark.parametrize("scale", [1e4, -1e4])
@pytest.mark.parametrize(("family", "constants"), [(LogitAdjustedLoss, (2.0,)), (VSLoss, (0.3, 2.0))])
def test_extreme_logits_stay_finite_under_autocast(family, constants, scale):
    logits = torch.eye(5, dtype=torch.bfloat16).mul(scale).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = family(COUNTS, *constants)(logits, torch.tensor([0, 1, 2, 3, 0]))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_logits_are_widened_before_the_prior_is_added(dtype):
    logits, target = batch(dtype)
    criterion = LogitAdjustedLoss(COUNTS, 0.7, WEIGHT)
    assert torch.equal(criterion(logits, target), criterion(logits.float(), target))


def test_the_prior_is_each_classs_share():
    assert torch.allclose(log_prior([3, 1]).exp(), torch.tensor([0.75, 0.25], dtype=torch.float64))


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="tau must be 0 or more"):
        LogitAdjustedLoss(COUNTS, -1.0)
    with pytest.raises(ValueError, match="every class needs a training image"):
        BalancedSoftmaxLoss([3, 0])
    for gamma, tau, name in ((-0.1, 1.0, "gamma"), (0.1, -1.0, "tau"), (math.nan, 1.0, "gamma")):
        with pytest.raises(ValueError, match=f"{name} must be 0 or more"):
            VSLoss(COUNTS, gamma, tau)


def test_norm_none_leaves_class_weights_over_epsilon(tmp_path, capsys):
    """Table 2 (d), and with --alpha auto class weights alone at the size of CE."""
    logits, target = batch()
    features = torch.rand(12, 1, dtype=torch.float64) * 40
    assert torch.equal(ib_factor(logits, target, features, 1000.0, 1e-2, "none"), torch.full((12,), 1e5).double())
    loss = IBLoss(WEIGHT, 1000.0, 1e-2, "none")(logits, target, features)
    rows = torch.nn.functional.cross_entropy(logits, target, reduction="none")
    assert loss.item() == pytest.approx((1e5 * WEIGHT[target] * rows).mean().item(), rel=1e-7)
    auto = IBLoss(WEIGHT, "auto", norm="none")
    assert auto(logits, target, features).item() == pytest.approx(rows.mean().item(), rel=1e-6)
