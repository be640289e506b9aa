"""The losses against golden numbers, a slow explicit formula, their limits and their extremes."""

import copy
import doctest
import inspect
import itertools
import math

import pytest
import torch
from conftest import golden
from torch import nn
from torch.nn import functional as F

import losses
from losses import CrossEntropyLoss, FocalLoss, IB_FocalLoss, IBLoss, LDAMLoss, row_norm

PLAIN, INFLUENCE_BALANCED = ["CE", "Focal", "LDAM"], ["IB", "IBFocal"]
LOSSES = PLAIN + INFLUENCE_BALANCED
RULES = ["None", "CBReweight", "IBReweight", "DRW@0", "DRW@160"]
NORMS = ["l1", "l2", "linf"]
COUNTS = [100, 40, 12, 5, 2]
WEIGHT = [0.25, 0.5, 0.875, 1.25, 2.125]  # exact in float32


def build(loss, weight=None, counts=COUNTS, gamma=1.0, **options):
    return {
        "CE": lambda: CrossEntropyLoss(weight),
        "Focal": lambda: FocalLoss(weight, gamma=gamma),
        "LDAM": lambda: LDAMLoss(counts, weight=weight),
        "IB": lambda: IBLoss(weight, **{"alpha": 1000.0, **options}),
        "IBFocal": lambda: IB_FocalLoss(weight, gamma=gamma, **{"alpha": 1000.0, **options}),
    }[loss]()


def value_and_gradients(criterion, logits, target, features):
    """Loss, gradient in the logits, gradient in the features (None where there is none)."""
    logits, features = (x.detach().clone().requires_grad_() for x in (logits, features))
    loss = criterion(logits, target, features) if criterion.needs_features else criterion(logits, target)
    loss.backward()
    return loss.detach(), logits.grad, features.grad


def batch(n=12, classes=5, dtype=torch.float32, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    logits = (spread * torch.randn(n, classes, generator=generator)).to(dtype)
    target = torch.randint(classes, (n,), generator=generator)
    return logits, target, (0.1 + 40 * torch.rand(n, 1, generator=generator)).to(dtype)


def assert_rows_close(actual, expected, rtol, floor=1e-7):
    """Each row's error, relative to its own largest entry; rows under `floor` of the largest are noise."""
    rows = expected.abs().amax(1)
    error = (actual - expected).abs().amax(1) / (rows + floor * rows.max())
    worst = (error / rtol).argmax().item()
    allowed = rtol if isinstance(rtol, float) else rtol[worst].item()
    assert error[worst] <= allowed, f"row {worst}: {error[worst]:.1e} over {allowed:.0e}"


def test_doctests():
    failed, tried = doctest.testmod(losses)
    assert failed == 0 < tried
    assert losses.ib_loss.__name__ == "ib_loss", "else its doctest is not found"


# -------------------------------------------------------------------------------- against the official code


def class_weights(rule, counts):
    if rule in ("CBReweight", "DRW@160"):
        return losses.effective_number_weights(counts)
    if rule == "DRW@0":
        return losses.effective_number_weights(counts, beta=0.0)
    return losses.inverse_frequency_weights(counts) if rule == "IBReweight" else None


@pytest.mark.parametrize("rule", RULES[1:])
@pytest.mark.parametrize("num_classes", [10, 100])
def test_golden_class_weights(num_classes, rule):
    data = golden(f"losses_{num_classes}.npz")
    weights = class_weights(rule, data["cls_num_list"])
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights, torch.tensor(data[f"weight/{rule}"]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("num_classes", [10, 100])
def test_golden_loss_and_gradients(num_classes, loss, rule):
    data = golden(f"losses_{num_classes}.npz")
    logits, target, features = (torch.tensor(data[name]) for name in ("logits", "target", "features"))
    weight = class_weights(rule, data["cls_num_list"])
    criterion = build(loss, weight, data["cls_num_list"])
    value, dlogits, dfeatures = value_and_gradients(criterion, logits, target, features)
    assert value.item() == pytest.approx(float(data[f"{loss}/{rule}/loss"]), rel=1e-5)

    rtol = torch.full((len(logits),), 1e-5)
    if criterion.needs_features:
        # the pull of CE and the push of the factor cancel for confident hits, in the official float32 as well
        alone = build(loss, weight, detach=True)
        pull = value_and_gradients(alone, logits, target, features)[1].abs().amax(1)
        rtol[dlogits.abs().amax(1) < 0.6 * pull] = 1e-3
        assert (rtol > 1e-5).float().mean() < 0.2
        assert_rows_close(dfeatures, torch.tensor(data[f"{loss}/{rule}/dfeatures"]), 1e-5)
    assert_rows_close(dlogits, torch.tensor(data[f"{loss}/{rule}/dlogits"]), rtol)


@pytest.mark.parametrize("num_classes", [10, 100])
def test_golden_resampling_rates(num_classes):
    data = golden(f"sampler_{num_classes}.json")
    rates = losses.effective_number_rates(data["counts"]).tolist()
    assert rates[0] == pytest.approx(data["weights_first"][0], rel=1e-12)
    assert rates[-1] == pytest.approx(data["weights_last"][0], rel=1e-12)


# ------------------------------------------------------------------------------- against an explicit formula


def slow_loss(loss, logits, target, features, weight, gamma, norm="l1", detach=False):
    """One sample and one class at a time, as the papers write it."""
    margins = [0.5 * (min(COUNTS) / n) ** 0.25 for n in COUNTS]
    terms, weights = [], []
    for z, y, h in zip(logits, target.tolist(), features.reshape(-1), strict=True):
        if loss == "LDAM":
            z = torch.stack([30 * (z[k] - (margins[k] if k == y else 0)) for k in range(len(z))])
        exps = [torch.exp(z_k - z.detach().max()) for z_k in z]
        p = [e / sum(exps) for e in exps]
        w = 1.0 if weight is None else weight[y]
        term = -w * torch.log(p[y])
        weighted_p = torch.exp(-term)
        if loss in ("Focal", "IBFocal"):
            term = term * (1 - weighted_p) ** gamma
        if loss in INFLUENCE_BALANCED:
            gaps = [(p_k - float(k == y)).abs() for k, p_k in enumerate(p)]
            size = {"l1": sum(gaps), "l2": sum(g * g for g in gaps).sqrt(), "linf": max(gaps)}[norm]
            factor = 1000 / (size * h + 0.001)
            term = term * (factor.detach() if detach else factor)
        terms.append(10 * term if loss == "Focal" else term)
        weights.append(w)
    return sum(terms) / (sum(weights) if loss in ("CE", "LDAM") else len(terms))


CASES = [(loss, {}) for loss in PLAIN] + [
    (loss, {"norm": norm, "detach": detach})
    for loss, norm, detach in itertools.product(INFLUENCE_BALANCED, NORMS, [False, True])
]


@pytest.mark.parametrize("gamma", [1.0, 2.0])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize(("loss", "options"), CASES)
def test_explicit_formula(loss, options, weight, gamma):
    logits, target, features = batch(dtype=torch.float64, seed=len(loss))
    z, h = logits.clone().requires_grad_(), features.clone().requires_grad_()
    expected = slow_loss(loss, z, target, h, weight, gamma, **options)
    expected.backward()
    criterion = build(loss, weight, gamma=gamma, **options)
    for dtype in (torch.float64, torch.float32):
        inputs = logits.to(dtype), target, features.to(dtype)
        value, dlogits, dfeatures = value_and_gradients(criterion, *inputs)
        assert value.dtype == dlogits.dtype == dtype
        tight = 1e-9 if dtype == torch.float64 and loss != "LDAM" else 1e-5  # LDAM's margins are float32
        loose = 1e-3 if dtype == torch.float32 and loss in INFLUENCE_BALANCED else tight
        assert value.item() == pytest.approx(expected.item(), rel=tight)
        assert_rows_close(dlogits.double(), z.grad, loose)
        if loss in PLAIN or options["detach"]:
            assert dfeatures is None
        else:
            assert_rows_close(dfeatures.double(), h.grad, tight)


@pytest.mark.parametrize(("loss", "options"), [case for case in CASES if not case[1].get("detach")])
def test_gradcheck(loss, options):
    logits, target, features = batch(n=4, dtype=torch.float64, seed=3, spread=1.0)
    criterion = build(loss, WEIGHT, gamma=1.5, **{**options, "alpha": 1.0})
    if criterion.needs_features:
        inputs = (logits.requires_grad_(), features.requires_grad_())
        assert torch.autograd.gradcheck(lambda z, h: criterion(z, target, h), inputs)
    else:
        assert torch.autograd.gradcheck(lambda z: criterion(z, target), logits.requires_grad_())


# --------------------------------------------------------------------------------------------- the influence


@pytest.mark.parametrize("norm", NORMS)
def test_influence_is_the_norm_of_the_last_layers_gradient(norm):
    torch.manual_seed(0)
    layer = nn.Linear(7, 5, dtype=torch.float64)
    order = {"l1": 1, "l2": 2, "linf": math.inf}[norm]
    for target in torch.arange(5):
        hidden = torch.randn(1, 7, dtype=torch.float64)
        logits = layer(hidden)
        (gradient,) = torch.autograd.grad(F.cross_entropy(logits, target[None]), layer.weight)
        features = row_norm(hidden, norm)
        factor = losses.ib_factor(logits.detach(), target[None], features, alpha=1.0, epsilon=0.0, norm=norm)
        assert 1 / factor.item() == pytest.approx(gradient.flatten().norm(order).item(), rel=1e-10)


@pytest.mark.parametrize("norm", NORMS)
def test_influence_of_a_confident_hit_does_not_cancel(norm):
    logits, features = torch.tensor([[25.0, 0.0, 1.0], [12.0, 0.5, -3.0]]), torch.tensor([2.0, 3.0])
    args = (torch.tensor([0, 0]), features, 1.0, 0.0, norm)
    exact = losses.ib_factor(logits.double(), *args)
    torch.testing.assert_close(losses.ib_factor(logits, *args).double(), exact, rtol=1e-5, atol=0)


def test_factor_of_the_module_is_the_one_that_the_loss_uses():
    logits, target, features = batch()
    criterion = IBLoss(alpha=50.0, epsilon=0.01, norm="l2")
    factor = criterion.factor(logits.requires_grad_(), target, features)
    expected = (F.cross_entropy(logits, target, reduction="none") * factor).mean()
    assert factor.shape == (12,)
    assert not factor.requires_grad
    torch.testing.assert_close(criterion(logits, target, features), expected)


@pytest.mark.parametrize("loss", INFLUENCE_BALANCED)
def test_features_may_be_a_column_or_flat(loss):
    logits, target, features = batch()
    criterion = build(loss, WEIGHT)
    assert torch.equal(criterion(logits, target, features), criterion(logits, target, features[:, 0]))


@pytest.mark.parametrize("loss", INFLUENCE_BALANCED)
def test_the_loss_is_proportional_to_alpha(loss):
    logits, target, features = batch()
    one, many = (build(loss, alpha=alpha)(logits, target, features).item() for alpha in (1.0, 1024.0))
    assert many == one * 1024


# ------------------------------------------------------------------------------------------------- limits


def assert_same(first, second, exact=False):
    for a, b in zip(first, second, strict=True):
        if a is None or b is None:
            assert a is b
        else:
            torch.testing.assert_close(a, b, **({"rtol": 0, "atol": 0} if exact else {}))


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_focal_with_gamma_0_is_scaled_cross_entropy(weight, scale):
    logits, target, features = batch()
    rows = torch.ones(5) if weight is None else torch.tensor(weight)
    z = logits.clone().requires_grad_()
    expected = scale * (rows[target] * F.cross_entropy(z, target, reduction="none")).mean()
    expected.backward()
    actual = value_and_gradients(FocalLoss(weight, gamma=0.0, scale=scale), logits, target, features)
    assert_same(actual, (expected.detach(), z.grad, None))


def test_focal_has_the_official_scale_of_10():
    logits, target, _ = batch()
    one, default = FocalLoss(gamma=1.0, scale=1.0), FocalLoss(gamma=1.0)
    torch.testing.assert_close(default(logits, target), 10 * one(logits, target))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_focal_factor_of_a_small_cross_entropy_does_not_cancel(gamma):
    ce = torch.tensor([1e-12, 1e-8, 3e-7, 1e-4])
    torch.testing.assert_close(losses._focal_factor(ce, gamma), ce**gamma, rtol=3e-4, atol=0)


@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("options", [case[1] for case in CASES if case[0] == "IB"], ids=str)
def test_ib_focal_with_gamma_0_is_ib(weight, options):
    inputs = batch()
    actual = value_and_gradients(build("IBFocal", weight, gamma=0.0, **options), *inputs)
    assert_same(actual, value_and_gradients(build("IB", weight, **options), *inputs))


@pytest.mark.parametrize("weight", [None, WEIGHT])
def test_ldam_without_margin_and_scale_is_cross_entropy(weight):
    inputs = batch()
    actual = value_and_gradients(LDAMLoss(COUNTS, max_m=0.0, weight=weight, s=1), *inputs)
    assert_same(actual, value_and_gradients(CrossEntropyLoss(weight), *inputs))


@pytest.mark.parametrize("loss", LOSSES)
def test_weights_of_one_are_no_weights(loss):
    inputs = batch()
    weighted, plain = build(loss, torch.ones(5)), build(loss)
    assert_same(value_and_gradients(weighted, *inputs), value_and_gradients(plain, *inputs))


@pytest.mark.parametrize(("loss", "grows"), [("CE", 1), ("LDAM", 1), ("Focal", 3), ("IB", 3)])
def test_which_losses_divide_by_the_sum_of_the_weights(loss, grows):
    logits, target, features = batch()
    values = [
        value_and_gradients(build(loss, torch.full((5,), w), gamma=0.0), logits, target, features)[0]
        for w in (1.0, 3.0)
    ]
    torch.testing.assert_close(values[1], grows * values[0])


# --------------------------------------------------------------------------------------- extremes and dtypes


def extremes(dtype=torch.float32):
    """Hits and misses by up to 2e4, ties, huge noise; features of zero and of a thousand."""
    generator = torch.Generator().manual_seed(1)
    hit = torch.tensor([1.0, -1.0, -1.0, -1.0, -1.0])
    rows = [scale * hit for scale in (1e4, 1e3, 50.0, 9.0, 8.0, -1e4, -50.0)]
    rows += [torch.full((5,), c) for c in (0.0, 1e4, -1e4)]
    rows += [torch.tensor([-1e4, 1e4, -1e4, 1e4, 0.0]), 1e4 * (2 * torch.rand(5, generator=generator) - 1)]
    logits = torch.stack(rows).repeat(2, 1).to(dtype)
    features = torch.cat([torch.zeros(len(rows)), torch.full((len(rows),), 1e3)])
    return logits, torch.zeros(len(logits), dtype=torch.int64), features.to(dtype)[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize(("loss", "options"), [case for case in CASES if not case[1].get("detach")])
def test_extremes_are_finite(loss, options, weight, gamma, dtype):
    logits, target, features = extremes(torch.float64 if dtype == torch.float64 else torch.float32)
    criterion = build(loss, weight, gamma=gamma, **options)
    value, dlogits, dfeatures = value_and_gradients(criterion, logits.to(dtype), target, features.to(dtype))
    assert value.isfinite()
    assert value > 0
    if dtype != torch.float16:  # which cannot hold the gradients of the IB losses
        assert dlogits.isfinite().all()
        assert dfeatures is None or dfeatures.isfinite().all()
        assert dlogits[5, 0] < 0 < dlogits[5, 1:].max()  # a miss by 2e4 still learns


@pytest.mark.parametrize("loss", LOSSES)
def test_a_perfect_hit_costs_nothing_and_a_huge_miss_its_margin(loss):
    criterion = build(loss, gamma=0.0, alpha=1.0) if loss != "LDAM" else LDAMLoss([3, 2, 1], max_m=0.0, s=1)
    features = torch.ones(1, 1)
    hit, miss = torch.tensor([[1e4, -1e4, -1e4]]), torch.tensor([[-1e4, 1e4, -1e4]])
    values = [value_and_gradients(criterion, z, torch.tensor([0]), features)[0].item() for z in (hit, miss)]
    expected = {"Focal": 2e5, "IB": 2e4 / 2.001, "IBFocal": 2e4 / 2.001}.get(loss, 2e4)
    assert values[0] == 0
    assert values[1] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("loss", LOSSES)
def test_autocast_changes_nothing(loss, weight):
    inputs, criterion = batch(), build(loss, weight)
    plain = value_and_gradients(criterion, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(value_and_gradients(criterion, *inputs), plain, exact=True)


def test_autocast_is_off_inside_a_loss():
    # no operation of the losses is one that autocast narrows on the CPU; a matrix product is
    product = losses._loss(lambda logits, target: ((logits @ logits.T)[:, 0], torch.ones(2)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert product(torch.ones(2, 2), torch.tensor([0, 1])).dtype == torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
def test_half_precision_inputs_are_widened(loss, autocast, dtype):
    logits, target, features = batch(dtype=dtype)
    criterion = build(loss, WEIGHT, alpha=1.0)
    value, *gradients = value_and_gradients(criterion, logits.float(), target, features.float())
    expected = [value] + [g if g is None else g.to(dtype) for g in gradients]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        actual = value_and_gradients(criterion, logits, target, features)
    assert actual[0].dtype == torch.float32
    assert_same(actual, expected, exact=True)


@pytest.mark.parametrize("loss", LOSSES)
def test_float64_stays_float64_under_autocast(loss):
    inputs, criterion = batch(dtype=torch.float64), build(loss, WEIGHT)
    plain = value_and_gradients(criterion, *inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = value_and_gradients(criterion, *inputs)
    assert actual[0].dtype == torch.float64
    assert_same(actual, plain, exact=True)
    single = value_and_gradients(criterion, *batch())[0].double()
    assert actual[0] != single  # computed in float64, not widened at the end
    torch.testing.assert_close(actual[0], single, rtol=1e-5, atol=0)


# --------------------------------------------------------------------------------- class weights and modules


def test_class_weights_by_hand():
    inverse = losses.inverse_frequency_weights([5, 5, 10])  # 1/5, 1/5, 1/10: sum 1/2, scaled by 6
    torch.testing.assert_close(inverse, torch.tensor([1.2, 1.2, 0.6]))
    rates = losses.effective_number_rates([1, 2, 3], beta=0.9)  # 0.1 over 0.1, 0.19, 0.271
    torch.testing.assert_close(rates, torch.tensor([1, 10 / 19, 100 / 271], dtype=torch.float64))
    effective = losses.effective_number_weights([1, 2, 3], beta=0.9)
    torch.testing.assert_close(effective, torch.tensor([1.582846, 0.833077, 0.584076]), rtol=1e-5, atol=0)


def test_effective_number_weights_at_their_ends():
    assert losses.effective_number_weights([7, 500, 2], beta=0.0).tolist() == [1, 1, 1]
    close_to_one = losses.effective_number_weights(COUNTS, beta=1 - 1e-9)
    torch.testing.assert_close(close_to_one, losses.inverse_frequency_weights(COUNTS), rtol=1e-5, atol=0)


def test_ldam_margins_by_hand():
    margins = losses.ldam_margins([256, 16, 1, 16], max_m=0.8)  # n ** (-1/4): 1/4, 1/2, 1, 1/2
    torch.testing.assert_close(margins, torch.tensor([0.2, 0.4, 0.8, 0.4]))


@pytest.mark.parametrize("loss", LOSSES)
def test_buffers_move_with_the_module(loss):
    criterion = build(loss, WEIGHT)
    assert criterion.double().weight.dtype == torch.float64
    assert {buffer.device.type for buffer in criterion.to("meta").buffers()} == {"meta"}
    assert list(criterion.parameters()) == []
    assert criterion.state_dict() == {}


@pytest.mark.gpu
@pytest.mark.parametrize("loss", LOSSES)
def test_cuda_agrees_with_the_cpu(loss):
    inputs, criterion = batch(dtype=torch.float64), build(loss, WEIGHT)
    expected = value_and_gradients(criterion, *inputs)
    criterion.to("cuda")
    with torch.autocast("cuda", dtype=torch.float16):
        actual = value_and_gradients(criterion, *(x.cuda() for x in inputs))
    assert_same([x if x is None else x.cpu() for x in actual], expected)


def test_defaults_are_the_published_ones():
    logits, target, features = batch()
    assert IBLoss().alpha == IB_FocalLoss().alpha == 1000.0  # the published class has 10000, its scripts pass 1000
    assert (IBLoss().epsilon, IBLoss().norm, IBLoss().detach) == (1e-3, "l1", False)
    assert (FocalLoss().gamma, IB_FocalLoss().gamma, LDAMLoss(COUNTS).s) == (0.0, 0.0, 30)
    assert LDAMLoss(COUNTS).margins.max() == 0.5
    assert IBLoss()(logits, target, features) == losses.ib_loss(logits, target, features, alpha=1000.0)


LOSS_OPTIONS = {"ignore_index": -100, "reduction": "mean"}
INFLUENCE_OPTIONS = {"norm": "l1", "raw_features": False}


@pytest.mark.parametrize(
    ("function", "defaults"),
    [
        ("inverse_frequency_weights", {"empty": "error"}),
        ("effective_number_weights", {"beta": 0.9999}),
        ("effective_number_rates", {"beta": 0.9999}),
        ("row_norm", {"norm": "l1"}),
        ("cross_entropy", {"weight": None, **LOSS_OPTIONS}),
        ("focal_loss", {"weight": None, "gamma": 0.0, "scale": 10.0, **LOSS_OPTIONS}),
        ("ldam_loss", {"weight": None, "s": 30.0, **LOSS_OPTIONS}),
        ("ldam_margins", {"max_m": 0.5}),
        ("logit_adjusted_cross_entropy", {"tau": 1.0, "weight": None}),
        ("vs_loss", {"gamma": 0.2, "tau": 1.2, "weight": None}),
        ("influence", {**INFLUENCE_OPTIONS, "ignore_index": -100}),
        ("ib_factor", {"alpha": 1000.0, "epsilon": 1e-3, "detach": False, **INFLUENCE_OPTIONS, "ignore_index": -100}),
        (
            "ib_loss",
            {"weight": None, "alpha": 1000.0, "epsilon": 1e-3, "detach": False, **INFLUENCE_OPTIONS, **LOSS_OPTIONS},
        ),
        (
            "ib_focal_loss",
            {"weight": None, "alpha": 1000.0, "gamma": 0.0, "epsilon": 1e-3, "detach": False, **INFLUENCE_OPTIONS,
             **LOSS_OPTIONS},
        ),
    ],
)  # fmt: skip
def test_defaults_of_the_functions(function, defaults):
    parameters = inspect.signature(getattr(losses, function)).parameters.values()
    assert {p.name: p.default for p in parameters if p.default is not p.empty} == defaults


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [losses.influence, losses.ib_factor])
def test_influence_of_half_precision_inputs_is_computed_in_float32(function, dtype):
    logits, target, features = batch(dtype=dtype)
    actual = function(logits, target, features)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, function(logits.float(), target, features.float()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FocalLoss(gamma=-0.1), "gamma must be 0 or more"),
        (lambda: FocalLoss(gamma=math.nan), "gamma must be 0 or more"),
        (lambda: IB_FocalLoss(gamma=-1), "gamma must be 0 or more"),
        (lambda: FocalLoss(scale=0), "scale must be over 0 and finite, got 0"),
        (lambda: FocalLoss(scale=-10.0), "scale must be over 0"),
        (lambda: FocalLoss(scale=math.inf), "scale must be over 0"),
        (lambda: LDAMLoss(COUNTS, s=0), "s must be over 0"),
        (lambda: LDAMLoss(COUNTS, s=-30), "s must be over 0"),
        (lambda: LDAMLoss(COUNTS, s=math.inf), "s must be over 0 and finite, got inf"),
        (lambda: LDAMLoss(COUNTS, max_m=-0.5), "max_m must be 0 or more and finite, got -0.5"),
        (lambda: LDAMLoss(COUNTS, max_m=math.inf), "max_m must be 0 or more and finite"),
        (lambda: LDAMLoss(COUNTS, max_m=math.nan), "max_m must be 0 or more and finite"),
        (lambda: IBLoss(alpha=0), "alpha must be over 0 and finite, or 'auto'"),
        (lambda: IBLoss(alpha=-1.0), "alpha must be over 0 and finite, or 'auto'"),
        (lambda: IBLoss(alpha=math.nan), "alpha must be over 0 and finite, or 'auto'"),
        (lambda: IBLoss(alpha=math.inf), "alpha must be over 0 and finite, or 'auto'"),
        (lambda: IBLoss(alpha=None), "alpha must be over 0 and finite, or 'auto', got None"),
        (lambda: IBLoss(epsilon=-1e-3), "epsilon must be 0 or more"),
        (lambda: IBLoss(epsilon=math.inf), "epsilon must be 0 or more and finite"),
        (lambda: IBLoss(norm="l3"), "unknown norm 'l3': choose from l1, l2, linf"),
        (lambda: IB_FocalLoss(norm="L1"), "unknown norm 'L1'"),
        (lambda: IB_FocalLoss(alpha=0), "alpha must be over 0"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------------------------------------- alpha 'auto'

AUTO_BATCHES = 20


def ib_at_one(criterion, weight, logits, target, features):
    return build("IBFocal" if isinstance(criterion, IB_FocalLoss) else "IB", weight, alpha=1.0)(
        logits, target, features
    ).item()


@pytest.mark.parametrize("weight", [None, WEIGHT], ids=["plain", "weighted"])
@pytest.mark.parametrize("loss", INFLUENCE_BALANCED)
def test_auto_alpha_is_the_ratio_of_sums_and_then_frozen(loss, weight):
    criterion, ce_sum, ib_sum, alphas = build(loss, weight, alpha="auto"), 0.0, 0.0, []
    for i in range(AUTO_BATCHES + 5):
        inputs = batch(seed=i)
        value = criterion(inputs[0].requires_grad_(), *inputs[1:]).item()
        unit = ib_at_one(criterion, weight, *inputs)
        if i < AUTO_BATCHES:
            ce_sum += F.cross_entropy(*inputs[:2]).item()
            ib_sum += unit
        assert criterion.current_alpha.item() == pytest.approx(ce_sum / ib_sum, rel=1e-6)
        assert value == pytest.approx(unit * ce_sum / ib_sum, rel=1e-5)
        alphas.append(criterion.current_alpha.item())
    assert len(set(alphas[:AUTO_BATCHES])) == AUTO_BATCHES
    assert len(set(alphas[AUTO_BATCHES - 1 :])) == 1


@pytest.mark.parametrize("loss", INFLUENCE_BALANCED)
def test_auto_alpha_gives_the_loss_the_size_of_ce(loss):
    criterion = build(loss, WEIGHT, alpha="auto")
    for i in range(AUTO_BATCHES):
        criterion(*batch(n=64, seed=i))
    criterion.eval()
    for seeds, tolerance in ((range(AUTO_BATCHES), 1e-5), (range(100, 120), 0.1)):
        batches = [batch(n=64, seed=i) for i in seeds]
        mean, ce = sum(criterion(*b) for b in batches), sum(F.cross_entropy(*b[:2]) for b in batches)
        assert (mean / ce).item() == pytest.approx(1.0, rel=tolerance)


def test_auto_alpha_learns_from_training_batches_only():
    criterion = IBLoss(alpha="auto")
    criterion(*batch(seed=0))
    before = copy.deepcopy(criterion.state_dict())
    criterion.eval()(*batch(seed=1))
    with torch.no_grad():
        criterion.train()(*batch(seed=2))
        criterion.factor(*batch(seed=3))
    assert {key: value.tolist() for key, value in before.items()} == {
        key: value.tolist() for key, value in criterion.state_dict().items()
    }


def test_auto_alpha_sums_in_float64():
    """Sums of twenty batches, kept in checkpoints."""
    assert {name: tensor.dtype for name, tensor in IBLoss(alpha="auto").state_dict().items()} == {
        "auto.value": torch.float32, "auto.sums": torch.float64,
    }  # fmt: skip


def test_auto_alpha_of_a_halved_module_still_sums_in_full_precision():
    whole, halved = IBLoss(alpha="auto"), IBLoss(alpha="auto").half()
    for i in range(20):
        assert torch.equal(halved(*batch(seed=i)), whole(*batch(seed=i))), i
    assert halved.auto.sums.tolist() == whole.auto.sums.tolist()
    assert halved.state_dict().keys() == whole.state_dict().keys()
    before = whole.auto.sums
    whole(*batch(seed=20))
    assert whole.auto.sums is before, "a CUDA graph holds the buffer"


@pytest.mark.parametrize("stop", [0, 7, 25])
def test_auto_alpha_survives_a_state_dict_round_trip(stop):
    criterion, resumed = IBLoss(alpha="auto"), IBLoss(alpha="auto")
    for i in range(stop):
        criterion(*batch(seed=i))
    resumed.load_state_dict(copy.deepcopy(criterion.state_dict()))
    for i in range(stop, 30):
        assert torch.equal(resumed(*batch(seed=i)), criterion(*batch(seed=i))), i
        assert torch.equal(resumed.current_alpha, criterion.current_alpha), i


def test_auto_alpha_lets_no_gradient_through():
    logits, target, features = batch()
    auto = IBLoss(alpha="auto")
    value = value_and_gradients(auto, logits, target, features)
    assert_same(value, value_and_gradients(IBLoss(alpha=auto.current_alpha.item()), logits, target, features))


@pytest.mark.parametrize(
    "make",
    [
        lambda: losses.inverse_frequency_weights([3, 0]),
        lambda: losses.effective_number_weights([3, 0]),
        lambda: losses.effective_number_weights([3, 1], beta=1.0),
        lambda: losses.LDAMLoss([3, 0]),
        lambda: losses.IBLoss(alpha="Auto"),
        lambda: losses.row_norm(torch.ones(2, 2), "l3"),
    ],
)
def test_what_would_give_nan_or_a_late_error_is_refused(make):
    with pytest.raises(ValueError, match=r"got|unknown norm"):
        make()


@pytest.mark.parametrize("count", [math.inf, math.nan])
@pytest.mark.parametrize(
    "use",
    [
        losses.inverse_frequency_weights, lambda counts: losses.inverse_frequency_weights(counts, empty="zero"),
        losses.effective_number_weights, losses.effective_number_rates, losses.ldam_margins, losses.log_prior,
        losses.LDAMLoss, losses.VSLoss, losses.LogitAdjustedLoss, losses.BalancedSoftmaxLoss,
    ],
)  # fmt: skip
def test_counts_that_are_not_finite_are_refused(use, count):
    with pytest.raises(ValueError, match=f"a finite count, got the counts .*{count}"):
        use([3.0, count])


@pytest.mark.parametrize("counts", [[50], [50, 20], [50, 20, 10, 5]])
@pytest.mark.parametrize("loss", [losses.LDAMLoss, losses.VSLoss, losses.LogitAdjustedLoss, losses.BalancedSoftmaxLoss])
def test_another_number_of_counts_than_classes_is_refused(loss, counts):
    for shape in ((2, 3), (2, 3, 4)):
        logits, target = torch.zeros(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.int64)
        with pytest.raises(ValueError, match=f"{len(counts)} class counts beside logits of 3 classes"):
            loss(counts)(logits, target)


def test_a_batch_that_is_not_finite_leaves_auto_alpha_alone():
    criterion, target = losses.IBLoss(alpha="auto"), torch.tensor([0, 1])
    features = torch.ones(2)
    criterion(torch.randn(2, 3, requires_grad=True), target, features)
    before = criterion.current_alpha.clone()
    criterion(torch.full((2, 3), float("nan"), requires_grad=True), target, features)
    assert torch.equal(criterion.current_alpha, before)
