"""What could stop a run late is tried before it starts."""

import copy

import torch

from experiment.settings import Settings
from loaders import batch_slices
from training import distributed
from utils import UsageError


def check_model(model: torch.nn.Module, image_size: int, images: int, settings: Settings) -> None:
    """The two checks below, for so many training images."""
    check_last_batch(model, images, settings.batch_size, image_size, settings.sync_bn)
    check_deterministic(model, image_size)


def check_last_batch(
    model: torch.nn.Module, images: int, batch_size: int, image_size: int, sync_bn: bool = False
) -> None:
    """Refuse a batch of one image, on any rank, where batch norm cannot take it.

    Args:
        images: of the training set. batch_size: over all ranks. image_size: side of the images.

    Raises:
        UsageError: see above.
    """
    ranks = 1 if sync_bn else distributed.world_size()  # which normalises all ranks' images together
    sizes = {part.stop - part.start for rank in range(ranks) for part in batch_slices(images, batch_size, rank, ranks)}
    if 1 not in sizes:
        return
    try:
        with torch.no_grad():
            copy.deepcopy(model).train()(_blank(model, 1, image_size))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        leaves = "leaves a last batch" if ranks == 1 else f"over {ranks} processes leaves one of them a batch"
        raise UsageError(
            f"--batch-size {batch_size} {leaves} of one image of {images}, which batch norm cannot take at this image "
            "size: choose another --batch-size"
        ) from None


def check_deterministic(model: torch.nn.Module, image_size: int) -> None:
    """With --deterministic, try a backward pass.

    Raises:
        UsageError: the model has an operator that cannot be repeated to the bit on this device.
    """
    if not torch.are_deterministic_algorithms_enabled():
        return
    try:
        copy.deepcopy(model).train()(_blank(model, 2, image_size))[0].sum().backward()
    except RuntimeError as error:
        if "does not have a deterministic implementation" not in str(error):
            raise
        raise UsageError(
            f"this model cannot be trained with --deterministic on a GPU: {str(error).split(',')[0]}"
        ) from None


def _blank(model, images, size):
    return torch.zeros(images, 3, size, size, device=next(model.parameters()).device)
