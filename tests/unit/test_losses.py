"""The arithmetic of the losses: golden numbers, a slow formula, their limits, their extremes, their precision."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import golden
from loss_maker import (
    COUNTS,
    DIVIDES_BY_WEIGHTS,
    INFLUENCE_BALANCED,
    LOSSES,
    WEIGHT,
    assert_same,
    batch,
    build,
    class_weights,
    official,
    value_and_gradients,
)  # fmt: skip
from torch import nn
from torch.nn import functional as F

import losses
from losses import CrossEntropyLoss, FocalLoss, IBLoss, LDAMLoss, LogitAdjustedLoss, VSLoss, row_norm

NORMS = ("l1", "l2", "linf")
ORDER = {"l1": 1, "l2": 2, "linf": math.inf, "none": 1}


def assert_rows_close(actual, expected, rtol):
    """Each row's error, relative to its own largest entry; rows under 1e-7 of the largest are noise."""
    rows = expected.abs().amax(1)
    error = (actual - expected).abs().amax(1) / (rows + 1e-7 * rows.max())
    assert (error <= rtol).all(), f"row {(error / rtol).argmax().item()}: {error.max():.1e}"


# -------------------------------------------------------------------------------- against the official code


@pytest.mark.parametrize("num_classes", [10, 100])
def test_golden_class_weights(num_classes):
    data = golden(f"losses_{num_classes}.npz")
    for rule in ("CBReweight", "IBReweight"):
        weights = class_weights(rule, data["cls_num_list"])
        torch.testing.assert_close(weights, torch.tensor(data[f"weight/{rule}"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("loss", ["CE", "Focal", "LDAM", *INFLUENCE_BALANCED])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_golden_loss_and_gradients(num_classes, loss):
    data = golden(f"losses_{num_classes}.npz")
    inputs = [torch.tensor(data[name]) for name in ("logits", "target", "features")]
    for rule in ("None", "CBReweight", "IBReweight"):
        criterion = official(loss, rule, data["cls_num_list"])
        value, dlogits, dfeatures = value_and_gradients(criterion, *inputs)
        assert value.item() == pytest.approx(float(data[f"{loss}/{rule}/loss"]), rel=1e-5)
        rtol = torch.full((len(dlogits),), 1e-5)
        if criterion.needs_features:
            # the pull of CE and the push of the factor cancel for confident hits, in the official float32 as well
            detached = official(loss, rule, data["cls_num_list"], detach=True)
            pull = value_and_gradients(detached, *inputs)[1].abs().amax(1)
            rtol[dlogits.abs().amax(1) < 0.6 * pull] = 1e-3
            assert (rtol > 1e-5).float().mean() < 0.2
            assert_rows_close(dfeatures, torch.tensor(data[f"{loss}/{rule}/dfeatures"]), 1e-5)
        assert_rows_close(dlogits, torch.tensor(data[f"{loss}/{rule}/dlogits"]), rtol)


@pytest.mark.parametrize("classes", [10, 100])
def test_gradients_are_those_of_the_plain_formulas_to_the_bit(classes):
    """What the loop does, (loss.sum() / count.sum()).backward(), against the means of the official formulas."""
    generator = torch.Generator().manual_seed(classes)
    logits = 4 * torch.randn(128, classes, generator=generator)
    target = torch.randint(classes, (128,), generator=generator)
    norms = 40 * torch.rand(128, 1, generator=generator)
    weight = losses.inverse_frequency_weights([int(500 * 0.01 ** (k / (classes - 1))) for k in range(classes)])

    def plain_ib(z, h):
        others = F.softmax(z, dim=1).scatter(1, target[:, None], 0.0)
        error = others.scatter_add(1, target[:, None], -others.sum(1, keepdim=True))
        factor = 1000.0 / (error.abs().sum(1) * h.reshape(-1) + 1e-3)
        return (F.cross_entropy(z, target, reduction="none") * weight[target] * factor).mean()

    for criterion, plain in ((CrossEntropyLoss(), lambda z, h: F.cross_entropy(z, target)), (IBLoss(weight), plain_ib)):
        (z, h), (z2, h2) = ([x.clone().requires_grad_() for x in (logits, norms)] for _ in range(2))
        loss, count = criterion.per_sample(z, target, h)
        (loss.sum() / count.sum()).backward()
        plain(z2, h2).backward()
        assert torch.equal(z.grad, z2.grad)
        assert h2.grad is None or torch.equal(h.grad, h2.grad)


# ------------------------------------------------------------------------------- against an explicit formula


def slow_sample(loss, z, y, h, weight, gamma, norm, detach):
    """The loss of one sample with the probabilities y, (K,), as the papers write it; z and h are leaves."""
    margins = [0.5 * (min(COUNTS) / n) ** 0.25 for n in COUNTS]
    prior = [n / sum(COUNTS) for n in COUNTS]
    shifted = {
        "LDAM": lambda k: 30 * (z[k] - y[k] * margins[k]),
        "BS": lambda k: z[k] + math.log(COUNTS[k]),
        "LA": lambda k: z[k] + 0.7 * math.log(prior[k]),
        "VS": lambda k: z[k] * (COUNTS[k] / 100) ** 0.3 + 0.7 * math.log(prior[k]),
    }.get(loss, lambda k: z[k])
    highest = max(shifted(k).item() for k in range(5))
    exponentials = [torch.exp(shifted(k) - highest) for k in range(5)]
    p = [e / sum(exponentials) for e in exponentials]
    value = -sum(y[k] * torch.log(p[k]) for k in range(5))
    if loss in INFLUENCE_BALANCED:
        value = value + sum(y[k] * torch.log(y[k]) for k in range(5) if y[k] > 0)  # KL: CE without y's entropy
    value = sum(y[k] * weight[k] for k in range(5)) * value
    if loss in ("Focal", "IBFocal"):
        value = value * (1 - torch.exp(-value)) ** gamma
    if loss in INFLUENCE_BALANCED:
        gaps = torch.stack([(p[k] - y[k]).abs() for k in range(5)])
        factor = 50 / (gaps.norm(ORDER[norm]) * h.norm(ORDER[norm]) + 1e-3)
        value = value * (factor.detach() if detach else factor)
    return 10 * value if loss == "Focal" else value


def slow(loss, logits, target, features, weight=WEIGHT, gamma=1.5, norm="l1", detach=False):
    """(loss of each sample, what it counts in a mean), (N, ...); gradients flow to logits and features."""
    soft = target if target.is_floating_point() else F.one_hot(target, 5).movedim(-1, 1).double()
    values, counts = [], []
    for n, *rest in np.ndindex(len(logits), *logits.shape[2:]):
        z, y, h = (x[(n, slice(None), *rest)] for x in (logits, soft, features))
        values.append(slow_sample(loss, z, y, h, weight.tolist(), gamma, norm, detach))
        counts.append((y * weight).sum() if loss in DIVIDES_BY_WEIGHTS else torch.ones((), dtype=torch.float64))
    shape = logits.shape[:1] + logits.shape[2:]
    return torch.stack(values).reshape(shape), torch.stack(counts).reshape(shape)


def assert_is_the_slow_formula(loss, inputs, **options):
    (logits, target, features), (z, h) = inputs, (x.clone().requires_grad_() for x in inputs[::2])
    expected, counts = slow(loss, z, target, h, **options)
    (expected.sum() / counts.sum()).backward()
    criterion = build(loss, **options)
    rows, row_counts = criterion.per_sample(logits, target, features)
    tight = 1e-5 if loss in ("LDAM", "BS", "LA", "VS") else 1e-9  # float32 buffers
    torch.testing.assert_close(rows, expected.detach(), rtol=tight, atol=1e-12)
    torch.testing.assert_close(row_counts, counts.detach(), rtol=1e-12, atol=0)
    assert not row_counts.requires_grad
    value, dlogits, dfeatures = value_and_gradients(criterion, logits, target, features)
    torch.testing.assert_close(value, (expected.sum() / counts.sum()).detach(), rtol=tight, atol=1e-12)
    torch.testing.assert_close(dlogits, z.grad, rtol=tight, atol=1e-6 * z.grad.abs().max().item())
    assert_same([dfeatures], [h.grad], rtol=tight, atol=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients_are_those_of_the_slow_formula(loss):
    for soft, dense in (("index", ()), ("index", (2, 2)), ("one-hot", ()), ("soft", (3,))):
        assert_is_the_slow_formula(loss, batch(soft, dense))


@pytest.mark.parametrize("loss", INFLUENCE_BALANCED)
def test_slow_formula_of_the_norms(loss):
    for norm, soft, detach in itertools.product(NORMS, ("index", "soft"), (False, True)):
        assert_is_the_slow_formula(loss, batch(soft, seed=3), gamma=2.0, norm=norm, detach=detach)


# --------------------------------------------------------------------------------------------- the influence


def test_influence_is_the_norm_of_the_last_layers_gradient():
    torch.manual_seed(0)
    layer, hidden = nn.Linear(7, 5, dtype=torch.float64), torch.randn(1, 7, dtype=torch.float64)
    targets = (torch.tensor([0]), torch.tensor([4]), torch.tensor([[0.6, 0.4, 0, 0, 0]], dtype=torch.float64))
    for norm, target in itertools.product(NORMS, targets):
        logits = layer(hidden)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, target), layer.weight)
        found = losses.influence(logits.detach(), target, row_norm(hidden, norm), norm)
        assert found.item() == pytest.approx(gradient.flatten().norm(ORDER[norm]).item(), rel=1e-10)


def test_influence_of_a_confident_hit_does_not_cancel():
    logits, features = torch.tensor([[25.0, 0.0, 1.0], [12.0, 0.5, -3.0]]), torch.tensor([2.0, 3.0])
    index = torch.tensor([0, 0])
    for norm, target in itertools.product(NORMS, (index, F.one_hot(index, 3).float())):
        exact = losses.influence(logits.double(), index, features, norm)
        found = losses.influence(logits, target, features, norm)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=0)


def test_the_factor_that_comes_with_the_loss_is_the_one_that_multiplies_it():
    logits, target, features = batch()
    for criterion in (build("IB", None), build("IB", None, norm="l2", detach=True)):
        loss, count, factor = criterion.per_sample_and_factor(logits.requires_grad_(), target, features)
        torch.testing.assert_close(loss, F.cross_entropy(logits, target, reduction="none") * factor)
        assert not factor.requires_grad
        for mine, other in zip((loss, count), criterion.per_sample(logits, target, features), strict=True):
            assert torch.equal(mine, other)
    assert build("CE").per_sample_and_factor(logits, target)[2] is None


# ------------------------------------------------------------------------------------------------- limits


def test_losses_at_their_limits_are_other_losses():
    inputs, weight = batch(), WEIGHT
    ce = value_and_gradients(CrossEntropyLoss(weight), *inputs)
    mean = (weight[inputs[1]] * F.cross_entropy(*inputs[:2], reduction="none")).mean()
    torch.testing.assert_close(FocalLoss(weight)(*inputs), 10 * mean)  # the official scale of 10
    torch.testing.assert_close(FocalLoss(weight, scale=1.0)(*inputs), mean)
    torch.testing.assert_close(IBLoss(weight, 2.0, 1.0, "none", raw_features=True)(*inputs), 2 * mean)
    assert_same(value_and_gradients(LDAMLoss(COUNTS, 0.0, weight, 1), *inputs), ce)
    assert_same(value_and_gradients(VSLoss(COUNTS, 0.0, 0.0, weight), *inputs), ce)
    adjusted = LogitAdjustedLoss(COUNTS, 0.7, weight)(*inputs)
    assert torch.equal(VSLoss(COUNTS, 0.0, 0.7, weight)(*inputs), adjusted)
    assert torch.equal(build("BS", weight)(*inputs), LogitAdjustedLoss(COUNTS, 1.0, weight)(*inputs))
    for norm in NORMS:
        focal = value_and_gradients(build("IBFocal", weight, gamma=0.0, norm=norm), *inputs)
        assert_same(focal, value_and_gradients(build("IB", weight, norm=norm), *inputs))


def test_weights_of_one_are_no_weights_and_a_mean_divides_as_published():
    inputs = batch()
    for loss in LOSSES:
        plain, one, three = (build(loss, w, gamma=0.0) for w in (None, torch.ones(5), torch.full((5,), 3.0)))
        assert_same(value_and_gradients(one, *inputs), value_and_gradients(plain, *inputs))
        torch.testing.assert_close(three(*inputs), (1 if loss in DIVIDES_BY_WEIGHTS else 3) * plain(*inputs))


def test_focal_factor_of_a_small_cross_entropy_does_not_cancel():
    ce = torch.tensor([1e-12, 1e-8, 3e-7, 1e-4])
    for gamma in (0.5, 1.0, 2.0):
        torch.testing.assert_close(losses._focal_factor(ce, gamma), ce**gamma, rtol=3e-4, atol=0)


# ------------------------------------------------------------------------------------ extremes and precision


def extremes():
    """Hits and misses by up to 2e4, ties, huge noise; features of zero and of a thousand."""
    hit, generator = torch.tensor([1.0, -1.0, -1.0, -1.0, -1.0]), torch.Generator().manual_seed(1)
    rows = [scale * hit for scale in (1e4, 1e3, 50.0, 9.0, 8.0, -1e4, -50.0)]
    rows += [torch.full((5,), c) for c in (0.0, 1e4, -1e4)]
    rows += [torch.tensor([-1e4, 1e4, -1e4, 1e4, 0.0]), 1e4 * (2 * torch.rand(5, generator=generator) - 1)]
    features = torch.cat([torch.zeros(len(rows)), torch.full((len(rows),), 1e3)])
    return torch.stack(rows).repeat(2, 1), torch.zeros(2 * len(rows), dtype=torch.int64), features[:, None]


@pytest.mark.parametrize("loss", LOSSES)
def test_extremes_are_finite(loss):
    logits, target, features = extremes()
    soft = F.one_hot(target, 5) * 0.9 + 0.02
    settings = ((0.0, None), (0.5, WEIGHT), (2.0, None))
    for dtype, (gamma, weight) in itertools.product((torch.float32, torch.float64, torch.bfloat16), settings):
        for norm in NORMS if loss in INFLUENCE_BALANCED else ("l1",):
            criterion = build(loss, weight, gamma=gamma, norm=norm, alpha=1000.0)
            value, dlogits, dfeatures = value_and_gradients(criterion, logits.to(dtype), target, features.to(dtype))
            assert 0 < value < math.inf
            assert dlogits.isfinite().all()
            assert dfeatures is None or dfeatures.isfinite().all()
            assert dlogits[5, 0] < 0 < dlogits[5, 1:].max()  # a miss by 2e4 still learns
            value, dlogits, _ = value_and_gradients(criterion, logits.to(dtype), soft, features.to(dtype))
            assert value.isfinite()
            assert dlogits.isfinite().all()


def test_a_perfect_hit_costs_nothing_and_a_huge_miss_its_margin():
    hit, miss = torch.tensor([[1e4, -1e4, -1e4]]), torch.tensor([[-1e4, 1e4, -1e4]])
    for criterion, expected in (
        (CrossEntropyLoss(), 2e4),
        (FocalLoss(), 2e5),
        (LDAMLoss([1, 1, 1], max_m=0.0, s=1), 2e4),
        (VSLoss([1, 1, 1]), 2e4),
        (IBLoss(alpha=1.0), 2e4 / 2.001),
    ):
        values = [criterion(z, torch.tensor([0]), torch.ones(1)).item() for z in (hit, miss)]
        assert values == [0, pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("loss", LOSSES)
def test_losses_compute_in_float32_at_least_whatever_autocast_says(loss):
    criterion = build(loss, alpha=1.0)
    for dtype in (torch.float16, torch.float64):
        for soft in ("index", "soft"):
            logits, target, features = batch(soft, dtype=dtype)
            wide = dtype if dtype == torch.float64 else torch.float32
            value, *gradients = value_and_gradients(criterion, logits.to(wide), target, features.to(wide))
            expected = [value] + [g if g is None else g.to(dtype) for g in gradients]
            for autocast in (False, True):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                    actual = value_and_gradients(criterion, logits, target, features)
                assert actual[0].dtype == wide
                assert_same(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("loss", ["LA", "LDAM", "IB"])
def test_a_loss_that_is_cast_with_its_model_keeps_its_counts(loss):
    logits, target, features = batch("index")
    whole, cast = build(loss), build(loss)
    torch.nn.ModuleList([cast]).to(torch.bfloat16)
    assert torch.equal(cast(logits, target, features), whole(logits, target, features))
    assert all(buffer.dtype == torch.float64 for buffer in whole.double().buffers())


def test_autocast_is_off_inside_a_loss():
    # no operation of the losses is one that autocast narrows on the CPU; a matrix product is
    class Product(losses.Loss):
        def _loss(self, logits, target, weight):
            return (logits @ logits.T)[:, 0]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Product()(torch.ones(2, 2), torch.tensor([0, 1])).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu():
    for loss, soft in itertools.product(LOSSES, ("index", "soft")):
        inputs, criterion = batch(soft), build(loss)
        expected = value_and_gradients(criterion, *inputs)
        with torch.autocast("cuda", dtype=torch.float16):
            actual = value_and_gradients(criterion.to("cuda"), *(x.cuda() for x in inputs))
        assert_same([x if x is None else x.cpu() for x in actual], expected)
