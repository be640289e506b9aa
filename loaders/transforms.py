"""Crop, flip and normalisation of a batch at once, on any device; the draws are arguments."""

import torch
from torch.nn import functional as F


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in channels-last layout, as ToTensor and Normalize do.

    mean, std: of the channels, repeated for each pixel of a row, so that the inner loop is long.
    """
    rows = images.flatten(2).float()
    return rows.div_(255).sub_(mean).div_(std).view(images.shape).permute(0, 3, 1, 2)


def crop_and_flip(images: torch.Tensor, offsets: torch.Tensor, flips: torch.Tensor, padding: int) -> torch.Tensor:
    """RandomCrop(H, padding) and RandomHorizontalFlip for given draws, bit for bit torchvision's.

    Args:
        images: (B, H, W, 3).
        offsets: (B, 2), top and left corner of the crop in the padded image, in [0, 2 * padding].
        flips: (B,) bool, flip left to right after the crop.
    """
    batch, height, width, channels = images.shape
    padded = F.pad(images, (0, 0, padding, padding, padding, padding))
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(batch, width)
    columns = offsets[:, 1:] + torch.where(flips[:, None], width - 1 - columns, columns)
    first_row = torch.arange(0, batch * padded.shape[1], padded.shape[1], device=images.device)[:, None]
    pixels = (first_row + rows)[:, :, None] * padded.shape[2] + columns[:, None, :]
    return padded.view(-1, channels).index_select(0, pixels.view(-1)).view(images.shape)
