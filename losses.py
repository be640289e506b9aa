"""Losses for long-tailed classification: cross entropy, Focal, LDAM, Balanced Softmax, logit adjustment, VS, and the
influence-balanced loss (IB).

Needs torch and nothing else of this repository, so it can be copied alone. Each loss is a function and a Module, and
takes what `torch.nn.CrossEntropyLoss` takes:

    logits        (N, K), or dense (N, K, d1, ...)
    target        class indices (N, d1, ...); or probabilities y of the shape of the logits, which sum to 1 over the
                  classes (mixup, label smoothing, one-hot)
    features      for the IB losses: |h| of each sample, the norm of the last layer's input, (N, d1, ...) or
                  (N, 1, d1, ...); with `raw_features=True` h itself, (N, D, d1, ...)
    weight        (K,) class weights, or None
    ignore_index  a class index that does not count (default: -100)
    reduction     'mean' (default), 'sum', or 'none': the loss of each sample, (N, d1, ...)

A mean divides by the sum of the class weights for CE, LDAM, Balanced Softmax, logit adjustment and VS, and by the
number of samples for Focal and the IB losses, as in the official code.

With probabilities y, w_y * CE is -sum_k w_k y_k log p_k and every mean divides by the number of samples, as in torch.
|p - y| is the norm of p - y, which is still the gradient of CE in the logits; Focal's p is exp(-w_y * CE); LDAM
subtracts y_k times the margin of class k. So the loss of a sample with one-hot y is that with its index.

Every loss computes in float32 at least (float64 stays float64), also under autocast, and is finite, with finite
gradients, for |logits| up to 1e4.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: 'none' counts every norm as 0, for the control without influence (Table 2 d)
NORMS = ("l1", "l2", "linf", "none")

#: Scale of the IB losses. The published class has 10000 as its default, but the published scripts pass 1000.
ALPHA = 1000.0
EPSILON = 1e-3

ClassCounts = Sequence[float] | Tensor
Weight = Sequence[float] | Tensor | None
PerSample = tuple[Tensor, Tensor]
AllReduce = Callable[[Tensor], Tensor]


# ---------------------------------------------------------------------------------------- class weights


def inverse_frequency_weights(class_counts: ClassCounts, empty: str = "error") -> Tensor:
    """IB reweighting: weights proportional to 1 / n_k, scaled to sum to K (paper, Section 3.5, eq. 8).

    Args:
        class_counts: K training-set counts.
        empty: 'error', or 'zero': classes without images get weight 0, and K counts the others only.

    Returns:
        (K,) float32 tensor.

    >>> inverse_frequency_weights([3, 1])
    tensor([0.5000, 1.5000])
    >>> inverse_frequency_weights([3, 0, 1], empty="zero")
    tensor([0.5000, 0.0000, 1.5000])
    """
    _one_of(("error", "zero"), empty=empty)
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    chosen = counts != 0 if empty == "zero" else slice(None)
    weights = torch.zeros(len(counts), device=counts.device)
    weights[chosen] = _sum_to_k(1.0 / _positive(counts[chosen]))
    return weights


def effective_number_weights(class_counts: ClassCounts, beta: float = 0.9999) -> Tensor:
    """CB reweighting: (1 - beta) / (1 - beta ** n_k), scaled to sum to K (Cui et al., CVPR 2019); (K,) float32.

    beta in [0, 1); beta 0 gives equal weights.
    """
    return _sum_to_k(effective_number_rates(class_counts, beta))


def effective_number_rates(class_counts: ClassCounts, beta: float = 0.9999) -> Tensor:
    """(1 - beta) / (1 - beta ** n_k), unscaled, (K,) float64: also the sampling rates of Resample."""
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), got {beta}")
    counts = _positive(class_counts)
    return (1.0 - beta) / (1.0 - torch.pow(torch.as_tensor(beta, dtype=torch.float64), counts))


def ldam_margins(class_counts: ClassCounts, max_m: float = 0.5) -> Tensor:
    """LDAM's margins, proportional to n_k ** (-1/4), the largest being `max_m`; (K,) float32."""
    margins = _positive(class_counts) ** -0.25
    return (margins * (max_m / margins.max())).float()


def log_prior(class_counts: ClassCounts) -> Tensor:
    """Logarithm of each class's share of the training images, (K,) float64."""
    counts = _positive(class_counts)
    return (counts / counts.sum()).log()


def vs_scales(class_counts: ClassCounts, gamma: float) -> Tensor:
    """VS's factor of the logits, (n_k / n_max) ** gamma, (K,) float64."""
    counts = _positive(class_counts)
    return (counts / counts.max()) ** gamma


def _positive(class_counts):
    """The counts as (K,) float64. Raises ValueError for a class without images and for a count that is not finite."""
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if not ((counts >= 1) & counts.isfinite()).all():
        raise ValueError(f"every class needs a training image and a finite count, got the counts {counts.tolist()}")
    return counts


def _sum_to_k(weights):
    return (weights / weights.sum() * len(weights)).float()


# ---------------------------------------------------------------------------------------------- helpers


def _one_of(allowed, **values):
    for name, value in values.items():
        if value not in allowed:
            raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(allowed)}")


def _nonnegative(**values):
    for name, value in values.items():
        if not 0 <= value < float("inf"):
            raise ValueError(f"{name} must be 0 or more and finite, got {value}")


def _over_0(**values):
    for name, value in values.items():
        if value is None or isinstance(value, str) or not 0 < value < float("inf"):
            choice = ", or 'auto'" if name == "alpha" else ""
            raise ValueError(f"{name} must be over 0 and finite{choice}, got {value!r}")


def _widen(x):
    """A half-precision tensor as float32, anything else as it is."""
    is_half = isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if is_half else x


def _checked(logits, target, ignore_index):
    """(logits in float32 at least; target: int64 with ignored ones as class 0, or probabilities; mask of those kept).

    Raises:
        ValueError: a target of another shape.
    """
    logits, samples = _widen(logits), logits.shape[:1] + logits.shape[2:]
    if logits.ndim >= 2 and target.is_floating_point() and target.shape == logits.shape:
        return logits, target.to(logits.dtype), torch.ones((), dtype=torch.bool, device=logits.device)
    if logits.ndim >= 2 and not target.is_floating_point() and target.shape == samples:
        kept = target != ignore_index
        return logits, target.long().where(kept, 0), kept
    raise ValueError(
        "target must be class indices (N, ...) or probabilities (N, K, ...) beside logits (N, K, ...), got "
        f"{str(target.dtype).removeprefix('torch.')} of shape {tuple(target.shape)} beside {tuple(logits.shape)}"
    )


def _reduce(loss, counts, reduction):
    _one_of(("mean", "sum", "none"), reduction=reduction)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counts.sum()


def _loss(function: Callable[..., PerSample]) -> Any:
    """Make a loss of a function that returns each sample's loss and what the sample counts in a mean.

    The loss takes `ignore_index` and `reduction` too; its attribute `per_sample` is the loss without the reduction.
    Within `function` autocast is off, half-precision inputs are float32, and the target is as `_checked` returns it.
    """

    def per_sample(logits, target, *args, ignore_index=-100, **kwargs):
        with torch.autocast(logits.device.type, enabled=False):
            logits, target, kept = _checked(logits, target, ignore_index)
            kwargs = {name: _widen(value) for name, value in kwargs.items()}
            loss, counts = function(logits, target, *map(_widen, args), **kwargs)
            return loss.where(kept, 0.0), counts.where(kept, 0.0)

    @functools.wraps(function)
    def reduced(*args, reduction="mean", **kwargs):
        loss, counts = per_sample(*args, **kwargs)
        return _reduce(loss, counts, reduction)

    signature = inspect.signature(function)
    added = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=type(default))
        for name, default in (("ignore_index", -100), ("reduction", "mean"))
    ]
    parameters = [*signature.parameters.values(), *added]
    loss: Any = reduced
    loss.__signature__ = signature.replace(parameters=parameters, return_annotation=Tensor)
    loss.per_sample = per_sample
    return loss


def _weighted_ce(logits, target, weight):
    """(w_y * CE, w_y) of each sample; w_y is 1 without class weights, and for probabilities (as in torch).

    Ignored targets are class 0 by now: with its -100 torch would hide a wrong one.
    """
    weight = None if weight is None else weight.to(logits.dtype)
    loss = F.cross_entropy(logits, target, weight=weight, reduction="none", ignore_index=-(2**31))
    return loss, torch.ones_like(loss) if weight is None or target.is_floating_point() else weight[target]


def _by_class(values, logits):
    """(K,) as (K, 1, ...), for products and sums with logits (N, K, ...). Raises ValueError for another length."""
    if values.numel() != logits.shape[1]:
        raise ValueError(f"{values.numel()} class counts beside logits of {logits.shape[1]} classes")
    return values.to(logits).reshape(-1, *[1] * (logits.ndim - 2))


def _focal_factor(ce, gamma):
    """(1 - p) ** gamma with p = exp(-ce), of each sample.

    1 - p is taken as -expm1(-ce) and kept above the smallest normal number, so that the slope of the power at 0 stays
    finite for gamma below 1.
    """
    miss = -torch.expm1(-ce)
    return miss.clamp_min(torch.finfo(ce.dtype).tiny) ** gamma


def row_norm(rows: Tensor, norm: str = "l1") -> Tensor:
    """The 'l1', 'l2' or 'linf' norm over dimension 1 of (N, D, ...), or zeros for 'none'; in float32 at least."""
    _one_of(NORMS, norm=norm)
    rows = _widen(rows)
    if norm == "none":
        return rows.new_zeros(rows.shape[:1] + rows.shape[2:])
    if norm == "l1":
        return rows.abs().sum(1)  # more exact in float32 than vector_norm
    return torch.linalg.vector_norm(rows, 2 if norm == "l2" else float("inf"), dim=1)


# --------------------------------------------------------------------------------------- CE, Focal, LDAM


@_loss
def cross_entropy(logits: Tensor, target: Tensor, weight: Tensor | None = None) -> PerSample:
    """Cross entropy, weighted by class (torch's own)."""
    return _weighted_ce(logits, target, weight)


@_loss
def focal_loss(
    logits: Tensor, target: Tensor, weight: Tensor | None = None, gamma: float = 0.0, scale: float = 10.0
) -> PerSample:
    """Focal loss: scale * (1 - p) ** gamma * w_y * CE, with p = exp(-w_y * CE) (Lin et al., ICCV 2017).

    The official IB code multiplies by 10 and takes p after the class weight; both are kept. Gamma 0 is `scale` times
    the plain mean of w_y * CE.
    """
    ce, _ = _weighted_ce(logits, target, weight)
    return scale * (_focal_factor(ce, gamma) * ce), torch.ones_like(ce)


@_loss
def ldam_loss(
    logits: Tensor, target: Tensor, margins: Tensor, weight: Tensor | None = None, s: float = 30.0
) -> PerSample:
    """LDAM: weighted CE of s * (logits - margin of the true class) (Cao et al., NeurIPS 2019, eq. 12-13).

    Args:
        margins: (K,), see `ldam_margins`.
        s: scale of the logits, which are cosines of a normalised head.
    """
    one_hot = target if target.is_floating_point() else torch.zeros_like(logits).scatter(1, target.unsqueeze(1), 1.0)
    return _weighted_ce(s * (logits - one_hot * _by_class(margins, logits)), target, weight)


# ---------------------------------------------------------------------------- logits with the class prior


def vs_loss(
    logits: Tensor, target: Tensor, class_counts: ClassCounts, gamma: float = 0.2, tau: float = 1.2,
    weight: Tensor | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """Vector scaling: weighted CE of (n_k / n_max) ** gamma * logits + tau * log prior (Kini et al., NeurIPS 2021).

    Args:
        class_counts: K training-set counts; the prior is their share.
        gamma: 0 is logit adjustment. The defaults are those of the official command for CIFAR-10-LT.

    Raises:
        ValueError: a class without images, a count that is not finite, another number of counts than classes.
    """
    scale, shift = vs_scales(class_counts, gamma), tau * log_prior(class_counts)
    return _scaled_ce(logits, target, scale, shift, weight, **options)


def logit_adjusted_cross_entropy(
    logits: Tensor, target: Tensor, class_counts: ClassCounts, tau: float = 1.0, weight: Tensor | None = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """Logit adjustment: weighted CE of logits + tau * log prior (Menon et al., ICLR 2021, eq. 10). Tau 0 is CE.

    >>> logits, target = torch.zeros(1, 2), torch.tensor([1])
    >>> round(logit_adjusted_cross_entropy(logits, target, [3, 1]).item(), 4)   # log 4
    1.3863
    """
    return vs_loss(logits, target, class_counts, 0.0, tau, weight, **options)


def balanced_softmax(
    logits: Tensor, target: Tensor, class_counts: ClassCounts, weight: Tensor | None = None, **options: Any
) -> Tensor:
    """Balanced Softmax: weighted CE of logits + log n_k (Ren et al., NeurIPS 2020, eq. 3).

    The same as logit adjustment at tau 1: the two differ by a number common to all logits.
    """
    return vs_loss(logits, target, class_counts, 0.0, 1.0, weight, **options)


@_loss
def _scaled_ce(logits, target, scale, shift, weight):
    return _weighted_ce(logits * _by_class(scale, logits) + _by_class(shift, logits), target, weight)


# ----------------------------------------------------------------------------------- influence-balanced


def influence(
    logits: Tensor, target: Tensor, features: Tensor, norm: str = "l1", raw_features: bool = False,
    ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """|p - y| * |h| of each sample, (N, ...): the norm of the gradient of CE in the last layer's weights.

    The entry of the true (or likeliest) class is taken as minus the sum of the others, which does not cancel for
    confident hits.

    Args:
        features: |h| of each sample, in the same norm (the models of `models` return it). That none is negative is
            not checked, which would wait for the device.
        norm: 'l1' (the method), 'l2' or 'linf' (Table 1), or 'none': the influence counts as 0 (Table 2 d).
        raw_features: `features` is h itself, (N, D, ...).

    Raises:
        ValueError: features of another shape. Which of the two they are is never guessed.
    """
    logits, target, _ = _checked(logits, target, ignore_index)
    error = F.softmax(logits, dim=1)
    if target.is_floating_point():
        error, true = error - target, target.argmax(1, keepdim=True)
    else:
        true = target.unsqueeze(1)
    others = error.scatter(1, true, 0.0)
    error = others.scatter_add(1, true, -others.sum(1, keepdim=True))
    return row_norm(error, norm) * _feature_norm(logits, features, norm, raw_features)


def _feature_norm(logits, features, norm, raw_features):
    """|h| of each sample, (N, ...), in the type of the logits."""
    n, *dense = logits.shape[:1] + logits.shape[2:]
    shape = () if features is None else tuple(features.shape)
    if raw_features and len(shape) == logits.ndim and (shape[0], *shape[2:]) == (n, *dense):
        return row_norm(features, norm).to(logits.dtype)
    if not raw_features and shape in ((n, *dense), (n, 1, *dense)):
        return features.reshape(n, *dense).to(logits.dtype)
    expected = f"{(n, 'D', *dense)}" if raw_features else f"{(n, *dense)} or {(n, 1, *dense)}, one norm a sample"
    hint = "" if raw_features else "; raw_features=True takes the last layer's input itself"
    raise ValueError(f"features must have the shape {expected}, got {shape}{hint}")


def ib_factor(
    logits: Tensor, target: Tensor, features: Tensor, alpha: float | Tensor = ALPHA, epsilon: float = EPSILON,
    norm: str = "l1", detach: bool = False, raw_features: bool = False, ignore_index: int = -100,
) -> Tensor:  # fmt: skip
    """The factor alpha / (|p - y| * |h| + epsilon) of each sample, (N, ...) (paper, eq. 5 and Section 4.1).

    Args:
        features, norm, raw_features: as `influence`.
        alpha: scale of the loss, a number or a 0-d tensor. It should give the IB loss the size of the loss that it
            replaces, or the lr has to change (the authors, in issue 1 of pseulki/IB-Loss). On CIFAR CE is 3 to 5 and
            the IB loss at alpha 1 is .002 to .003, hence 1000. Other tasks need another: `IBLoss` has 'auto'.
        epsilon: added to the influence, so that a fitted sample does not get an infinite weight.
        detach: no gradient through the factor (the official code lets it through).
    """
    factor = alpha / (influence(logits, target, features, norm, raw_features, ignore_index) + epsilon)
    return factor.detach() if detach else factor


@_loss
def ib_loss(
    logits: Tensor, target: Tensor, features: Tensor, weight: Tensor | None = None, alpha: float | Tensor = ALPHA,
    epsilon: float = EPSILON, norm: str = "l1", detach: bool = False, raw_features: bool = False,
) -> PerSample:  # fmt: skip
    """Influence-balanced loss: w_y * CE * alpha / (|p - y| * |h| + epsilon) (paper, eq. 6 and 7).

    Arguments as `ib_factor`.

    >>> logits, target, features = torch.zeros(1, 2), torch.tensor([0]), torch.tensor([2.0])
    >>> round(ib_loss(logits, target, features, alpha=1.0, epsilon=0.0).item(), 4)   # log 2 / (1 * 2)
    0.3466
    """
    factor = ib_factor(logits, target, features, alpha, epsilon, norm, detach, raw_features)
    ce, _ = _weighted_ce(logits, target, weight)
    return ce * factor, torch.ones_like(factor)


@_loss
def ib_focal_loss(
    logits: Tensor, target: Tensor, features: Tensor, weight: Tensor | None = None, alpha: float | Tensor = ALPHA,
    gamma: float = 0.0, epsilon: float = EPSILON, norm: str = "l1", detach: bool = False, raw_features: bool = False,
) -> PerSample:  # fmt: skip
    """IB with the focal loss inside: (1 - p) ** gamma * w_y * CE * factor, p = exp(-w_y * CE).

    Arguments as `ib_factor`; `detach` is of the IB factor only. Gamma 0 is `ib_loss`.
    """
    factor = ib_factor(logits, target, features, alpha, epsilon, norm, detach, raw_features)
    ce, _ = _weighted_ce(logits, target, weight)
    return _focal_factor(ce, gamma) * ce * factor, torch.ones_like(factor)


# ---------------------------------------------------------------------------------------------- modules


class Loss(nn.Module):
    """A loss as a Module: criterion(logits, target, features). Losses other than IB ignore the features.

    Class weights are a buffer, so that `.to(device)` moves them.
    """

    weight: Tensor | None
    needs_features = False

    def __init__(self, weight: Weight = None, reduction: str = "mean", ignore_index: int = -100) -> None:
        super().__init__()
        _one_of(("mean", "sum", "none"), reduction=reduction)
        self.register_buffer("weight", None if weight is None else torch.as_tensor(weight), persistent=False)
        self.reduction, self.ignore_index = reduction, ignore_index

    def per_sample(self, logits: Tensor, target: Tensor, features: Tensor | None = None) -> PerSample:
        """The loss of each sample and what the sample counts in a mean, both (N, ...).

        The mean over a batch, or over several that share one, is loss.sum() / count.sum().
        """
        function, arguments = self._call(features)
        return function.per_sample(logits, target, *arguments, ignore_index=self.ignore_index)

    def forward(self, logits: Tensor, target: Tensor, features: Tensor | None = None) -> Tensor:
        """The reduced loss of logits (N, K) and target (N,) or (N, K); features: see IBLoss, else not looked at."""
        loss, counts = self.per_sample(logits, target, features)
        return _reduce(loss, counts, self.reduction)

    def calibrate(
        self, logits: Tensor, target: Tensor, features: Tensor | None, all_reduce_sum: AllReduce | None = None
    ) -> None:
        """Of IB losses with alpha 'auto': add a batch to the calibration. Other losses have none.

        Args:
            all_reduce_sum: a tensor's sum over the ranks that share the batch; a rank's share may be empty.
        """

    def _call(self, features):
        """The function, and its arguments after (logits, target)."""
        raise NotImplementedError


class CrossEntropyLoss(Loss):
    """`cross_entropy` as a Module."""

    def _call(self, features):
        return cross_entropy, (self.weight,)


class FocalLoss(Loss):
    """`focal_loss` as a Module. Raises ValueError for a negative gamma and for a scale that is not over 0."""

    def __init__(self, weight: Weight = None, gamma: float = 0.0, scale: float = 10.0, **options: Any) -> None:
        super().__init__(weight, **options)
        _nonnegative(gamma=gamma)
        _over_0(scale=scale)
        self.gamma, self.scale = gamma, scale

    def _call(self, features):
        return focal_loss, (self.weight, self.gamma, self.scale)


class LDAMLoss(Loss):
    """`ldam_loss` as a Module, with the `ldam_margins` of K training-set counts, for logits of a normalised head.

    Raises ValueError for a negative max_m and for an s that is not over 0.
    """

    def __init__(
        self, cls_num_list: ClassCounts, max_m: float = 0.5, weight: Weight = None, s: float = 30, **options: Any
    ) -> None:
        super().__init__(weight, **options)
        _nonnegative(max_m=max_m)
        _over_0(s=s)
        self.register_buffer("margins", ldam_margins(cls_num_list, max_m), persistent=False)
        self.s = s

    def _call(self, features):
        return ldam_loss, (self.margins, self.weight, self.s)


class VSLoss(Loss):
    """`vs_loss` as a Module, from K training-set counts. Raises ValueError for a negative gamma or tau."""

    def __init__(
        self, cls_num_list: ClassCounts, gamma: float = 0.2, tau: float = 1.2, weight: Weight = None, **options: Any
    ) -> None:
        super().__init__(weight, **options)
        _nonnegative(gamma=gamma, tau=tau)
        self.register_buffer("scale", vs_scales(cls_num_list, gamma).float(), persistent=False)
        self.register_buffer("shift", tau * log_prior(cls_num_list).float(), persistent=False)
        self.tau = tau

    def _call(self, features):
        return _scaled_ce, (self.scale, self.shift, self.weight)


class LogitAdjustedLoss(VSLoss):
    """`logit_adjusted_cross_entropy` as a Module: VS with gamma 0."""

    def __init__(self, cls_num_list: ClassCounts, tau: float = 1.0, weight: Weight = None, **options: Any) -> None:
        super().__init__(cls_num_list, 0.0, tau, weight, **options)


class BalancedSoftmaxLoss(LogitAdjustedLoss):
    """`balanced_softmax` as a Module: VS with gamma 0 and tau 1."""

    def __init__(self, cls_num_list: ClassCounts, weight: Weight = None, **options: Any) -> None:
        super().__init__(cls_num_list, 1.0, weight, **options)


class AutoAlpha(nn.Module):
    """The alpha that gives a loss the size of another: the ratio of their means over the first training batches.

    `value` is that ratio over the batches so far, at most `AUTO_BATCHES`; 1 before the first. The buffers are in the
    state dict, so that a resumed run continues with the same alpha. Nothing here waits for the device. `.half()` rounds
    what is there once; later batches are added in full precision.
    """

    AUTO_BATCHES = 20
    value: Tensor
    sums: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.ones(()))
        # of the reference's means and of the means at alpha 1; the number of batches
        self.register_buffer("sums", torch.zeros(3, dtype=torch.float64))

    @torch.no_grad()
    def observe(self, reference_sum: Tensor, loss_sum: Tensor, samples: Tensor) -> None:
        """Add a batch: sums of the reference and of the loss at alpha 1 over `samples` samples, 0-d float64 tensors.

        A batch that is not finite, and one after the last, is left out.
        """
        self.value, self.sums = self.value.float(), self.sums.double()  # the same tensors, except after .half()
        batch = torch.stack([reference_sum / samples, loss_sum / samples, torch.ones_like(samples)])
        takes_part = (self.sums[2] < self.AUTO_BATCHES) & batch.isfinite().all()
        self.sums += batch.where(takes_part, 0.0)
        ratio = self.sums[0] / self.sums[1].clamp_min(torch.finfo(torch.float64).tiny)
        self.value.copy_(ratio.where(self.sums[2] > 0, 1.0))


class IBLoss(Loss):
    """`ib_loss` as a Module: criterion(logits, target, features).

    Args:
        weight, alpha, epsilon, norm, detach, raw_features: see `ib_factor`. alpha may be 'auto': the first 20 batches
            with gradients in training mode set it so that the loss has the size of the one that it replaces.
        auto_target: whose size that is. 'ce': plain CE without class weights. 'ib': this loss as published, with the
            same class weights, L1 norm, alpha 1000, epsilon 1e-3; so norm 'none' (with L1 norms as features) is class
            weights alone at the size of IB.

    Raises:
        ValueError: unknown norm, alpha not over 0, negative epsilon; auto_target 'ib' beside features in another norm.
    """

    needs_features = True

    def __init__(
        self, weight: Weight = None, alpha: float | str = ALPHA, epsilon: float = EPSILON, norm: str = "l1",
        detach: bool = False, auto_target: str = "ce", raw_features: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(weight, **options)
        _one_of(NORMS, norm=norm)
        _one_of(("ce", "ib"), auto_target=auto_target)
        _nonnegative(epsilon=epsilon)
        if alpha != "auto":
            _over_0(alpha=alpha)
        if auto_target == "ib" and norm in ("l2", "linf") and not raw_features:
            raise ValueError(f"auto_target 'ib' needs features in the L1 norm, got norm {norm!r}")
        self.alpha, self.epsilon, self.norm, self.detach = alpha, epsilon, norm, detach
        self.auto_target, self.raw_features = auto_target, raw_features
        self.auto = AutoAlpha() if alpha == "auto" else None

    @property
    def current_alpha(self) -> Any:
        """The alpha in force: a float, or with 'auto' a 0-d tensor."""
        return self.alpha if self.auto is None else self.auto.value

    def forward(self, logits: Tensor, target: Tensor, features: Tensor | None = None) -> Tensor:
        """The reduced loss; with alpha 'auto' a call in training mode with gradients adds its batch first."""
        if self.training and torch.is_grad_enabled():
            self.calibrate(logits, target, features)
        return super().forward(logits, target, features)

    @torch.no_grad()
    def calibrate(
        self, logits: Tensor, target: Tensor, features: Tensor | None, all_reduce_sum: AllReduce | None = None
    ) -> None:
        if self.auto is None:
            return
        published = self._call_at(features, ALPHA, EPSILON, "l1")
        calls = [
            (cross_entropy, ()) if self.auto_target == "ce" else published,
            self._call_at(features, 1.0, self.epsilon, self.norm),
        ]
        (reference, _), (loss, counts) = (
            function.per_sample(logits, target, *arguments, ignore_index=self.ignore_index)
            for function, arguments in calls
        )
        sums = torch.stack([values.double().sum() for values in (reference, loss, counts)])
        self.auto.observe(*(sums if all_reduce_sum is None else all_reduce_sum(sums)))

    @torch.no_grad()
    def factor(self, logits: Tensor, target: Tensor, features: Tensor) -> Tensor:
        """The IB factor of each sample, (N, ...), without gradient."""
        settings = (self.current_alpha, self.epsilon, self.norm, self.detach, self.raw_features, self.ignore_index)
        return ib_factor(logits, target, features, *settings)

    def _call(self, features):
        return self._call_at(features, self.current_alpha, self.epsilon, self.norm)

    def _call_at(self, features, alpha, epsilon, norm):
        return ib_loss, (features, self.weight, alpha, epsilon, norm, self.detach, self.raw_features)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        for old, new in (("alpha", "auto.value"), ("calibration", "auto.sums")):  # names in older checkpoints
            if prefix + old in state_dict:
                state_dict[prefix + new] = state_dict.pop(prefix + old)
        super()._load_from_state_dict(state_dict, prefix, *args)


class IB_FocalLoss(IBLoss):  # noqa: N801 (the published name)
    """`ib_focal_loss` as a Module: criterion(logits, target, features). Arguments as IBLoss, and gamma."""

    def __init__(
        self, weight: Weight = None, alpha: float | str = ALPHA, gamma: float = 0.0, epsilon: float = EPSILON,
        norm: str = "l1", detach: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(weight, alpha, epsilon, norm, detach, **options)
        _nonnegative(gamma=gamma)
        self.gamma = gamma

    def _call_at(self, *args):
        _, (features, weight, alpha, *rest) = super()._call_at(*args)
        return ib_focal_loss, (features, weight, alpha, self.gamma, *rest)
