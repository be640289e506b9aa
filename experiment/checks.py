"""What could stop a run late is tried before it starts."""

import copy

import torch

from loaders import Batches, batch_slices
from training import distributed
from utils import UsageError


def check_last_batch(model: torch.nn.Module, batches: Batches, sync_bn: bool = False) -> None:
    """Raise UsageError for a batch of one image, on any rank, where batch norm cannot take it.

    Args:
        model: on its device; a copy is tried.
        batches: of training, whose size is that of all ranks together.
        sync_bn: batch norm is over the images of all ranks.
    """
    ranks = 1 if sync_bn else distributed.world_size()
    images, batch_size, size = len(batches.targets), batches.batch_size, batches.image_size
    sizes = {part.stop - part.start for rank in range(ranks) for part in batch_slices(images, batch_size, rank, ranks)}
    if 1 not in sizes:
        return
    try:
        with torch.no_grad():
            device = next(model.parameters()).device
            copy.deepcopy(model).train()(torch.zeros(1, 3, size, size, device=device))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        leaves = "leaves a last batch" if ranks == 1 else f"over {ranks} processes leaves one of them a batch"
        raise UsageError(
            f"--batch-size {batch_size} {leaves} of one image of {images}, which batch norm cannot take at this image "
            "size: choose another --batch-size"
        ) from None
