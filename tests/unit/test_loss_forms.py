"""What the losses take: every form of target, weights, counts and features, what they refuse, and alpha 'auto'."""

import collections
import copy
import functools
import itertools
import math
from unittest import mock

import numpy as np
import pytest
import torch
from loss_maker import COUNTS, INFLUENCE_BALANCED, LOSSES, WEIGHT, assert_same, batch, build, value_and_gradients
from torch.nn import functional as F

import losses
from losses import CrossEntropyLoss, FocalLoss, IB_FocalLoss, IBLoss, LDAMLoss, LogitAdjustedLoss, VSLoss

CIFAR_COUNTS = [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]  # CIFAR-10-LT, ratio 100


def refused(message, make):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------- reductions, ignored targets


@pytest.mark.parametrize("loss", LOSSES)
def test_reductions_and_a_batch_put_together_from_shares(loss):
    """Also with an empty share: what ranks do with a small last batch."""
    for soft, dense in (("index", ()), ("soft", (2, 2))):
        inputs = batch(soft, dense, n=9)
        rows, counts = build(loss).per_sample(*inputs)
        assert rows.shape == counts.shape == (9, *dense)
        for reduction, value in {"none": rows, "sum": rows.sum(), "mean": rows.sum() / counts.sum()}.items():
            assert torch.equal(build(loss, reduction=reduction)(*inputs), value)
        parts = (slice(4), slice(4, 9), slice(9, 9))
        shares = [build(loss).per_sample(*(x[part] for x in inputs)) for part in parts]
        together = sum(part.sum() for part, _ in shares) / sum(count.sum() for _, count in shares)
        torch.testing.assert_close(together, build(loss)(*inputs))


@pytest.mark.parametrize("loss", LOSSES)
def test_ignored_targets_take_no_part(loss):
    for ignore_index, dense, smoothing in ((-100, (), 0.0), (255, (2, 2), 0.1), (3, (2, 2), 0.0)):
        logits, target, features = batch(dense=dense, n=9)
        target = torch.where(target == 3, 2, target)
        ignored = torch.rand(target.shape, generator=torch.Generator().manual_seed(1)) < 0.4
        target = target.masked_fill(ignored, ignore_index)
        criterion = build(loss, ignore_index=ignore_index, label_smoothing=smoothing)
        rows, counts = criterion.per_sample(logits, target, features)
        assert 0 < ignored.sum() < target.numel()
        assert rows[ignored].eq(0).all()
        assert torch.equal(counts == 0, ignored)
        kept = [x.movedim(1, -1)[~ignored] for x in (logits, features)]  # those that count, as (M, K) and (M, D)
        alone = build(loss, label_smoothing=smoothing)(kept[0], target[~ignored], kept[1])
        value, dlogits, _ = value_and_gradients(criterion, logits, target, features)
        torch.testing.assert_close(value, alone)
        assert dlogits.movedim(1, -1)[ignored].eq(0).all()
        assert dlogits.movedim(1, -1)[~ignored].ne(0).any(1).all()


def test_a_target_that_is_no_class_is_an_error():
    """Also -100, where another index is the ignored one."""
    for loss, wrong in itertools.product(LOSSES, (5, -1, -100)):
        logits, target, features = batch()
        target[2] = wrong
        for weight in (WEIGHT, None):
            with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
                build(loss, weight, ignore_index=255)(logits, target, features)


def test_targets_may_be_any_integers_and_any_width_of_probabilities():
    logits, target, features = batch()
    for kind in (torch.uint8, torch.int16, torch.int32):
        assert torch.equal(build("IB")(logits, target.to(kind), features), build("IB")(logits, target, features))
    many = torch.zeros(2, 200), torch.tensor([156, 1], dtype=torch.uint8)
    assert CrossEntropyLoss()(*many) == CrossEntropyLoss()(many[0], many[1].long())
    soft = batch("soft")[1].bfloat16()
    assert torch.equal(build("IB")(logits, soft, features), build("IB")(logits, soft.double(), features))


def test_everything_ignored_gives_what_torch_gives():
    logits, target = torch.zeros(2, 3), torch.full((2,), -100)
    assert CrossEntropyLoss(reduction="sum")(logits, target) == 0
    assert CrossEntropyLoss()(logits, target).isnan()


# ------------------------------------------------------------------------------- soft targets and smoothing


@pytest.mark.parametrize(("soft", "dense"), [("index", (2, 2)), ("soft", (3,))])
def test_cross_entropy_is_torchs_with_its_label_smoothing(soft, dense):
    logits, target, _ = batch(soft, dense)
    if soft == "index":
        target[0] = -100
    for reduction in ("mean", "sum", "none"):
        for smoothing in (0.0, 0.1):
            options = {"reduction": reduction, "label_smoothing": smoothing}
            expected = F.cross_entropy(logits, target, **options)
            torch.testing.assert_close(CrossEntropyLoss(**options)(logits, target), expected)
    if soft == "index":
        expected = F.cross_entropy(logits, target, weight=WEIGHT.double())
        torch.testing.assert_close(CrossEntropyLoss(WEIGHT)(logits, target), expected)


@pytest.mark.parametrize("loss", LOSSES)
def test_smoothing_is_a_soft_target_with_the_weight_of_its_label(loss):
    logits, target, features = batch(n=9)
    rows = 0.9 * F.one_hot(target, 5).double() + 0.02
    smoothed, count = build(loss, gamma=0.0, label_smoothing=0.1).per_sample(logits, target, features)
    plain, _ = build(loss, None, gamma=0.0).per_sample(logits, rows, features)
    torch.testing.assert_close(smoothed, WEIGHT[target] * plain)
    torch.testing.assert_close(count, build(loss).per_sample(logits, target, features)[1])


def learned(make, target, start):
    """What free logits learn from each row of `start`, as probabilities: steps of a length that falls from 0.2 to 0."""
    logits, criterion = start.log().requires_grad_(), make(reduction="none")
    for step in range(800):
        loss = criterion(logits, target, torch.full((len(target),), 32.0))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        with torch.no_grad():
            logits -= 0.2 * (1 - step / 800) * F.normalize(gradient, dim=1)
    return logits.detach().softmax(1)


def test_class_weights_beside_soft_targets_do_not_move_what_is_learned():
    """torch's formula, weights inside the sum over the classes, teaches the largest class as the smallest."""
    soft, weight = 0.9 * torch.eye(10) + 0.01, losses.inverse_frequency_weights(CIFAR_COUNTS)
    for kind in (CrossEntropyLoss, IBLoss):
        found = learned(lambda kind=kind, **options: kind(weight, **options), soft, torch.full((10, 10), 0.1))
        torch.testing.assert_close(found, soft, rtol=0, atol=5e-3)


SMOOTHED, MIXED = [0.91] + 9 * [0.01], [0.7, 0.3] + 8 * [0.0]


@pytest.mark.parametrize(
    ("make", "detach"), [(IBLoss, False), (lambda **options: IB_FocalLoss(gamma=1.0, **options), True)]
)
def test_soft_targets_under_the_factor_are_learned_and_kept(make, detach):
    """CE / |p - y|, the naive form, ends at p = 0.40 of smoothed targets and at the wrong class of mixed ones."""
    targets = torch.tensor([SMOOTHED, MIXED])
    starts = [0.1 + 0 * targets, 0.9 * targets + 0.01, 0.999 * targets + 1e-4, 0.9 * targets.flip(1) + 0.01]
    found = learned(lambda **options: make(detach=detach, **options), targets.repeat(4, 1), torch.cat(starts))
    torch.testing.assert_close(found, targets.repeat(4, 1), rtol=0, atol=0.02)


@pytest.mark.parametrize(("loss", "norm"), [("IB", "l1"), ("IB", "l2"), ("IBFocal", "linf")])
def test_the_factor_of_soft_targets_vanishes_at_the_target_and_grows_away_from_it(loss, norm):
    """On any line from y, so that p = y is the only stationary point; and the limit at y is 0."""
    generator = torch.Generator().manual_seed(0)
    for y in (torch.tensor(SMOOTHED), torch.tensor(MIXED), torch.rand(10, generator=generator).softmax(0)):
        y = y.double() / y.double().sum()
        criterion = build(loss, None, norm=norm, gamma=1.0, alpha=1.0, raw_features=False, reduction="none")
        steps = torch.cat([torch.tensor([1e-9]), torch.logspace(-5, 0, 39)]).double()[:, None]
        for _ in range(5):
            corner = torch.rand(10, generator=generator, dtype=torch.float64).mul(4).softmax(0)
            points = (1 - steps) * y + steps * corner
            values = criterion(points.log(), y.expand(40, 10), torch.full((40,), 32.0))
            assert (values.diff() > 0).all()
            assert abs(values[0]) < 1e-5


def test_multi_label_rows_and_single_logits_are_refused():
    criterion = IBLoss(raw_features=True)
    for rows in ([[1.0, 1.0, 0.0]], [[0.0, 0.0, 0.0]], [[1.5, -0.5, 0.0]], [[math.nan, 1.0, 0.0]]):
        refused(
            "sum to 1 over the classes.*BCEWithLogitsLoss",
            lambda rows=rows: criterion(torch.zeros(1, 3), torch.tensor(rows), torch.ones(1, 2)),
        )
    for target in (torch.ones(4, 1), torch.zeros(4, dtype=torch.int64)):
        refused("logits of one class", lambda y=target: criterion(torch.zeros(4, 1), y, torch.ones(4, 2)))


TARGETS = [
    (torch.zeros(4, 5), torch.zeros(4), r"got float32 of shape \(4,\) for logits of shape \(4, 5\)"),
    (torch.zeros(4, 5), torch.zeros(4, 5, dtype=torch.int64), r"got int64 of shape \(4, 5\) for .*BCEWithLogits"),
    (torch.zeros(4, 5), torch.zeros(3, dtype=torch.int64), r"got int64 of shape \(3,\)"),
    (torch.zeros(4, 5, 2), torch.zeros(4, dtype=torch.int64), r"logits of shape \(4, 5, 2\)"),
    (torch.zeros(5), torch.tensor(1), r"logits of shape \(5,\)"),
]


def test_targets_of_another_shape_are_refused():
    for loss, (logits, target, message) in itertools.product(("CE", "IB"), TARGETS):
        refused(message, functools.partial(build(loss), logits, target, torch.ones(logits.shape)))


# ----------------------------------------------------------------------------- class counts, class weights


USERS_OF_COUNTS = [
    losses.inverse_frequency_weights, losses.effective_number_weights, losses.effective_number_rates, losses.log_prior,
    lambda *args, **options: LDAMLoss(*args, **options).margins,
    lambda *args, **options: losses.BalancedSoftmaxLoss(*args, **options).shift,
]  # fmt: skip


@pytest.mark.parametrize("use", USERS_OF_COUNTS)
def test_class_counts_in_every_form(use):
    expected = use([7, 3, 1])
    labels = [1] * 3 + [2] + [0] * 7  # a Counter is in the order in which the labels came
    for counts in (
        np.array([7, 3, 1]), [np.int64(7), np.int32(3), np.float32(1)], torch.tensor([7, 3, 1]), (7, 3, 1),
        collections.Counter(labels), collections.Counter(np.array(labels)), {2: 1, 0: 7, 1: 3},
    ):  # fmt: skip
        assert torch.equal(use(counts), expected)
    refused("need the classes 0 to K-1, got .'cat', 'dog'.", lambda: use({"cat": 7, "dog": 3}))
    refused("need the classes 0 to K-1", lambda: use({1: 7, 2: 3}))
    refused("must be K numbers, got the shape", lambda: use([[7, 3]]))
    for wrong in (0, -1, 0.5, math.inf, math.nan):
        refused("every class needs a training image and a finite count, got", lambda n=wrong: use([3.0, n]))
    refused("every class needs", lambda: use([0, 0], empty="zero"))
    refused("unknown empty 'skip'", lambda: use([1, 2], empty="skip"))
    seen, zero = use([7, 3, 0], empty="zero"), use([7, 3])
    torch.testing.assert_close(seen[:2], zero)
    assert seen[2] in (0, -1e6, -1.2e6)


@pytest.mark.parametrize("loss", ["LDAM", "BS", "VS"])
def test_a_class_without_images_takes_no_part(loss):
    logits, target, _ = batch()
    target = target % 4
    weight = losses.effective_number_weights([*COUNTS[:4], 0], empty="zero")
    found = value_and_gradients(build(loss, weight, [*COUNTS[:4], 0], empty="zero"), logits, target, logits)
    expected = value_and_gradients(build(loss, weight[:4], COUNTS[:4]), logits[:, :4], target, logits)
    if loss == "LDAM":  # whose logits stay comparable: the class without images is one more wrong answer
        assert found[0] > expected[0]
    else:
        assert_same([found[0], found[1][:, :4]], expected[:2])
        assert found[1][:, 4].eq(0).all()
    assert build(loss, weight, [*COUNTS[:4], 0], empty="zero", label_smoothing=0.1)(logits, target).isfinite()


@pytest.mark.parametrize("loss", ["CE", "VS", "IB"])
def test_class_weights_are_a_buffer_and_as_many_as_classes(loss):
    criterion = build(loss, WEIGHT.double().numpy())
    assert criterion.weight.dtype == torch.float32
    assert criterion.double().weight.dtype == torch.float64
    assert {buffer.device.type for buffer in criterion.to("meta").buffers()} == {"meta"}
    assert list(criterion.parameters()) == []
    assert criterion.state_dict() == {}
    for soft in ("index", "soft"):
        refused("4 class weights for logits of 5", lambda y=soft: build(loss, WEIGHT[:4])(*batch(y)))
    if loss == "VS":
        refused("4 class counts for logits of 5", lambda: build(loss, None, COUNTS[:4])(*batch(dense=(2,))))
    refused("weight must be K finite numbers", lambda: build(loss, [1.0, math.nan]))


def test_defaults_of_the_focal_ib_loss_are_the_published_ones():
    assert (IB_FocalLoss().alpha, IB_FocalLoss().gamma) == (1000.0, 0.0)


BAD_ARGUMENTS = [
    (lambda: FocalLoss(gamma=math.nan), "gamma must be 0 or more"),
    (lambda: IB_FocalLoss(gamma=-1), "gamma must be 0 or more"),
    (lambda: FocalLoss(scale=0), "scale must be over 0 and finite, got 0"),
    (lambda: LDAMLoss(COUNTS, s=math.inf), "s must be over 0 and finite, got inf"),
    (lambda: LDAMLoss(COUNTS, max_m=-0.5), "max_m must be 0 or more and finite, got -0.5"),
    (lambda: VSLoss(COUNTS, -0.1), "gamma must be 0 or more"),
    (lambda: LogitAdjustedLoss(COUNTS, -1.0), "tau must be 0 or more"),
    (lambda: IBLoss(alpha=0), "alpha must be over 0 and finite, or 'auto'"),
    (lambda: IBLoss(alpha=None), "alpha must be over 0 and finite, or 'auto', got None"),
    (lambda: IBLoss(alpha="Auto"), "alpha must be over 0 and finite, or 'auto', got 'Auto'"),
    (lambda: IBLoss(epsilon=-1e-3), "epsilon must be 0 or more"),
    (lambda: IBLoss(norm="l3"), "unknown norm 'l3': choose from l1, l2, linf"),
    (lambda: IBLoss(alpha="auto", auto_target="CE"), "unknown auto_target 'CE': choose from ce, ib, gradient"),
    (lambda: IBLoss(alpha="auto", norm="l2", auto_target="ib"), "needs features in the L1 norm"),
    (lambda: CrossEntropyLoss(reduction="average"), "unknown reduction 'average': choose from mean, sum, none"),
    (lambda: CrossEntropyLoss(label_smoothing=1.5), r"label_smoothing must lie in \[0, 1\]"),
    (lambda: losses.effective_number_weights([3, 1], beta=1.0), r"beta must lie in \[0, 1\)"),
    (lambda: losses.row_norm(torch.ones(2, 2), "l3"), "unknown norm 'l3'"),
]


def test_bad_arguments():
    for make, message in BAD_ARGUMENTS:
        refused(message, make)


# ------------------------------------------------------------------------------------------- the features


def test_raw_features_and_their_norms_give_the_same():
    for norm, dense in itertools.product(("l1", "l2", "linf", "none"), ((), (2, 2))):
        logits, target, features = batch(dense=dense)
        norms = losses.row_norm(features, "l1" if norm == "none" else norm)
        for loss in INFLUENCE_BALANCED:
            flat = build(loss, norm=norm, raw_features=False)
            expected = flat(logits, target, norms)
            torch.testing.assert_close(build(loss, norm=norm)(logits, target, features), expected)
            assert torch.equal(flat(logits, target, norms.unsqueeze(1)), expected)


FEATURES = [
    ((4, 5), (4, 8), False, r"features must have the shape \(4,\) or \(4, 1\), one norm a sample, got \(4, 8\)"),
    ((1, 5), (1, 4), False, r"got \(1, 4\); raw_features=True"),  # once read as the norms of four samples
    ((4, 5), (3, 1), False, r"got \(3, 1\)"),
    ((4, 5), (), False, r"got \(\)"),
    ((4, 5, 2), (4, 8, 2), False, r"the shape \(4, 2\) or \(4, 1, 2\)"),
    ((4, 5), (4,), True, r"the shape \(4, 'D'\), got \(4,\)$"),
    ((4, 5), (3, 8), True, r"got \(3, 8\)$"),
    ((4, 5, 2), (4, 8, 3), True, r"got \(4, 8, 3\)$"),
    ((4, 5), None, False, r"features must have the shape"),
]


def test_features_of_another_shape_are_refused():
    for logits, shape, raw, message in FEATURES:
        target = torch.zeros(logits[:1] + logits[2:], dtype=torch.int64)
        inputs = torch.zeros(logits), target, None if shape is None else torch.ones(shape)
        refused(message, functools.partial(IBLoss(raw_features=raw), *inputs))


def test_losses_without_influence_ignore_the_features():
    logits, target, features = batch()
    for loss in LOSSES:
        assert build(loss).needs_features == (loss in INFLUENCE_BALANCED)
        if loss not in INFLUENCE_BALANCED:
            assert torch.equal(build(loss)(logits, target), build(loss)(logits, target, features=features))


# ------------------------------------------------------------------------------------------- alpha 'auto'


def auto_batch(seed):
    return batch(n=16, seed=seed, dtype=torch.float32)


@pytest.mark.parametrize(("loss", "weight"), [("IB", None), ("IBFocal", WEIGHT)])
def test_auto_alpha_is_the_ratio_of_sums_and_then_frozen(loss, weight):
    criterion, at_one = build(loss, weight, alpha="auto"), build(loss, weight, alpha=1.0)
    ce_sum, ib_sum, alphas = 0.0, 0.0, []
    for i in range(25):
        logits, target, features = auto_batch(i)
        value = criterion(logits.requires_grad_(), target, features).item()
        unit = at_one(logits, target, features).item()
        if i < 20:
            ce_sum += F.cross_entropy(logits, target).item()
            ib_sum += unit
        alphas.append(criterion.current_alpha.item())
        assert alphas[-1] == pytest.approx(ce_sum / ib_sum, rel=1e-6)
        assert value == pytest.approx(unit * ce_sum / ib_sum, rel=1e-5)
    assert len(set(alphas[:20])) == 20
    assert len(set(alphas[19:])) == 1


@pytest.mark.parametrize(("loss", "norm"), [("IB", "l2"), ("IB", "none"), ("IBFocal", "l1")])
def test_auto_alpha_aims_at_the_published_loss(loss, norm):
    """Norm 'none': class weights alone at IB's size, the control that Table 2 lacks."""
    criterion = build(loss, alpha="auto", norm=norm, auto_target="ib", epsilon=0.01)
    published = build(loss, alpha=1000.0)
    for seed in range(20):
        criterion.calibrate(*auto_batch(seed))
    sums = [sum(c(*auto_batch(seed)).item() for seed in range(20)) for c in (criterion.eval(), published)]
    assert sums[0] == pytest.approx(sums[1], rel=1e-5)


@pytest.mark.parametrize("target", ["ce", "ib"])
def test_auto_alpha_is_the_same_however_the_batch_is_shared(target):
    """Also with an empty share; one sum over the ranks a batch."""
    whole, shared = (build("IB", alpha="auto", auto_target=target) for _ in range(2))
    for seed in range(3):
        inputs = auto_batch(seed)
        whole.calibrate(*inputs)
        parts = [[x[part] for x in inputs] for part in (slice(7), slice(7, 16), slice(16, 16))]
        all_reduce = mock.Mock(side_effect=lambda sums: sums)
        for part in parts:
            copy.deepcopy(shared).calibrate(*part, all_reduce_sum=all_reduce)
        assert all_reduce.call_count == 3
        total = sum(call.args[0] for call in all_reduce.call_args_list)
        shared.calibrate(*parts[2], all_reduce_sum=mock.Mock(return_value=total))
    torch.testing.assert_close(shared.current_alpha, whole.current_alpha, rtol=1e-6, atol=0)


def test_what_does_not_enter_the_calibration():
    criterion, seen = build("IB", alpha="auto"), build("IB", alpha="auto")
    assert criterion.auto.sums[2] == 0
    logits, target, features = auto_batch(0)
    seen.calibrate(logits[:10], target[:10], features[:10])
    target[10:] = -100  # ignored
    criterion.calibrate(logits, target, features)
    torch.testing.assert_close(criterion.auto.sums, seen.auto.sums)
    before = copy.deepcopy(criterion.state_dict())
    criterion(logits.clone().fill_(math.nan).requires_grad_(), target, features)  # not finite
    criterion.eval()(*auto_batch(1))
    with torch.no_grad():
        criterion.train()(*auto_batch(2))
    criterion.per_sample(*auto_batch(3))
    assert_same(before.values(), criterion.state_dict().values(), rtol=0, atol=0)
    assert criterion.auto.sums[2] > 0
    fixed = build("IB", alpha=7.0)
    fixed.calibrate(*auto_batch(0))
    assert fixed.state_dict() == {}


@pytest.mark.parametrize("stop", [7, 25])
def test_auto_alpha_survives_a_state_dict_round_trip(stop):
    """No float64 buffer, which an Apple GPU does not have."""
    criterion, resumed = (build("IB", alpha="auto") for _ in range(2))
    for i in range(stop):
        criterion(*auto_batch(i))
    state = copy.deepcopy(criterion.state_dict())
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}
    resumed.load_state_dict(state)
    for i in range(stop, 30):
        values = [c(*auto_batch(i)) for c in (criterion, resumed)]
        assert torch.equal(values[1], values[0]), i


def test_auto_alpha_lets_no_gradient_through():
    inputs, auto = auto_batch(0), build("IB", alpha="auto")
    value = value_and_gradients(auto, *inputs)
    assert_same(value, value_and_gradients(build("IB", alpha=auto.current_alpha.item()), *inputs))


def test_an_alpha_that_is_measured_elsewhere_is_set_once_and_kept_to_the_bit():
    criterion, at_one = (build("IB", alpha=alpha, auto_target="gradient") for alpha in ("auto", 1.0))
    inputs = auto_batch(0)
    for _ in range(2):
        assert torch.equal(criterion(inputs[0].requires_grad_(), *inputs[1:]), at_one(*inputs))
        criterion.calibrate(*inputs)
    assert (criterion.current_alpha.item(), criterion.needs_alpha) == (1.0, True)
    buffer = criterion.auto.value
    criterion.set_alpha(1 / 3)
    assert criterion.auto.value is buffer, "a CUDA graph holds the buffer"
    criterion(*inputs)
    resumed = build("IB", alpha="auto", auto_target="gradient")
    resumed.load_state_dict(copy.deepcopy(criterion.state_dict()))
    for one in (criterion, resumed):
        assert not one.needs_alpha
        assert torch.equal(one.current_alpha, torch.tensor(1 / 3))
        assert torch.equal(one(*inputs), build("IB", alpha=torch.tensor(1 / 3).item())(*inputs))
    for wrong in (0, math.nan, math.inf):
        refused("value must be over 0", lambda value=wrong: criterion.set_alpha(value))
    refused("set_alpha needs alpha='auto' and auto_target='gradient'", lambda: at_one.set_alpha(2.0))
    refused("set_alpha needs", lambda: build("IB", alpha="auto").set_alpha(2.0))
