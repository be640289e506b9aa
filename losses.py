"""Losses for long-tailed classification: cross entropy, Focal, LDAM, Balanced Softmax, logit adjustment, VS, and the
influence-balanced loss (IB).

Needs torch and nothing else of this repository, so it can be copied alone. Every loss is a Module:

    criterion = IBLoss(inverse_frequency_weights(class_counts))
    loss = criterion(logits, target, features)

    logits    (N, K), or dense (N, K, d1, ...)
    target    class indices (N, d1, ...); or soft targets: probabilities y of the shape of the logits, which sum to 1
              over the classes (mixup, label smoothing)
    features  for the IB losses: |h| of each sample, the norm of the last layer's input, (N, d1, ...) or
              (N, 1, d1, ...); with `raw_features=True` h itself, (N, D, d1, ...). Other losses ignore them.

A mean divides by the sum of the samples' class weights for CE, LDAM, Balanced Softmax, logit adjustment and VS, and by
the number of samples for Focal and the IB losses, as in the official code.

Every loss computes in float32 at least (float64 stays float64), also under autocast, and is finite, with finite
gradients, for |logits| up to 1e4; the IB losses with an epsilon over 0.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: 'none' counts every norm as 0, for the control without influence (Table 2 d)
NORMS = ("l1", "l2", "linf", "none")

HALF = (torch.float16, torch.bfloat16)

#: Scale of the IB losses. The published class has 10000 as its default, but the published scripts pass 1000.
ALPHA = 1000.0
EPSILON = 1e-3

#: K training-set counts: numbers in the order of the classes, or {class: count} with the classes 0 to K-1 (a Counter)
ClassCounts = Sequence[float] | Mapping[int, float] | Tensor
Weight = Sequence[float] | Tensor | None


# ------------------------------------------------------------------------- class counts and class weights


def inverse_frequency_weights(class_counts: ClassCounts, empty: str = "error") -> Tensor:
    """IB reweighting: (K,) float32 proportional to 1 / n_k, which sum to K (paper, Section 3.5, eq. 8).

    Args:
        class_counts: K training-set counts.
        empty: 'error', or 'zero': classes without images get weight 0, and K counts the others only.

    Raises:
        ValueError: a shape other than (K,), keys other than 0 to K-1, a count below 1 that `empty` does not allow.

    >>> inverse_frequency_weights([3, 1])
    tensor([0.5000, 1.5000])
    >>> inverse_frequency_weights({0: 3, 1: 0, 2: 1}, empty="zero")
    tensor([0.5000, 0.0000, 1.5000])
    """
    counts = _counts(class_counts, empty)
    return _sum_to_k(1.0 / counts.where(counts > 0, float("inf")))


def effective_number_weights(class_counts: ClassCounts, beta: float = 0.9999, empty: str = "error") -> Tensor:
    """CB reweighting: (1 - beta) / (1 - beta ** n_k), scaled to sum to K, (K,) float32 (Cui et al., CVPR 2019).

    Args:
        beta: in [0, 1), else a ValueError; 0 gives equal weights. Classes of many more images than 1 / (1 - beta) are
            weighted alike. The other arguments and errors: see `inverse_frequency_weights`.
    """
    return _sum_to_k(effective_number_rates(class_counts, beta, empty))


def effective_number_rates(class_counts: ClassCounts, beta: float = 0.9999, empty: str = "error") -> Tensor:
    """(1 - beta) / (1 - beta ** n_k), unscaled, (K,) float64, 0 for a class without images.

    Also the sampling rates of Resample. Arguments and errors: see `effective_number_weights`.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), got {beta}")
    counts = _counts(class_counts, empty)
    rates = (1.0 - beta) / (1.0 - torch.pow(torch.as_tensor(beta, dtype=torch.float64), counts))
    return rates.where(counts > 0, 0.0)


def log_prior(class_counts: ClassCounts, empty: str = "error") -> Tensor:
    """Logarithm of each class's share of the training images, (K,) float64; -1e6 for a class without images.

    Arguments and errors: see `inverse_frequency_weights`.
    """
    counts = _counts(class_counts, empty)
    return (counts / counts.sum()).log().where(counts > 0, -1e6)


def _counts(class_counts, empty):
    """The counts as (K,) float64. Raises ValueError for what is not K counts; see `empty` above."""
    _one_of(("error", "zero"), empty=empty)
    if hasattr(class_counts, "items"):  # a dict, a Counter, a pandas Series: in the order of the keys, not as they came
        by_class = dict(class_counts.items())
        if set(by_class) != set(range(len(by_class))):
            raise ValueError(f"class counts by class need the classes 0 to K-1, got {list(by_class)[:8]}: pass a list")
        class_counts = [by_class[k] for k in range(len(by_class))]
    counts = torch.as_tensor(class_counts, dtype=torch.float64, device="cpu")
    if counts.ndim != 1:
        raise ValueError(f"class counts must be K numbers, got the shape {tuple(counts.shape)}")
    fits = (counts >= 1) & counts.isfinite()
    if empty == "zero":
        fits = (fits | (counts == 0)) & counts.any()
    if not fits.all():
        way = "" if empty == "zero" else "; empty='zero' leaves out classes without images"
        raise ValueError(
            f"every class needs a training image and a finite count, got the class counts {counts.tolist()}{way}"
        )
    return counts


def _sum_to_k(weights):
    return (weights / weights.sum() * int((weights > 0).sum())).float()


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
    return x.float() if x.dtype in HALF else x


def _by_class(values, logits, name):
    """(K,) as (K, 1, ...), for products and sums with logits (N, K, ...). Raises ValueError for another length."""
    if values.numel() != logits.shape[1]:
        raise ValueError(f"{values.numel()} {name} for logits of {logits.shape[1]} classes")
    return values.to(logits).reshape(-1, *[1] * (logits.ndim - 2))


def _probabilities(target, logits):
    """The target as probabilities of the shape of the logits: one-hot where it is class indices."""
    return target if target.is_floating_point() else torch.zeros_like(logits).scatter(1, target.unsqueeze(1), 1.0)


def _cross_entropy(logits, target, weight=None):
    """CE of each sample times its weight, (N, ...).

    Ignored targets are class 0 by now: with its -100 torch would hide a wrong one.
    """
    ce = F.cross_entropy(logits, target, reduction="none", ignore_index=-(2**31))
    return ce if weight is None else weight * ce


def _focal_factor(loss, gamma):
    """(1 - p) ** gamma with p = exp(-loss), of each sample.

    1 - p is taken as -expm1(-loss) and kept above the smallest normal number, so that the slope of the power at 0
    stays finite for gamma below 1.
    """
    miss = -torch.expm1(-loss)
    return miss.clamp_min(torch.finfo(loss.dtype).tiny) ** gamma


def row_norm(rows: Tensor, norm: str = "l1") -> Tensor:
    """The 'l1', 'l2' or 'linf' norm over dimension 1 of (N, D, ...), or zeros for 'none'; in float32 at least."""
    _one_of(NORMS, norm=norm)
    rows = _widen(rows)
    if norm == "none":
        return rows.new_zeros(rows.shape[:1] + rows.shape[2:])
    if norm == "l1":
        return rows.abs().sum(1)  # more exact in float32 than vector_norm
    return torch.linalg.vector_norm(rows, 2 if norm == "l2" else float("inf"), dim=1)


# --------------------------------------------------------------------------------------- what losses share


class Loss(nn.Module):
    """What all losses share: checks, precision, class weights, label smoothing, ignored targets, the reduction.

    A loss implements `_loss`, which gets the logits in float32 at least, the target as int64 or as probabilities, and
    the weight of each sample, and returns the loss of each sample.

    Args:
        weight: (K,) class weights, or None. A soft target y weights its sample by sum_k y_k w_k, so the loss is still
            smallest at p = y. (torch weights each class's term instead: beside 1 / n weights a smoothed head class
            is then taught as the tail.) A buffer, so that `.to(device)` moves it.
        reduction: 'mean', 'sum', or 'none': the loss of each sample, (N, d1, ...). As in torch the mean is NaN where
            no sample counts.
        ignore_index: a class index that does not count.
        label_smoothing: s in [0, 1]. As in torch the target becomes (1 - s) * y + s / K; the sample keeps the weight
            of its label.

    Raises:
        ValueError: at construction: an argument outside its range. In a call: a target of another shape, logits of one
            class, class weights of another number, soft targets that are not probabilities. On a GPU soft targets are
            checked in the first batch only, since the check waits for the device.
    """

    weight: Tensor | None
    needs_features = False
    #: of the IB losses only: whether `set_alpha` must be called before training, and the current alpha
    needs_alpha = False
    current_alpha: Any = None
    #: whether a mean divides by the sum of the samples' weights, or by their number
    divides_by_weights = True

    def __init__(
        self, weight: Weight = None, reduction: str = "mean", ignore_index: int = -100, label_smoothing: float = 0.0
    ) -> None:
        super().__init__()
        _one_of(("mean", "sum", "none"), reduction=reduction)
        if not 0 <= label_smoothing <= 1:
            raise ValueError(f"label_smoothing must lie in [0, 1], got {label_smoothing}")
        if weight is not None:
            weight = torch.as_tensor(weight).float()
            if weight.ndim != 1 or not ((weight >= 0) & weight.isfinite()).all():
                raise ValueError(f"weight must be K finite numbers of 0 or more, got {weight.tolist()}")
        self.register_buffer("weight", weight, persistent=False)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self._saw_probabilities = False

    def _apply(self, fn: Callable, recurse: bool = True) -> "Loss":
        """Move the buffers, and leave them in float32: `.half()` of a whole model would round class counts."""

        def moved(x):
            made = fn(x)
            return x.to(made.device) if made.dtype in HALF else made

        return super()._apply(moved, recurse)

    def forward(self, logits: Tensor, target: Tensor, features: Tensor | None = None) -> Tensor:
        """The reduced loss: 0-d, or (N, ...) with reduction 'none'."""
        loss, count = self.per_sample(logits, target, features)
        if self.reduction == "none":
            return loss
        return loss.sum() if self.reduction == "sum" else loss.sum() / count.sum()

    def per_sample(self, logits: Tensor, target: Tensor, features: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The loss of each sample and what the sample counts in a mean, both (N, ...).

        The mean over a batch, or over several that share one, is loss.sum() / count.sum().
        """
        return self.per_sample_and_factor(logits, target, features)[:2]

    def per_sample_and_factor(
        self, logits: Tensor, target: Tensor, features: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """`per_sample`, and the IB factor of each sample, (N, ...), without gradient; None for losses without one."""
        with torch.autocast(logits.device.type, enabled=False):
            logits, target, weight, kept = self._checked(logits, target)
            loss, factor = self._loss(logits, target, weight), self._factor(logits, target, features)
            loss = loss if factor is None else loss * factor
            count = weight if weight is not None and self.divides_by_weights else torch.ones_like(loss)
            return loss.where(kept, 0.0), count.where(kept, 0.0), None if factor is None else factor.detach()

    def calibrate(self, *batch: Any, **options: Any) -> None:
        """Do nothing. `IBLoss` overrides it."""

    def _loss(self, logits, target, weight):
        """The loss of each sample, (N, ...); weight: (N, ...) or None."""
        raise NotImplementedError

    def _factor(self, logits, target, features):
        """What multiplies the loss of each sample, (N, ...), or None."""
        return None

    def _checked(self, logits, target):
        """(logits in float32 at least, target, weight of each sample or None, mask of the samples that count).

        The target is int64, with ignored ones as class 0, or probabilities.
        """
        logits, soft = _widen(logits), target.is_floating_point()
        shape = logits.shape if soft else logits.shape[:1] + logits.shape[2:]
        if logits.ndim < 2 or target.shape != shape:
            raise ValueError(
                "target must be class indices (N, ...) or probabilities (N, K, ...) for logits (N, K, ...), got "
                f"{str(target.dtype).removeprefix('torch.')} of shape {tuple(target.shape)} for logits of shape "
                f"{tuple(logits.shape)}; several labels per sample (multi-label) need torch.nn.BCEWithLogitsLoss"
            )
        if logits.shape[1] < 2:
            raise ValueError("logits of one class: give each of the two its logit, or use torch.nn.BCEWithLogitsLoss")
        if soft:
            self._check_probabilities(target)
            target, kept = target.to(logits.dtype), torch.ones((), dtype=torch.bool, device=logits.device)
        else:
            target = target.long()  # first: in uint8 an ignore_index of -100 is class 156
            kept = target != self.ignore_index
            target = target.where(kept, 0)
        weight = None if self.weight is None else _by_class(self.weight, logits, "class weights")
        if weight is not None:
            weight = (target * weight).sum(1) if soft else weight.flatten()[target]
        if self.label_smoothing:
            share = self.label_smoothing / logits.shape[1]
            target = (1 - self.label_smoothing) * _probabilities(target, logits) + share
        return logits, target, weight, kept

    def _check_probabilities(self, target):
        if torch.compiler.is_compiling() or (self._saw_probabilities and target.device.type != "cpu"):
            return
        self._saw_probabilities = True
        # half-precision rows do not sum to 1 exactly
        if not (((target.float().sum(1) - 1).abs() < 0.01).all() and (target >= 0).all()):
            raise ValueError(
                "soft targets must be probabilities that sum to 1 over the classes; several labels per sample, or none "
                "(multi-label), need torch.nn.BCEWithLogitsLoss"
            )


# --------------------------------------------------------------------------------------- CE, Focal, LDAM


class CrossEntropyLoss(Loss):
    """Cross entropy, weighted by class: w_y * -log p_y."""

    def _loss(self, logits, target, weight):
        return _cross_entropy(logits, target, weight)


class FocalLoss(Loss):
    """Focal loss: scale * (1 - p) ** gamma * w_y * CE, with p = exp(-w_y * CE) (Lin et al., ICCV 2017).

    The official IB code multiplies by 10 and takes p after the class weight; both are kept. Gamma 0 is `scale` times
    the plain mean of w_y * CE. For soft targets CE is theirs, so the loss is smallest where CE is.

    Args:
        gamma: exponent, 0 or more. The default 0 is the official class's; the scripts pass --gamma, 1.
        scale: factor of the loss, over 0.
        The others: see `Loss`.

    Raises:
        ValueError: a gamma or a scale outside its range; see `Loss`.
    """

    divides_by_weights = False

    def __init__(self, weight: Weight = None, gamma: float = 0.0, scale: float = 10.0, **options: Any) -> None:
        super().__init__(weight, **options)
        _nonnegative(gamma=gamma)
        _over_0(scale=scale)
        self.gamma, self.scale = gamma, scale

    def _loss(self, logits, target, weight):
        ce = _cross_entropy(logits, target, weight)
        return self.scale * (_focal_factor(ce, self.gamma) * ce)


class LDAMLoss(Loss):
    """LDAM: weighted CE of s * (logits - margin of the true class) (Cao et al., NeurIPS 2019, eq. 12-13).

    The margins are proportional to n_k ** (-1/4), the largest being `max_m`; for soft targets class k is moved by
    y_k times its margin.

    Args:
        cls_num_list: K training-set counts.
        max_m: margin of the smallest class, 0 or more.
        s: scale of the logits, over 0. The logits must be cosines: the model's last layer is `models.NormedLinear`.
        empty: 'error', or 'zero': classes without images have no margin.
        The others: see `Loss`.

    Raises:
        ValueError: max_m or s outside its range; see `inverse_frequency_weights` and `Loss`.
    """

    def __init__(
        self, cls_num_list: ClassCounts, max_m: float = 0.5, weight: Weight = None, s: float = 30,
        empty: str = "error", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(weight, **options)
        _nonnegative(max_m=max_m)
        _over_0(s=s)
        counts = _counts(cls_num_list, empty)
        margins = counts.where(counts > 0, float("inf")) ** -0.25
        self.register_buffer("margins", (margins * (max_m / margins.max())).float(), persistent=False)
        self.s = s

    def _loss(self, logits, target, weight):
        margins = _by_class(self.margins, logits, "class counts")
        return _cross_entropy(self.s * (logits - _probabilities(target, logits) * margins), target, weight)


# ---------------------------------------------------------------------------- logits with the class prior


class VSLoss(Loss):
    """Vector scaling: weighted CE of (n_k / n_max) ** gamma * logits + tau * log prior (Kini et al., NeurIPS 2021).

    Args:
        cls_num_list: K training-set counts; the prior is their share.
        gamma, tau: 0 or more. The defaults are those of the official command for CIFAR-10-LT.
        empty: 'error', or 'zero': with tau over 0 classes without images take no part in training.
        The others: see `Loss`.

    Raises:
        ValueError: a negative gamma or tau; see `inverse_frequency_weights` and `Loss`.
    """

    def __init__(
        self, cls_num_list: ClassCounts, gamma: float = 0.2, tau: float = 1.2, weight: Weight = None,
        empty: str = "error", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(weight, **options)
        _nonnegative(gamma=gamma, tau=tau)
        counts = _counts(cls_num_list, empty)
        self.register_buffer("scale", ((counts / counts.max()) ** gamma).float(), persistent=False)
        self.register_buffer("shift", tau * log_prior(cls_num_list, empty).float(), persistent=False)

    def _loss(self, logits, target, weight):
        scale, shift = (_by_class(x, logits, "class counts") for x in (self.scale, self.shift))
        return _cross_entropy(logits * scale + shift, target, weight)


class LogitAdjustedLoss(VSLoss):
    """Logit adjustment: weighted CE of logits + tau * log prior (Menon et al., ICLR 2021, eq. 10). Tau 0 is CE.

    >>> round(LogitAdjustedLoss([3, 1])(torch.zeros(1, 2), torch.tensor([1])).item(), 4)   # log 4
    1.3863
    """

    def __init__(self, cls_num_list: ClassCounts, tau: float = 1.0, weight: Weight = None, **options: Any) -> None:
        super().__init__(cls_num_list, 0.0, tau, weight, **options)


class BalancedSoftmaxLoss(LogitAdjustedLoss):
    """Balanced Softmax: weighted CE of logits + log n_k (Ren et al., NeurIPS 2020, eq. 3).

    The same as logit adjustment at tau 1: the two differ by a number common to all logits.
    """

    def __init__(self, cls_num_list: ClassCounts, weight: Weight = None, **options: Any) -> None:
        super().__init__(cls_num_list, 1.0, weight, **options)


# ----------------------------------------------------------------------------------- influence-balanced


def influence(
    logits: Tensor, target: Tensor, features: Tensor | None, norm: str = "l1", raw_features: bool = False
) -> Tensor:
    """|p - y| * |h| of each sample, (N, ...): the norm of the gradient of CE in the last layer's weights.

    The entry of the true (or likeliest) class is taken as minus the sum of the others, which does not cancel for
    confident hits.

    Args:
        target: class indices or probabilities; see the top of the module for all shapes.
        features: |h| of each sample, in the same norm (the models of `models` return it). That none is negative is
            not checked, which would wait for the device.
        norm: 'l1' (the method), 'l2' or 'linf' (Table 1), or 'none': the influence counts as 0 (Table 2 d).
        raw_features: `features` is h itself, (N, D, ...).

    Raises:
        ValueError: features of another shape. Which of the two they are is never guessed.
    """
    logits = _widen(logits)
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


class AutoAlpha(nn.Module):
    """The alpha that gives a loss the size of another: the ratio of their means over the first training batches.

    `value` is that ratio over the batches so far, at most `AUTO_BATCHES`; 1 before the first. The buffers are in the
    state dict, so that a resumed run continues with the same alpha. Nothing here waits for the device. The sums are
    float64, kept as float32 and what that rounds off, since an Apple GPU has no float64.
    """

    AUTO_BATCHES = 20
    value: Tensor
    sums: Tensor
    rest: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.ones(()))
        # of the reference's means and of the means at alpha 1; the number of batches
        self.register_buffer("sums", torch.zeros(3))
        self.register_buffer("rest", torch.zeros(3))

    @torch.no_grad()
    def observe(self, reference_sum: Tensor, loss_sum: Tensor, samples: Tensor) -> None:
        """Add a batch: sums of the reference and of the loss at alpha 1 over `samples` samples, 0-d tensors.

        A batch that is not finite, and one after the last, is left out.
        """
        batch = torch.stack([reference_sum / samples, loss_sum / samples, torch.ones_like(samples)])
        takes_part = (self.sums[2] < self.AUTO_BATCHES) & batch.isfinite().all()
        total = self.sums.to(batch.dtype) + self.rest + batch.where(takes_part, 0.0)
        self.sums.copy_(total)
        self.rest.copy_(total - self.sums)
        ratio = total[0] / total[1].clamp_min(torch.finfo(total.dtype).tiny)
        self.value.copy_(ratio.where(total[2] > 0, 1.0))


class IBLoss(Loss):
    """Influence-balanced loss: w_y * CE * alpha / (|p - y| * |h| + epsilon) (paper, eq. 5 to 7 and Section 4.1).

    With soft targets y KL(y || p) = CE - entropy(y) takes the place of CE. It vanishes where |p - y| does, so p = y is
    the only stationary point: along a line from y KL is convex and 0 at y, so it grows at least as fast as |p - y|.
    (CE / |p - y| would grow without bound at the target, and drive a fitted model off it.) One-hot y has KL = CE.
    Within rounding of y KL may be a little below 0, and its gradient is noise.

    Args:
        alpha: scale of the loss. It should give the IB loss the size of the loss that it replaces, or the lr has to
            change (the authors, in issue 1 of pseulki/IB-Loss). On CIFAR CE is 3 to 5 and the IB loss at alpha 1 is
            .002 to .003, hence 1000. 'auto': see auto_target.
        epsilon: added to the influence, so that a fitted sample does not get an infinite weight.
        norm, raw_features: see `influence`.
        detach: no gradient through the factor. The official code does not detach.
        auto_target: what alpha 'auto' matches.
            'ce': the loss value of plain CE without class weights.
            'ib': the loss value of this loss as published: the same class weights, L1 norm, default alpha and epsilon.
            'gradient': nothing by itself. Alpha is 1 until `set_alpha` sets it.
            'ce' and 'ib' are measured over the first 20 batches in training mode with gradients. With norm 'none' and
            L1 norms as features, 'ib' gives class weights alone at the size of IB.
        auto_ratio: with 'gradient', the wanted norm of the gradient over that of plain CE. The loss only keeps it, for
            the code that measures the gradients (`training.gradients.match_gradient`).
        The others: see `Loss`.

    Raises:
        ValueError: unknown norm or auto_target, alpha or auto_ratio not over 0, negative epsilon; auto_target 'ib' with
            features in another norm than L1; in a call, features of another shape. See `Loss` for the others.

    >>> criterion = IBLoss(alpha=1.0, epsilon=0.0)
    >>> round(criterion(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([2.0])).item(), 4)   # log 2 / (1 * 2)
    0.3466
    """

    needs_features = True
    divides_by_weights = False

    def __init__(
        self, weight: Weight = None, alpha: float | str = ALPHA, epsilon: float = EPSILON, norm: str = "l1",
        detach: bool = False, auto_target: str = "ce", auto_ratio: float = 1.0, raw_features: bool = False,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(weight, **options)
        _one_of(NORMS, norm=norm)
        _one_of(("ce", "ib", "gradient"), auto_target=auto_target)
        _nonnegative(epsilon=epsilon)
        _over_0(auto_ratio=auto_ratio)
        if alpha != "auto":
            _over_0(alpha=alpha)
        if auto_target == "ib" and norm in ("l2", "linf") and not raw_features:
            raise ValueError(f"auto_target 'ib' needs features in the L1 norm, got norm {norm!r}")
        self.alpha, self.epsilon, self.norm, self.detach = alpha, epsilon, norm, detach
        self.auto_target, self.auto_ratio, self.raw_features = auto_target, auto_ratio, raw_features
        self.auto = AutoAlpha() if alpha == "auto" else None

    def _loss(self, logits, target, weight):
        if target.is_floating_point():
            loss = F.kl_div(F.log_softmax(logits, 1), target, reduction="none").sum(1)
        else:
            loss = _cross_entropy(logits, target)
        return loss if weight is None else weight * loss

    def _factor(self, logits, target, features):
        return self._factor_at(self.current_alpha, self.epsilon, self.norm, logits, target, features)

    def _factor_at(self, alpha, epsilon, norm, logits, target, features):
        factor = alpha / (influence(logits, target, features, norm, self.raw_features) + epsilon)
        return factor.detach() if self.detach else factor

    # ------------------------------------------------------------------------------------- alpha 'auto'

    @property
    def current_alpha(self) -> Any:
        """The alpha in force: a float, or with 'auto' a 0-d tensor."""
        return self.alpha if self.auto is None else self.auto.value

    @property
    def needs_alpha(self) -> bool:  # type: ignore[override]
        """Whether auto_target is 'gradient' and `set_alpha` has not been called yet. Waits for the device."""
        return self.auto is not None and self.auto_target == "gradient" and not self.auto.sums[2] > 0

    def set_alpha(self, value: float) -> None:
        """Set the alpha that a measurement found (auto_target 'gradient'); it is in the state dict from then on.

        Raises:
            ValueError: alpha is not 'auto', auto_target is not 'gradient', or a value that is not over 0 and finite.
        """
        if self.auto is None or self.auto_target != "gradient":
            raise ValueError("set_alpha needs alpha='auto' and auto_target='gradient'")
        _over_0(value=value)
        self.auto.value.fill_(value)
        self.auto.sums[2] = 1  # it is measured

    def forward(self, logits: Tensor, target: Tensor, features: Tensor | None = None) -> Tensor:
        """The reduced loss; with alpha 'auto' a call in training mode with gradients adds its batch first."""
        if self.training and torch.is_grad_enabled():
            self.calibrate(logits, target, features)
        return super().forward(logits, target, features)

    @torch.no_grad()
    def calibrate(
        self, logits: Tensor, target: Tensor, features: Tensor | None,
        all_reduce_sum: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Add a batch to the calibration of alpha 'auto' (targets 'ce' and 'ib').

        Args:
            all_reduce_sum: a tensor's sum over the ranks that share the batch; a rank's share may be empty.
        """
        if self.auto is None or self.auto_target == "gradient":
            return
        with torch.autocast(logits.device.type, enabled=False):
            logits, target, weight, kept = self._checked(logits, target)
            loss = self._loss(logits, target, weight)
            if self.auto_target == "ce":
                reference = _cross_entropy(logits, target)
            else:
                reference = loss * self._factor_at(ALPHA, EPSILON, "l1", logits, target, features)
            unit = loss * self._factor_at(1.0, self.epsilon, self.norm, logits, target, features)
            wide = torch.float32 if logits.device.type == "mps" else torch.float64  # which has no float64
            parts = (reference, unit, torch.ones_like(loss))
            sums = torch.stack([part.where(kept, 0.0).to(wide).sum() for part in parts])
        self.auto.observe(*(sums if all_reduce_sum is None else all_reduce_sum(sums)))


class IB_FocalLoss(IBLoss):  # noqa: N801 (the published name)
    """IB with the focal loss inside: (1 - p) ** gamma * w_y * CE * factor, p = exp(-w_y * CE).

    With soft targets KL takes the place of CE in both, so that p = y is again the only stationary point.

    Args:
        gamma: exponent, 0 or more; 0 gives `IBLoss`. By position it comes third, before `epsilon`.
        detach: no gradient through the IB factor; the focal factor keeps its gradient.
        The others: see `IBLoss`.

    Raises:
        ValueError: a negative gamma; see `IBLoss`.
    """

    def __init__(
        self, weight: Weight = None, alpha: float | str = ALPHA, gamma: float = 0.0, epsilon: float = EPSILON,
        norm: str = "l1", detach: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(weight, alpha, epsilon, norm, detach, **options)
        _nonnegative(gamma=gamma)
        self.gamma = gamma

    def _loss(self, logits, target, weight):
        loss = super()._loss(logits, target, weight)
        return _focal_factor(loss, self.gamma) * loss
