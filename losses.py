"""Losses for long-tailed classification: cross entropy, Focal, LDAM, Balanced Softmax, logit adjustment, and the
influence-balanced loss (IB).

Needs torch and nothing else of this repository, so it can be taken alone. Each loss is a function and a
Module. Shapes: `logits` (N, K), `target` (N,) int64, `features` (N,) or (N, 1): the norm of the last
layer's input h, one number a sample. All return a scalar.

Every loss computes in float32 at least (float64 stays float64), also under autocast, and is finite, with
finite gradients, for |logits| up to 1e4.

Reductions: weighted CE, LDAM, Balanced Softmax and logit adjustment divide by the sum of the weights; Focal, IB
and IB-Focal are plain batch means, as in the official code.
"""

import functools

import torch
from torch import nn
from torch.nn import functional as F

#: 'none' counts every norm as 0, for the control without influence (Table 2 d)
NORMS = ("l1", "l2", "linf", "none")


# ---------------------------------------------------------------------------------------- class weights


def inverse_frequency_weights(class_counts):
    """IB reweighting: weights proportional to 1 / n_k, scaled to sum to K (paper, Section 3.5, eq. 8).

    Returns:
        (K,) float32 tensor.

    >>> inverse_frequency_weights([3, 1])
    tensor([0.5000, 1.5000])
    """
    return _sum_to_k(1.0 / _positive(class_counts))


def effective_number_weights(class_counts, beta=0.9999):
    """CB reweighting: (1 - beta) / (1 - beta ** n_k), scaled to sum to K (Cui et al., CVPR 2019).

    beta in [0, 1); beta 0 gives equal weights.

    Returns:
        (K,) float32 tensor.
    """
    return _sum_to_k(effective_number_rates(class_counts, beta))


def effective_number_rates(class_counts, beta=0.9999):
    """(1 - beta) / (1 - beta ** n_k), unscaled, (K,) float64: also the sampling rates of Resample."""
    if not 0 <= beta < 1:
        raise ValueError(f"beta must lie in [0, 1), got {beta}")
    counts = _positive(class_counts)
    return (1.0 - beta) / (1.0 - torch.pow(torch.as_tensor(beta, dtype=torch.float64), counts))


def _positive(class_counts):
    """The counts as (K,) float64. Raises ValueError for a class without images."""
    counts = torch.as_tensor(class_counts, dtype=torch.float64)
    if not (counts >= 1).all():
        raise ValueError(f"every class needs a training image, got the counts {counts.tolist()}")
    return counts


def _sum_to_k(weights):
    return (weights / weights.sum() * len(weights)).float()


# ---------------------------------------------------------------------------------------------- helpers


def _widen(x):
    """A half-precision tensor as float32, anything else as it is."""
    is_half = isinstance(x, torch.Tensor) and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() if is_half else x


def _in_full_precision(function):
    """Run a loss with autocast off and half-precision inputs brought to float32."""

    @functools.wraps(function)
    def wrapped(logits, *args, **kwargs):
        with torch.autocast(logits.device.type, enabled=False):
            return function(_widen(logits), *map(_widen, args), **{k: _widen(v) for k, v in kwargs.items()})

    return wrapped


def _cross_entropy_rows(logits, target, weight=None):
    """w_y * CE of each row, (N,)."""
    ce = F.cross_entropy(logits, target, reduction="none")
    return ce if weight is None else ce * weight.to(ce.dtype)[target]


def _focal_factor(ce, gamma):
    """(1 - p) ** gamma with p = exp(-ce), (N,).

    1 - p is taken as -expm1(-ce) and kept above the smallest normal number, so that the slope of the
    power at 0 stays finite for gamma below 1.
    """
    miss = -torch.expm1(-ce)
    return miss.clamp_min(torch.finfo(ce.dtype).tiny) ** gamma


def row_norm(rows, norm="l1"):
    """The 'l1', 'l2' or 'linf' norm of each row of (N, D), or zeros for 'none', as (N,), in float32 at least."""
    if norm not in NORMS:
        raise ValueError(f"unknown norm {norm!r}: choose from {', '.join(NORMS)}")
    rows = _widen(rows)
    if norm == "none":
        return rows.new_zeros(len(rows))
    if norm == "l1":
        return rows.abs().sum(1)  # more exact in float32 than vector_norm
    return torch.linalg.vector_norm(rows, 2 if norm == "l2" else float("inf"), dim=1)


def _nonnegative(**values):
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")


# --------------------------------------------------------------------------------------- CE, Focal, LDAM


@_in_full_precision
def cross_entropy(logits, target, weight=None):
    """Cross entropy, weighted by class and divided by the sum of the weights (torch's own)."""
    return F.cross_entropy(logits, target, weight=None if weight is None else weight.to(logits.dtype))


@_in_full_precision
def focal_loss(logits, target, weight=None, gamma=0.0, scale=10.0):
    """Focal loss: scale * mean((1 - p) ** gamma * w_y * CE), with p = exp(-w_y * CE) (Lin et al., ICCV 2017).

    The official IB code multiplies by 10 and takes p after the class weight; both are kept. Gamma 0 is
    `scale` times the plain mean of w_y * CE.
    """
    ce = _cross_entropy_rows(logits, target, weight)
    return scale * (_focal_factor(ce, gamma) * ce).mean()


@_in_full_precision
def ldam_loss(logits, target, margins, weight=None, s=30.0):
    """LDAM: weighted CE of s * (logits - margin of the true class) (Cao et al., NeurIPS 2019, eq. 12-13).

    Args:
        margins: (K,), see `ldam_margins`.
        s: scale of the logits, which are cosines of a normalised head.
    """
    margin = margins.to(logits.dtype)[target]
    shifted = logits.scatter_add(1, target[:, None], -margin[:, None])
    return F.cross_entropy(s * shifted, target, weight=None if weight is None else weight.to(logits.dtype))


def ldam_margins(class_counts, max_m=0.5):
    """Margins proportional to n_k ** (-1/4), the largest being `max_m`; (K,) float32."""
    margins = _positive(class_counts) ** -0.25
    return (margins * (max_m / margins.max())).float()


# ---------------------------------------------------------------------------- logits with the class prior


def logit_adjusted_cross_entropy(logits, target, class_counts, tau=1.0, weight=None):
    """Logit adjustment: weighted CE of logits + tau * log prior (Menon et al., ICLR 2021, eq. 10).

    Args:
        class_counts: K training-set counts; the prior is their share.
        tau: 0 is cross entropy.

    Raises:
        ValueError: a class without images.

    >>> logits, target = torch.zeros(1, 2), torch.tensor([1])
    >>> round(logit_adjusted_cross_entropy(logits, target, [3, 1]).item(), 4)   # log 4
    1.3863
    """
    return _adjusted_cross_entropy(logits, target, log_prior(class_counts), tau, weight)


def balanced_softmax(logits, target, class_counts, weight=None):
    """Balanced Softmax: weighted CE of logits + log n_k (Ren et al., NeurIPS 2020, eq. 3).

    The same as logit adjustment at tau 1: the two differ by a number common to all logits.
    """
    return logit_adjusted_cross_entropy(logits, target, class_counts, 1.0, weight)


def log_prior(class_counts):
    """Logarithm of each class's share of the training images, (K,) float64."""
    counts = _positive(class_counts)
    return (counts / counts.sum()).log()


@_in_full_precision
def _adjusted_cross_entropy(logits, target, prior, tau, weight):
    return cross_entropy(logits + tau * prior.to(logits), target, weight)


# ----------------------------------------------------------------------------------- influence-balanced


@_in_full_precision
def ib_factor(logits, target, features, alpha=1000.0, epsilon=1e-3, norm="l1", detach=False):
    """The factor alpha / (|p - y| * |h| + epsilon) of each sample, (N,) (paper, eq. 5 and Section 4.1).

    |p - y| * |h| is the norm of the gradient of CE in the last layer's weights: the sample's influence on
    the decision boundary. The entry of the true class, p_y - 1, is taken as minus the sum of the other
    probabilities, which does not cancel for confident hits.

    Args:
        features: |h| of each sample, in the same norm (the nets of `models` return it).
        alpha: scale of the loss, a number or a 0-d tensor.
        epsilon: added to the influence, so that a fitted sample does not get an infinite weight.
        norm: 'l1' (the method), 'l2' or 'linf' (Table 1), or 'none': the influence counts as 0, and the factor is
            alpha / epsilon (Table 2 d).
        detach: no gradient through the factor (the official code lets it through).
    """
    factor = alpha / (influence(logits, target, features, norm) + epsilon)
    return factor.detach() if detach else factor


@_in_full_precision
def influence(logits, target, features, norm="l1"):
    """|p - y| * |h| of each sample, (N,); arguments as `ib_factor`."""
    return _error_norm(logits, target, norm) * features.reshape(-1).to(logits.dtype)


def _error_norm(logits, target, norm):
    probabilities = F.softmax(logits, dim=1)
    others = probabilities.scatter(1, target[:, None], 0.0)
    error = others.scatter_add(1, target[:, None], -others.sum(1, keepdim=True))
    return row_norm(error, norm)


@_in_full_precision
def ib_loss(logits, target, features, weight=None, alpha=1000.0, epsilon=1e-3, norm="l1", detach=False):
    """Influence-balanced loss: mean of w_y * CE * alpha / (|p - y| * |h| + epsilon) (paper, eq. 6 and 7).

    >>> logits, target, features = torch.zeros(1, 2), torch.tensor([0]), torch.tensor([2.0])
    >>> round(ib_loss(logits, target, features, alpha=1.0, epsilon=0.0).item(), 4)   # log 2 / (1 * 2)
    0.3466
    """
    factor = ib_factor(logits, target, features, alpha, epsilon, norm, detach)
    return (_cross_entropy_rows(logits, target, weight) * factor).mean()


@_in_full_precision
def ib_focal_loss(
    logits, target, features, weight=None, alpha=1000.0, gamma=0.0, epsilon=1e-3, norm="l1", detach=False
):
    """IB with the focal loss inside: mean of (1 - p) ** gamma * w_y * CE * factor, p = exp(-w_y * CE).

    `detach` is of the IB factor only. Gamma 0 is `ib_loss`.
    """
    ce = _cross_entropy_rows(logits, target, weight)
    factor = ib_factor(logits, target, features, alpha, epsilon, norm, detach)
    return (_focal_factor(ce, gamma) * ce * factor).mean()


# ---------------------------------------------------------------------------------------------- modules


class _Weighted(nn.Module):
    """A loss with class weights kept as a buffer, so that `.to(device)` moves them."""

    weight: torch.Tensor | None
    needs_features = False
    divides_by_weights = False  # or by the number of samples

    def __init__(self, weight=None):
        super().__init__()
        self.register_buffer("weight", None if weight is None else torch.as_tensor(weight), persistent=False)

    def normaliser(self, target):
        """What the sum over the batch was divided by, a 0-d tensor: whole batches are put together from parts by it."""
        if self.weight is None or not self.divides_by_weights:
            return torch.full((), float(len(target)), device=target.device)
        return self.weight[target].sum()


class CrossEntropyLoss(_Weighted):
    """`cross_entropy` as a Module: criterion(logits, target)."""

    divides_by_weights = True

    def forward(self, logits, target):
        return cross_entropy(logits, target, self.weight)


class FocalLoss(_Weighted):
    """`focal_loss` as a Module: criterion(logits, target). Raises ValueError for a negative gamma."""

    def __init__(self, weight=None, gamma=0.0, scale=10.0):
        super().__init__(weight)
        _nonnegative(gamma=gamma)
        self.gamma, self.scale = gamma, scale

    def forward(self, logits, target):
        return focal_loss(logits, target, self.weight, self.gamma, self.scale)


class LDAMLoss(_Weighted):
    """`ldam_loss` as a Module: criterion(logits, target), logits of a normalised head.

    Args:
        cls_num_list: K training-set counts.
        max_m: largest margin.
        s: scale, over 0.
    """

    divides_by_weights = True

    def __init__(self, cls_num_list, max_m=0.5, weight=None, s=30):
        super().__init__(weight)
        if not s > 0:
            raise ValueError(f"s must be over 0, got {s}")
        self.register_buffer("margins", ldam_margins(cls_num_list, max_m), persistent=False)
        self.s = s

    def forward(self, logits, target):
        return ldam_loss(logits, target, self.margins, self.weight, self.s)


class LogitAdjustedLoss(_Weighted):
    """`logit_adjusted_cross_entropy` as a Module: criterion(logits, target).

    Args:
        cls_num_list: K training-set counts.
        tau: weight of the prior, 0 or more.
    """

    divides_by_weights = True

    def __init__(self, cls_num_list, tau=1.0, weight=None):
        super().__init__(weight)
        _nonnegative(tau=tau)
        self.register_buffer("log_prior", log_prior(cls_num_list).float(), persistent=False)
        self.tau = tau

    def forward(self, logits, target):
        return _adjusted_cross_entropy(logits, target, self.log_prior, self.tau, self.weight)


class BalancedSoftmaxLoss(LogitAdjustedLoss):
    """`balanced_softmax` as a Module: criterion(logits, target)."""

    def __init__(self, cls_num_list, weight=None):
        super().__init__(cls_num_list, 1.0, weight)


class IBLoss(_Weighted):
    """`ib_loss` as a Module: criterion(logits, target, features).

    alpha may be 'auto': the first `AUTO_BATCHES` training batches set it so that the loss has the size of
    the unweighted CE that it replaces (the authors' advice, issue 1 of their repository). Until then each
    batch uses the ratio of the sums so far. The state is in the state dict, so that a resumed run goes on
    with the same alpha.

    Raises:
        ValueError: unknown norm, alpha not over 0, negative epsilon.
    """

    needs_features = True
    AUTO_BATCHES = 20
    calibration: torch.Tensor

    def __init__(self, weight=None, alpha=10000.0, epsilon=1e-3, norm="l1", detach=False):
        super().__init__(weight)
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}: choose from {', '.join(NORMS)}")
        _nonnegative(epsilon=epsilon)
        self.auto_alpha = alpha == "auto"
        self.of_whole_batch = None  # from means over a part of the batch to those over all of it, if it is dealt out
        if not self.auto_alpha and (isinstance(alpha, str) or not alpha > 0):
            raise ValueError(f"alpha must be over 0 or 'auto', got {alpha}")
        self.epsilon, self.norm, self.detach = epsilon, norm, detach
        if not self.auto_alpha:
            self.alpha = alpha
        else:
            self.register_buffer("alpha", torch.ones(()))
            # sums of CE and of the loss at alpha 1, and the batches in them
            self.register_buffer("calibration", torch.zeros(3, dtype=torch.float64))

    def forward(self, logits, target, features):
        if self.auto_alpha and self.training and torch.is_grad_enabled():
            self._calibrate(logits.detach(), target, features.detach())
        return self._loss(logits, target, features, self.alpha)

    def factor(self, logits, target, features):
        """The IB factor of each sample, (N,), without gradient."""
        with torch.no_grad():
            return ib_factor(logits, target, features, self.alpha, self.epsilon, self.norm)

    def _loss(self, logits, target, features, alpha):
        return ib_loss(logits, target, features, self.weight, alpha, self.epsilon, self.norm, self.detach)

    def _calibrate(self, logits, target, features):
        # written without a branch on tensor values: no synchronisation with the device
        means = torch.stack([cross_entropy(logits, target), self._loss(logits, target, features, 1.0)]).double()
        if self.of_whole_batch is not None:
            means = self.of_whole_batch(means)
        seen = torch.cat([means, means.new_ones(1)])
        open_ = (self.calibration[2] < self.AUTO_BATCHES) & seen.isfinite().all()
        self.calibration += torch.where(open_, seen, torch.zeros_like(seen))
        ratio = self.calibration[0] / self.calibration[1].clamp_min(torch.finfo(torch.float64).tiny)
        self.alpha.copy_(ratio)


class IB_FocalLoss(IBLoss):  # noqa: N801 (the published name)
    """`ib_focal_loss` as a Module: criterion(logits, target, features). Arguments as IBLoss, and gamma."""

    def __init__(self, weight=None, alpha=10000.0, gamma=0.0, epsilon=1e-3, norm="l1", detach=False):
        super().__init__(weight, alpha, epsilon, norm, detach)
        _nonnegative(gamma=gamma)
        self.gamma = gamma

    def _loss(self, logits, target, features, alpha):
        return ib_focal_loss(
            logits, target, features, self.weight, alpha, self.gamma, self.epsilon, self.norm, self.detach
        )
