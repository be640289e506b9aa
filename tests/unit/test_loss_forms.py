"""Every form in which a loss takes its inputs, against a slow formula, one sample at a time in float64."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

import losses
from losses import IB_FocalLoss, IBLoss

COUNTS = [100, 40, 12, 5, 2]
WEIGHT = torch.tensor([0.25, 0.5, 0.875, 1.25, 2.125])
MARGINS = [0.5 * (min(COUNTS) / n) ** 0.25 for n in COUNTS]
PRIOR = [n / sum(COUNTS) for n in COUNTS]
DIVIDES_BY_WEIGHTS = ("CE", "LDAM", "BS", "LA", "VS")
LOSSES = (*DIVIDES_BY_WEIGHTS, "Focal", "IB", "IBFocal")
FORMS = [(soft, dense) for soft in ("index", "one-hot", "soft") for dense in ((), (3,), (2, 2))]


def build(loss, weight=WEIGHT, **options):
    return {
        "CE": lambda: losses.CrossEntropyLoss(weight, **options),
        "Focal": lambda: losses.FocalLoss(weight, 1.5, **options),
        "LDAM": lambda: losses.LDAMLoss(COUNTS, weight=weight, **options),
        "BS": lambda: losses.BalancedSoftmaxLoss(COUNTS, weight, **options),
        "LA": lambda: losses.LogitAdjustedLoss(COUNTS, 0.7, weight, **options),
        "VS": lambda: losses.VSLoss(COUNTS, 0.3, 0.7, weight, **options),
        "IB": lambda: IBLoss(weight, 50.0, raw_features=True, **options),
        "IBFocal": lambda: IB_FocalLoss(weight, 50.0, 1.5, raw_features=True, **options),
    }[loss]()


def function_of(loss, *inputs, weight=WEIGHT, **options):
    """The same loss as a function."""
    logits, target, features = inputs
    margins = losses.ldam_margins(COUNTS)
    return {
        "CE": lambda: losses.cross_entropy(logits, target, weight, **options),
        "Focal": lambda: losses.focal_loss(logits, target, weight, 1.5, **options),
        "LDAM": lambda: losses.ldam_loss(logits, target, margins, weight, **options),
        "BS": lambda: losses.balanced_softmax(logits, target, COUNTS, weight, **options),
        "LA": lambda: losses.logit_adjusted_cross_entropy(logits, target, COUNTS, 0.7, weight, **options),
        "VS": lambda: losses.vs_loss(logits, target, COUNTS, 0.3, 0.7, weight, **options),
        "IB": lambda: losses.ib_loss(logits, target, features, weight, 50.0, raw_features=True, **options),
        "IBFocal": lambda: losses.ib_focal_loss(
            logits, target, features, weight, 50.0, 1.5, raw_features=True, **options
        ),
    }[loss]()


def batch(soft="index", dense=(), n=6, width=4, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, 5, *dense, generator=generator, dtype=torch.float64)
    features = torch.randn(n, width, *dense, generator=generator, dtype=torch.float64)
    target = torch.randint(5, (n, *dense), generator=generator)
    if soft != "index":
        target = F.one_hot(target, 5).movedim(-1, 1).to(dtype)
    if soft == "soft":
        other = torch.rand(n, 5, *dense, generator=generator, dtype=torch.float64).softmax(1).to(dtype)
        target = 0.7 * target + 0.3 * other
    return logits.to(dtype), target, features.to(dtype)


def slow_sample(loss, z, y, h, weight):
    """The loss of one sample with the probabilities y, (K,), as the papers write it; z and h are leaves."""
    shifted = {
        "LDAM": lambda k: 30 * (z[k] - y[k] * MARGINS[k]),
        "BS": lambda k: z[k] + math.log(COUNTS[k]),
        "LA": lambda k: z[k] + 0.7 * math.log(PRIOR[k]),
        "VS": lambda k: z[k] * (COUNTS[k] / 100) ** 0.3 + 0.7 * math.log(PRIOR[k]),
    }.get(loss, lambda k: z[k])
    exponentials = [torch.exp(shifted(k)) for k in range(5)]
    p = [e / sum(exponentials) for e in exponentials]
    ce = -sum(weight[k] * y[k] * torch.log(p[k]) for k in range(5))
    value = 10 * ce if loss == "Focal" else ce
    if loss in ("Focal", "IBFocal"):
        value = value * (1 - torch.exp(-ce)) ** 1.5
    if loss in ("IB", "IBFocal"):
        value = value * 50 / (sum((p[k] - y[k]).abs() for k in range(5)) * h.abs().sum() + 1e-3)
    return value


def slow(loss, logits, target, features, weight=WEIGHT):
    """(loss of each sample, what it counts in a mean), (N, ...); gradients flow to logits and features."""
    soft = target if target.is_floating_point() else F.one_hot(target, 5).movedim(-1, 1).double()
    values, counts = [], []
    places = list(itertools.product(*map(range, [len(logits), *logits.shape[2:]])))
    for n, *rest in places:
        z, y, h = (x[(n, slice(None), *rest)] for x in (logits, soft, features))
        values.append(slow_sample(loss, z, y, h, weight.tolist()))
        divides = loss in DIVIDES_BY_WEIGHTS and not target.is_floating_point()
        counts.append(weight[target[(n, *rest)]].double() if divides else torch.ones((), dtype=torch.float64))
    shape = logits.shape[:1] + logits.shape[2:]
    return torch.stack(values).reshape(shape), torch.stack(counts).reshape(shape)


def leaves(logits, target, features):
    return logits.clone().requires_grad_(), target, features.clone().requires_grad_()


@pytest.mark.parametrize(("soft", "dense"), FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_values_and_gradients_are_those_of_the_slow_formula(loss, soft, dense):
    inputs = batch(soft, dense)
    (logits, target, features), (z, _, h) = leaves(*inputs), leaves(*inputs)
    expected, counts = slow(loss, z, target, h)
    (expected.sum() / counts.sum()).backward()
    rows, row_counts = build(loss).per_sample(logits, target, features)
    tolerance = {"rtol": 1e-5 if loss in ("LDAM", "BS", "LA", "VS") else 1e-9, "atol": 1e-12}  # float32 buffers
    torch.testing.assert_close(rows, expected, **tolerance)
    torch.testing.assert_close(row_counts, counts, rtol=1e-12, atol=0)
    assert not row_counts.requires_grad
    value = build(loss)(logits, target, features)
    torch.testing.assert_close(value, expected.sum() / counts.sum(), **tolerance)
    value.backward()
    torch.testing.assert_close(logits.grad, z.grad, rtol=tolerance["rtol"], atol=1e-6 * z.grad.abs().max().item())
    if h.grad is None:
        assert features.grad is None
    else:
        torch.testing.assert_close(features.grad, h.grad, **tolerance)


@pytest.mark.parametrize(("soft", "dense"), FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_reductions_of_function_and_module(loss, soft, dense):
    inputs = batch(soft, dense)
    rows, counts = build(loss).per_sample(*inputs)
    expected = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / counts.sum()}
    assert rows.shape == counts.shape == (6, *dense)
    for reduction, value in expected.items():
        assert torch.equal(build(loss, reduction=reduction)(*inputs), value)
        torch.testing.assert_close(function_of(loss, *inputs, reduction=reduction), value, rtol=1e-6, atol=0)
    torch.testing.assert_close(function_of(loss, *inputs), expected["mean"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dense", [(), (3,), (2, 2)])
@pytest.mark.parametrize("loss", LOSSES)
def test_one_hot_probabilities_are_the_index(loss, dense):
    (logits, target, features), (_, one_hot, _) = batch("index", dense), batch("one-hot", dense)
    for dtype in (torch.float32, torch.float64):
        rows = build(loss).per_sample(logits.to(dtype), target, features.to(dtype))[0]
        from_one_hot = build(loss).per_sample(logits.to(dtype), one_hot.to(dtype), features.to(dtype))[0]
        torch.testing.assert_close(from_one_hot, rows, rtol=1e-6, atol=1e-7)


def test_one_hot_probabilities_of_a_confident_hit_do_not_cancel():
    logits, features = torch.tensor([[25.0, 0.0, 1.0]]), torch.tensor([2.0])
    one_hot = torch.tensor([[1.0, 0.0, 0.0]])
    expected = losses.influence(logits.double(), torch.tensor([0]), features)
    torch.testing.assert_close(losses.influence(logits, one_hot, features).double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dense", [(), (2, 2)])
@pytest.mark.parametrize("ignore_index", [-100, 255, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_targets_take_no_part(loss, ignore_index, dense):
    logits, target, features = leaves(*batch(dense=dense, n=9))
    target = torch.where(target == 3, 2, target)
    generator = torch.Generator().manual_seed(1)
    ignored = torch.rand(target.shape, generator=generator) < 0.4
    target = target.masked_fill(ignored, ignore_index)
    criterion = build(loss, ignore_index=ignore_index)
    rows, counts = criterion.per_sample(logits, target, features)
    assert 0 < ignored.sum() < target.numel()
    assert rows[ignored].eq(0).all()
    assert torch.equal(counts == 0, ignored)
    kept = [x.movedim(1, -1)[~ignored] for x in (logits, features)]  # the samples that are kept, as (M, K) and (M, D)
    torch.testing.assert_close(criterion(logits, target, features), build(loss)(kept[0], target[~ignored], kept[1]))
    options = {"ignore_index": ignore_index}
    torch.testing.assert_close(
        function_of(loss, logits, target, features, **options), criterion(logits, target, features), rtol=1e-6, atol=0
    )
    criterion(logits, target, features).backward()
    assert logits.grad.movedim(1, -1)[ignored].eq(0).all()
    assert logits.grad.movedim(1, -1)[~ignored].ne(0).any(1).all()
    if criterion.needs_features:
        assert criterion.factor(logits, target, features).shape == target.shape


@pytest.mark.parametrize("weight", [None, WEIGHT.double()], ids=["plain", "weighted"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(("soft", "dense"), FORMS)
def test_cross_entropy_is_torchs_in_every_form(soft, dense, reduction, weight):
    logits, target, _ = batch(soft, dense)
    if soft == "index":
        target[0] = -100
    expected = F.cross_entropy(logits, target, weight=weight, reduction=reduction)
    torch.testing.assert_close(losses.cross_entropy(logits, target, weight, reduction=reduction), expected)
    torch.testing.assert_close(losses.CrossEntropyLoss(weight, reduction=reduction)(logits, target), expected)


@pytest.mark.parametrize("wrong", [5, -1, -100])
@pytest.mark.parametrize("loss", LOSSES)
def test_a_target_that_is_no_class_is_an_error(loss, wrong):
    """Also -100, where another index is the ignored one."""
    logits, target, features = batch()
    target[2] = wrong
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        build(loss, ignore_index=255)(logits, target, features)


def test_everything_ignored_gives_what_torch_gives():
    logits, target = torch.zeros(2, 3), torch.full((2,), -100)
    assert losses.cross_entropy(logits, target, reduction="sum") == 0
    assert losses.cross_entropy(logits, target).isnan()


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_targets_may_be_any_integers(kind):
    logits, target, features = batch()
    assert torch.equal(build("IB")(logits, target.to(kind), features), build("IB")(logits, target, features))
    assert torch.equal(build("CE")(logits, target.to(kind)), build("CE")(logits, target))


def test_probabilities_in_half_precision_are_taken_in_the_type_of_the_logits():
    logits, target, features = batch("soft", dtype=torch.float32)
    target = target.bfloat16()
    assert torch.equal(build("IB")(logits, target, features), build("IB")(logits, target.float(), features))


@pytest.mark.parametrize("dense", [(), (2, 2)])
@pytest.mark.parametrize("loss", LOSSES)
def test_gradcheck_of_soft_targets(loss, dense):
    logits, target, features = batch("soft", dense, n=2)
    inputs = [logits.requires_grad_()] + ([features.requires_grad_()] if loss.startswith("IB") else [])
    assert torch.autograd.gradcheck(lambda z, h=features: build(loss)(z, target, h), inputs)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_put_together_from_shares(loss):
    """Also with an empty share: what ranks do with a small last batch."""
    inputs = batch(n=9)
    criterion = build(loss)
    shares = [criterion.per_sample(*(x[part] for x in inputs)) for part in (slice(4), slice(4, 9), slice(9, 9))]
    together = sum(rows.sum() for rows, _ in shares) / sum(counts.sum() for _, counts in shares)
    torch.testing.assert_close(together, criterion(*inputs))


def test_losses_without_influence_ignore_the_features():
    logits, target, features = batch()
    for loss in ("CE", "Focal", "LDAM", "BS", "LA", "VS"):
        criterion = build(loss)
        assert not criterion.needs_features
        assert torch.equal(criterion(logits, target), criterion(logits, target, features=features))


# ------------------------------------------------------------------------------------------- the features


@pytest.mark.parametrize("norm", ["l1", "l2", "linf", "none"])
@pytest.mark.parametrize("dense", [(), (3,), (2, 2)])
def test_raw_features_and_their_norms_give_the_same(dense, norm):
    logits, target, features = batch(dense=dense)
    order = {"l1": 1, "l2": 2, "linf": math.inf, "none": 1}[norm]
    norms = torch.linalg.vector_norm(features, order, dim=1)
    for family in (IBLoss, IB_FocalLoss):
        raw = family(WEIGHT, norm=norm, raw_features=True)
        column, flat = (family(WEIGHT, norm=norm) for _ in range(2))
        expected = flat(logits, target, norms)
        torch.testing.assert_close(raw(logits, target, features), expected, rtol=1e-12, atol=0)
        assert torch.equal(column(logits, target, norms.unsqueeze(1)), expected)
        torch.testing.assert_close(raw.factor(logits, target, features), flat.factor(logits, target, norms))


def test_raw_features_are_taken_in_full_precision():
    logits, target, features = batch(dtype=torch.float16, width=300)
    criterion = IBLoss(alpha=1.0, raw_features=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = criterion(logits, target, features)
    assert value.dtype == torch.float32
    assert torch.equal(value, criterion(logits.float(), target, features.float()))


def test_one_sample_with_raw_features_is_never_taken_for_norms():
    """The defect: (1, D) was read as the norms of D samples, and the loss came out wrong without a word."""
    logits, target, features = batch(n=1, width=8)
    with pytest.raises(ValueError, match="raw_features=True"):
        IBLoss()(logits, target, features)
    expected, _ = slow("IB", logits, target, features, torch.ones(5))
    criterion = IBLoss(alpha=50.0, raw_features=True)
    assert criterion(logits, target, features).item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize(
    ("logits", "features", "raw", "message"),
    [
        ((4, 5), (4, 8), False, r"features must have the shape \(4,\) or \(4, 1\), one norm a sample, got \(4, 8\)"),
        ((4, 5), (1, 4), False, r"got \(1, 4\); raw_features=True"),
        ((4, 5), (3, 1), False, r"got \(3, 1\)"),
        ((4, 5), (4, 1, 1), False, r"got \(4, 1, 1\)"),
        ((4, 5), (), False, r"got \(\)"),
        ((4, 5, 2), (4, 8, 2), False, r"the shape \(4, 2\) or \(4, 1, 2\)"),
        ((4, 5), (4,), True, r"the shape \(4, 'D'\), got \(4,\)$"),
        ((4, 5), (3, 8), True, r"got \(3, 8\)$"),
        ((4, 5, 2), (4, 8), True, r"the shape \(4, 'D', 2\), got \(4, 8\)$"),
        ((4, 5, 2), (4, 8, 3), True, r"got \(4, 8, 3\)$"),
    ],
)
def test_features_of_another_shape_are_refused_in_one_line(logits, features, raw, message):
    target = torch.zeros(logits[:1] + logits[2:], dtype=torch.int64)
    with pytest.raises(ValueError, match=message) as error:
        IBLoss(raw_features=raw)(torch.zeros(logits), target, torch.ones(features))
    assert "\n" not in str(error.value)


def test_missing_features_are_named():
    with pytest.raises(ValueError, match="features must have the shape"):
        IBLoss()(torch.zeros(2, 3), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (torch.zeros(4, 5), torch.zeros(4), r"got float32 of shape \(4,\) beside \(4, 5\)"),
        (torch.zeros(4, 5), torch.zeros(4, 5, dtype=torch.int64), r"got int64 of shape \(4, 5\) beside \(4, 5\)"),
        (torch.zeros(4, 5), torch.zeros(3, dtype=torch.int64), r"got int64 of shape \(3,\)"),
        (torch.zeros(4, 5), torch.zeros(4, 4), r"got float32 of shape \(4, 4\)"),
        (torch.zeros(4, 5, 2), torch.zeros(4, dtype=torch.int64), r"beside \(4, 5, 2\)"),
        (torch.zeros(5), torch.tensor(1), r"beside \(5,\)"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_targets_of_another_shape_are_refused_in_one_line(loss, logits, target, message):
    with pytest.raises(ValueError, match=message) as error:
        build(loss)(logits, target, torch.ones(logits.shape))
    assert "\n" not in str(error.value)


def test_unknown_names_are_refused():
    for make in (
        lambda: losses.CrossEntropyLoss(reduction="average"),
        lambda: losses.cross_entropy(torch.zeros(1, 2), torch.tensor([0]), reduction="average"),
    ):
        with pytest.raises(ValueError, match="unknown reduction 'average': choose from mean, sum, none"):
            make()
    with pytest.raises(ValueError, match="unknown auto_target 'CE': choose from ce, ib"):
        IBLoss(alpha="auto", auto_target="CE")
    with pytest.raises(ValueError, match="unknown empty 'skip'"):
        losses.inverse_frequency_weights([1, 2], empty="skip")


# ------------------------------------------------------------------------------ the same bits as before


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("n", [32, 64, 128])
def test_gradients_are_those_of_the_plain_formulas_to_the_bit(n, classes):
    """What the loop does, (loss.sum() / count.sum()).backward(), against the means of the official formulas."""
    generator = torch.Generator().manual_seed(n + classes)
    logits = 4 * torch.randn(n, classes, generator=generator)
    target = torch.randint(classes, (n,), generator=generator)
    norms = 40 * torch.rand(n, 1, generator=generator)
    weight = losses.inverse_frequency_weights([int(500 * 0.01 ** (k / (classes - 1))) for k in range(classes)])

    def plain_ib(z, h):
        others = F.softmax(z, dim=1).scatter(1, target[:, None], 0.0)
        error = others.scatter_add(1, target[:, None], -others.sum(1, keepdim=True))
        factor = 1000.0 / (error.abs().sum(1) * h.reshape(-1) + 1e-3)
        return (F.cross_entropy(z, target, reduction="none") * weight[target] * factor).mean()

    for criterion, plain in (
        (losses.CrossEntropyLoss(), lambda z, h: F.cross_entropy(z, target)),
        (IBLoss(weight), plain_ib),
    ):
        (z, _, h), (z2, _, h2) = leaves(logits, target, norms), leaves(logits, target, norms)
        loss, count = criterion.per_sample(z, target, h)
        (loss.sum() / count.sum()).backward()
        plain(z2, h2).backward()
        assert torch.equal(z.grad, z2.grad)
        assert h2.grad is None or torch.equal(h.grad, h2.grad)


# -------------------------------------------------------------------------------------- other people's code


def test_call_form_of_intels_otx():
    """OTX: weights 1 / (n + 1e-3) scaled to sum to K, raw features, criterion(logits, target, features)."""
    logits, target, features = batch(dtype=torch.float32)
    inverse = [1 / (n + 1e-3) for n in COUNTS]
    weight = torch.tensor([5 * w / sum(inverse) for w in inverse])
    torch.testing.assert_close(losses.inverse_frequency_weights([n + 1e-3 for n in COUNTS]), weight)
    size = (F.softmax(logits, 1) - F.one_hot(target, 5)).abs().sum(1) * features.abs().sum(1)
    expected = (F.cross_entropy(logits, target, weight=weight, reduction="none") * 1000 / (size + 0.001)).mean()
    torch.testing.assert_close(IBLoss(weight, alpha=1000.0, raw_features=True)(logits, target, features), expected)
    torch.testing.assert_close(losses.ib_loss(logits, target, features, weight, raw_features=True), expected)


def test_call_form_of_bagoftricks_lt():
    """BagofTricks-LT: raw features, weights 1 / n scaled to sum to K; in the first phase plain weighted CE."""
    logits, target, features = batch(dtype=torch.float32)
    weight = losses.inverse_frequency_weights(COUNTS)
    size = (F.softmax(logits, 1) - F.one_hot(target, 5)).abs().sum(1) * features.abs().sum(1)
    expected = (F.cross_entropy(logits, target, weight=weight, reduction="none") * 1000 / (size + 1e-3)).mean()
    criterion = IBLoss(weight, alpha=1000, raw_features=True)
    torch.testing.assert_close(criterion(logits, target, features=features), expected)


def test_weights_of_classes_without_images():
    weights = losses.inverse_frequency_weights([4, 0, 1], empty="zero")
    assert weights.tolist() == pytest.approx([0.4, 0.0, 1.6])
    assert losses.inverse_frequency_weights([3, 1], empty="zero").tolist() == [0.5, 1.5]
    with pytest.raises(ValueError, match="every class needs a training image"):
        losses.inverse_frequency_weights([4, 0, 1])
    with pytest.raises(ValueError, match="every class needs a training image"):
        losses.inverse_frequency_weights([4, -1, 1], empty="zero")


# ------------------------------------------------------------------------------------------- alpha 'auto'


def auto_batch(seed):
    return batch(n=16, seed=seed, dtype=torch.float32)


def raw_ib(norm="l1", **options):
    return IBLoss(WEIGHT, norm=norm, raw_features=True, **options)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf", "none"])
def test_auto_alpha_aims_at_the_published_ib_loss(norm):
    """Norm 'none': class weights alone at IB's size, the control that Table 2 lacks."""
    criterion, published = raw_ib(norm, alpha="auto", auto_target="ib", epsilon=0.01), raw_ib()
    for seed in range(20):
        criterion.calibrate(*auto_batch(seed))
    sums = [sum(c(*auto_batch(seed)).item() for seed in range(20)) for c in (criterion.eval(), published)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


def test_auto_alpha_of_norm_none_with_norms_as_features():
    criterion = IBLoss(WEIGHT, "auto", norm="none", auto_target="ib")
    logits, target, features = auto_batch(0)
    norms = features.abs().sum(1)
    value = criterion(logits.requires_grad_(), target, norms)
    assert value.item() == pytest.approx(IBLoss(WEIGHT)(logits, target, norms).item(), rel=1e-6)
    ratio = value / (WEIGHT[target] * F.cross_entropy(logits, target, reduction="none")).mean()
    torch.testing.assert_close(criterion.factor(logits, target, norms), ratio.expand(16))  # the same for all samples


def test_ib_focal_aims_at_the_published_ib_focal_loss():
    criterion = IB_FocalLoss(WEIGHT, "auto", 1.0, norm="none", auto_target="ib", raw_features=True)
    published = IB_FocalLoss(WEIGHT, gamma=1.0, raw_features=True)
    inputs = auto_batch(0)
    assert criterion(*inputs).item() == pytest.approx(published(*inputs).item(), rel=1e-6)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_auto_target_ib_needs_l1_norms(norm):
    with pytest.raises(ValueError, match="needs features in the L1 norm"):
        IBLoss(alpha="auto", norm=norm, auto_target="ib")


def share_of_calibration(part, target):
    """What a rank with that part of a batch gives to the sum over the ranks, once a call."""
    collected = []
    raw_ib(alpha="auto", auto_target=target).calibrate(*part, all_reduce_sum=lambda x: collected.append(x) or x)
    return collected


@pytest.mark.parametrize("target", ["ce", "ib"])
def test_auto_alpha_is_the_same_however_the_batch_is_shared(target):
    """Also with an empty share."""
    whole = raw_ib(alpha="auto", auto_target=target)
    for seed in range(3):
        inputs = auto_batch(seed)
        whole.calibrate(*inputs)
    shared = raw_ib(alpha="auto", auto_target=target)
    for seed in range(3):
        parts = [[x[part] for x in auto_batch(seed)] for part in (slice(7), slice(7, 16), slice(16, 16))]
        collected = [share_of_calibration(part, target) for part in parts]
        assert [len(sums) for sums in collected] == [1, 1, 1]
        total = torch.stack([sums[0] for sums in collected]).sum(0)
        shared.calibrate(*parts[2], all_reduce_sum=lambda x, total=total: total)
    assert torch.equal(shared.current_alpha, whole.current_alpha)
    torch.testing.assert_close(shared.auto.sums, whole.auto.sums, rtol=1e-12, atol=0)


def test_ignored_targets_do_not_enter_the_calibration():
    logits, target, features = auto_batch(0)
    one, other = raw_ib(alpha="auto"), raw_ib(alpha="auto")
    one.calibrate(logits[:10], target[:10], features[:10])
    target[10:] = -100
    other.calibrate(logits, target, features)
    torch.testing.assert_close(other.auto.sums, one.auto.sums)


def test_a_first_batch_that_is_not_finite_leaves_alpha_at_one():
    criterion = raw_ib(alpha="auto")
    logits, target, features = auto_batch(0)
    criterion.calibrate(logits * math.nan, target, features)
    assert criterion.current_alpha == 1
    assert criterion.auto.sums.tolist() == [0, 0, 0]


def test_calibrate_does_nothing_where_alpha_is_fixed():
    inputs = auto_batch(0)
    for criterion in (raw_ib(alpha=7.0), losses.CrossEntropyLoss()):
        criterion.calibrate(*inputs)
        assert criterion.state_dict() == {}
    assert raw_ib(alpha=7.0).current_alpha == 7.0


@pytest.mark.parametrize("prefix", ["", "criterion."])
def test_checkpoints_with_the_old_names_load(prefix):
    old = {"alpha": torch.tensor(321.5), "calibration": torch.tensor([9.0, 3.0, 20.0], dtype=torch.float64)}
    criterion = IBLoss(alpha="auto")
    module = torch.nn.ModuleDict({"criterion": criterion}) if prefix else criterion
    state = {prefix + name: tensor for name, tensor in old.items()}
    module.load_state_dict(state)
    assert criterion.current_alpha == 321.5
    assert criterion.auto.sums.tolist() == [9, 3, 20]
    assert list(state) == [prefix + "alpha", prefix + "calibration"]  # the caller's stays as it was
    IBLoss(alpha="auto").load_state_dict(criterion.state_dict())
