"""Crops, flips, resizes and normalisation of a batch at once, on any device; the draws are arguments."""

import math

import numpy as np
import torch
from torch.nn import functional as F

#: torchvision's RandomResizedCrop: share of the area, aspect ratio, tries before the central fallback.
CROP_SCALE, CROP_RATIO, CROP_TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
#: The shorter side is resized to this multiple of the crop's side before the central crop (256 for 224).
RESIZE_OVER_CROP = 256 / 224


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


def draw_boxes(
    n: int, height: int, width: int, generator: torch.Generator,
    scale: tuple[float, float] = CROP_SCALE, ratio: tuple[float, float] = CROP_RATIO,
) -> torch.Tensor:  # fmt: skip
    """Crop boxes with the distribution of torchvision's RandomResizedCrop.get_params.

    Up to ten tries for each image: an area share uniform in `scale`, an aspect ratio log-uniform in `ratio`;
    the first box that fits is placed uniformly. If none fits: the largest central box with a ratio in bounds.

    Args:
        n: boxes.
        height, width: of the images.
        generator: a CPU generator.

    Returns:
        (n, 4) int64: top, left, height, width.
    """
    area = torch.empty(n, CROP_TRIES, dtype=torch.float64).uniform_(*scale, generator=generator) * height * width
    log_ratio = torch.empty(n, CROP_TRIES, dtype=torch.float64)
    aspect = log_ratio.uniform_(math.log(ratio[0]), math.log(ratio[1]), generator=generator).exp()
    place = torch.rand(n, 2, dtype=torch.float64, generator=generator)
    widths, heights = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (widths > 0) & (widths <= width) & (heights > 0) & (heights <= height)
    first = fits.int().argmax(1, keepdim=True)  # the first of equal maxima
    h, w = heights.gather(1, first)[:, 0], widths.gather(1, first)[:, 0]
    top, left = (place[:, 0] * (height - h + 1)).long(), (place[:, 1] * (width - w + 1)).long()
    boxes = torch.stack([top, left, h, w], 1)
    return torch.where(fits.any(1, keepdim=True), boxes, torch.tensor(_central_box(height, width, ratio)))


def _central_box(height, width, ratio):
    w = round(height * ratio[1]) if width / height > ratio[1] else width
    h = round(width / ratio[0]) if width / height < ratio[0] else height
    return [(height - h) // 2, (width - w) // 2, h, w]


# --------------------------------------------------------- Pillow's antialiased bilinear resize, as two matrix products


def resize_weights(start: torch.Tensor, length: torch.Tensor, size_in: int, size_out: int) -> torch.Tensor:
    """One axis of the resize of a crop, as matrices.

    Args:
        start, length: (B,) the crop's part of the axis, in pixels.
        size_in: pixels of the whole axis.
        size_out: pixels that the crop becomes.

    Returns:
        (B, size_out, size_in) float32; rows add up to 1 and are 0 outside the crop.
    """
    start, length = start[:, None, None].float(), length[:, None, None].float()
    step = length / size_out
    centre = (torch.arange(size_out, device=start.device)[:, None] + 0.5) * step
    pixel = torch.arange(size_in, device=start.device) - start
    weights = (1 - (pixel + 0.5 - centre).abs() / step.clamp(min=1)).clamp_(min=0)
    weights *= (pixel >= 0) & (pixel < length)
    return weights / weights.sum(2, keepdim=True)


def resize(images: torch.Tensor, vertical: torch.Tensor, horizontal: torch.Tensor) -> torch.Tensor:
    """Resize with the matrices of `resize_weights`; like Pillow: rounded to whole grey levels after each pass.

    Rows come first, as in Pillow, which turns the order round where that is less work: a level of difference.

    Args:
        images: (B, H, W, 3) uint8.
        vertical: (B or 1, h, H) float32.
        horizontal: (B or 1, w, W) float32.

    Returns:
        (B, h, w, 3) float32 with whole numbers from 0 to 255.
    """
    batch, height, width, channels = images.shape
    planes = images.permute(0, 3, 1, 2).reshape(batch, channels * height, width).float()
    rows = torch.bmm(planes, horizontal.expand(batch, -1, -1).transpose(1, 2)).add_(0.5).floor_()
    rows = rows.view(batch, channels, height, -1).permute(0, 2, 3, 1).reshape(batch, height, -1)
    pixels = torch.bmm(vertical.expand(batch, -1, -1), rows).add_(0.5).floor_()
    return pixels.view(batch, vertical.shape[1], horizontal.shape[1], channels)


def crop_resize_and_flip(images: torch.Tensor, boxes: torch.Tensor, flips: torch.Tensor, size: int) -> torch.Tensor:
    """RandomResizedCrop(size) and RandomHorizontalFlip for given draws.

    Args:
        images: (B, H, W, 3) uint8.
        boxes: (B, 4) top, left, height, width.
        flips: (B,) bool, flip left to right.
        size: of the result, which is square.

    Returns:
        (B, size, size, 3) float32, whole numbers from 0 to 255.
    """
    top, left, height, width = boxes.unbind(1)
    horizontal = resize_weights(left, width, images.shape[2], size)
    horizontal = torch.where(flips[:, None, None], horizontal.flip(1), horizontal)
    return resize(images, resize_weights(top, height, images.shape[1], size), horizontal)


def central_weights(
    height: int, width: int, size: int, device: torch.device | str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Resize(size * 256 / 224) and CenterCrop(size) as matrices for `resize`: (1, size, H) and (1, size, W)."""
    shorter, matrices = round(size * RESIZE_OVER_CROP), []
    for side in (height, width):
        # torchvision cuts the longer side down to a whole number and rounds the corner
        length = shorter if side == min(height, width) else int(shorter * side / min(height, width))
        corner = round((length - size) / 2)
        start, whole = torch.tensor([[0], [side]], device=device)
        matrices.append(resize_weights(start, whole, side, length)[:, corner : corner + size])
    return matrices[0], matrices[1]


def resize_all(images: np.ndarray, size: int, batch: int = 256) -> np.ndarray:
    """Every image resized to size x size: (N, size, size, 3) uint8; the same array if nothing changes."""
    if images.shape[1:3] == (size, size):
        return images
    matrices = [resize_weights(torch.tensor([0]), torch.tensor([side]), side, size) for side in images.shape[1:3]]
    starts = range(0, len(images), batch)
    return np.concatenate(
        [resize(torch.as_tensor(images[i : i + batch]), *matrices).byte().numpy() for i in starts]
    )  # fmt: skip
