"""The gradient norm of a loss over that of plain cross entropy, and the alpha that sets this ratio."""

import copy
import itertools
import math
from collections.abc import Iterable
from typing import Any

import torch

from losses import CrossEntropyLoss
from training import distributed
from training.loop import forward, mean_over_ranks
from training.precision import Precision
from utils import DataError

#: Training batches over which the norms are averaged.
BATCHES = 20

Batches = Iterable[tuple[torch.Tensor, torch.Tensor]]


def gradient_norms(
    model: torch.nn.Module, batches: Batches, criterion: Any, precision: Precision | None = None
) -> tuple[float, float]:
    """Mean L2 norm of the gradient in all trained parameters: (of plain cross entropy, of `criterion`).

    The mean is over the next `BATCHES` batches, 0 where there is none, each with batch norm in training mode. No step
    is taken. A copy of the model is measured, in float32 in the place of fp16, and the model is left as it was. With
    several ranks `batches` are this rank's parts, and the norms are those of the gradient over the whole batch.

    Args:
        model: returns (logits, features); the part that is trained, not wrapped in DistributedDataParallel.
        batches: (images, targets) on the model's device.
        criterion: see `losses.Loss`.
    """
    if precision is None or precision.scaler.is_enabled():  # unscaled gradients in fp16 would underflow
        precision = Precision()
    model = copy.deepcopy(model).train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = CrossEntropyLoss(ignore_index=criterion.ignore_index)
    sums, count = [0.0, 0.0], 0
    for images, target in itertools.islice(batches, BATCHES):
        logits, features = forward(model, images, precision)
        for place, of in enumerate((plain, criterion)):
            loss, *_ = mean_over_ranks(of, logits, target, features)
            gradients = torch.autograd.grad(loss, parameters, retain_graph=of is plain, allow_unused=True)
            # SyncBatchNorm gives a rank without images None; all ranks reduce as many numbers
            found = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
            flat = torch.cat([g.flatten().double() for g in found])
            sums[place] += distributed.all_reduce_sum(flat).norm().item()
        count += 1
    return sums[0] / max(count, 1), sums[1] / max(count, 1)


def match_gradient(
    model: torch.nn.Module, batches: Batches, criterion: Any, precision: Precision | None = None
) -> dict[str, float | None]:
    """Give `criterion` the alpha at which its gradient is `criterion.auto_ratio` times as large as that of plain CE.

    Args:
        batches: an epoch; the first `BATCHES` set alpha, the next ones, where there are so many, measure again.
        criterion: an IB loss that `needs_alpha`; its alpha is set then.
        The others: see `gradient_norms`.

    Returns:
        dict(ce, loss, ratio, again): the norm for plain CE, that of the loss at the alpha found, the second over the
        first, and their ratio over the next batches or None.

    Raises:
        DataError: a gradient that is zero or not finite, so that no alpha can be found.
    """
    batches = iter(batches)
    ce, at_one = gradient_norms(model, batches, criterion, precision)
    if not (0 < at_one < math.inf and 0 < ce < math.inf):
        raise DataError(
            f"--alpha auto: the gradient norm is {ce:g} for CE and {at_one:g} for the loss, so alpha cannot be "
            "computed; give --alpha a value"
        )
    criterion.set_alpha(criterion.auto_ratio * ce / at_one)
    alpha = float(criterion.current_alpha)
    again = gradient_norms(model, batches, criterion, precision)
    ratio_again = again[1] / again[0] if again[0] else None
    return {"ce": ce, "loss": alpha * at_one, "ratio": alpha * at_one / ce, "again": ratio_again}
