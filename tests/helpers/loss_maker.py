"""Losses by their names in the registry, batches for them, and their gradients."""

import torch
from torch.nn import functional as F

import losses
from losses import CrossEntropyLoss, FocalLoss, IB_FocalLoss, IBLoss, LDAMLoss, LogitAdjustedLoss, VSLoss

COUNTS = [100, 40, 12, 5, 2]
WEIGHT = torch.tensor([0.25, 0.5, 0.875, 1.25, 2.125])  # exact in float32
INFLUENCE_BALANCED = ("IB", "IBFocal")
DIVIDES_BY_WEIGHTS = ("CE", "LDAM", "BS", "LA", "VS")
LOSSES = (*DIVIDES_BY_WEIGHTS, "Focal", *INFLUENCE_BALANCED)


def build(loss, weight=WEIGHT, counts=COUNTS, gamma=1.5, alpha=50.0, norm="l1", detach=False, **options):
    """A loss by its name in the registry; the IB losses take raw features."""
    influence = {"alpha": alpha, "norm": norm, "detach": detach}
    return {
        "CE": lambda: CrossEntropyLoss(weight, **options),
        "Focal": lambda: FocalLoss(weight, gamma, **options),
        "LDAM": lambda: LDAMLoss(counts, weight=weight, **options),
        "BS": lambda: losses.BalancedSoftmaxLoss(counts, weight, **options),
        "LA": lambda: LogitAdjustedLoss(counts, 0.7, weight, **options),
        "VS": lambda: VSLoss(counts, 0.3, 0.7, weight, **options),
        "IB": lambda: IBLoss(weight, **influence, **{"raw_features": True, **options}),
        "IBFocal": lambda: IB_FocalLoss(weight, gamma=gamma, **influence, **{"raw_features": True, **options}),
    }[loss]()


def class_weights(rule, counts):
    return {
        "None": lambda: None,
        "CBReweight": lambda: losses.effective_number_weights(counts),
        "IBReweight": lambda: losses.inverse_frequency_weights(counts),
    }[rule]()


def official(loss, rule, counts, **options):
    """A loss with the constants of the official scripts; the IB losses take the norms of the features."""
    if loss in INFLUENCE_BALANCED:
        options["raw_features"] = False
    return build(loss, class_weights(rule, counts), counts, gamma=1.0, alpha=1000.0, **options)


def batch(soft="index", dense=(), n=6, dtype=torch.float64, seed=0):
    """(logits (n, 5, *dense), target, features (n, 4, *dense)); soft: 'index', 'one-hot' or 'soft'."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 5, *dense, generator=generator, dtype=torch.float64)
    features = torch.randn(n, 4, *dense, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (n, *dense), generator=generator)
    if soft != "index":
        target = F.one_hot(target, 5).movedim(-1, 1).to(dtype)
    if soft == "soft":
        other = torch.rand(n, 5, *dense, generator=generator, dtype=torch.float64).softmax(1).to(dtype)
        target = 0.7 * target + 0.3 * other
    return logits.to(dtype), target, features.to(dtype)


def value_and_gradients(criterion, logits, target, features):
    """Loss, gradient in the logits, gradient in the features (None where there is none)."""
    logits, features = (x.detach().clone().requires_grad_() for x in (logits, features))
    loss = criterion(logits, target, features)
    loss.backward()
    return loss.detach(), logits.grad, features.grad


def assert_same(first, second, **tolerance):
    for a, b in zip(first, second, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **tolerance)
