"""Pictures decoded once into one uint8 array, and crops of them resized a batch at a time, on the device.

For data sets of small pictures of one size. The resize is Pillow's antialiased bilinear one, written as two
matrix products, so that every picture of a batch has a crop box of its own.
"""

import contextlib
import glob
import hashlib
import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL
import torch

from training.batches import parts, sample
from utils import DataError, epoch_generator, locked, warn

#: Part of the cache's key: to be raised when `decode_once` writes something else.
CACHE_FORMAT = 1

#: torchvision's RandomResizedCrop: share of the area, aspect ratio, tries before the central fallback.
CROP_SCALE, CROP_RATIO, CROP_TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
#: The shorter side is resized to this multiple of the crop's side before the central crop (256 for 224).
RESIZE_OVER_CROP = 256 / 224

# ------------------------------------------------------------------------------------------- decoding once


def decode_once(paths, read, folder, name, workers=1):
    """All pictures as one array, memory-mapped from a file that is made the first time.

    The file is `folder/<name>-<key>-<crc>.npy`: the key is of the paths, sizes, times of change and the decoder's
    version, the crc of the pixels. Files of other keys are deleted when a new one is made. Where the folder
    cannot be written, the array stays in memory.

    Args:
        paths: N files below one folder, all pictures of one size.
        read: path -> (H, W, 3) uint8 array; raises DataError for what cannot be decoded.
        folder: where the cache lies; made if needed.
        name: prefix of the cache's file.
        workers: threads that decode.

    Returns:
        (N, H, W, 3) uint8 array; writing into it changes no file.

    Raises:
        DataError: from `read`, or a picture of another size than the first.
    """
    first = read(paths[0])
    shape, key = (len(paths), *first.shape), cache_key(paths)
    try:
        os.makedirs(folder, exist_ok=True)
        with locked(folder):
            return _cached(paths, read, folder, name, key, shape, workers)
    except OSError as error:
        warn(f"{folder} cannot keep the decoded pictures ({error}): they are decoded anew in every run")
    images = np.empty(shape, np.uint8)
    _decode_into(images, paths, read, workers)
    return images


def _cached(paths, read, folder, name, key, shape, workers):
    """The mapped file of that key, made if there is none that is whole."""
    for path in glob.glob(os.path.join(glob.escape(folder), f"{name}-{key}-*.npy")):
        images = _open_cache(path, shape)
        if images is not None:
            return images
    print(f"decoding {len(paths):,} pictures, once, into {folder}", flush=True)
    temporary = os.path.join(folder, f"{name}.partial")  # one writer at a time: a lock is held
    try:
        images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        _decode_into(images, paths, read, workers)
        images.flush()
        path = os.path.join(folder, f"{name}-{key}-{_crc(images)}.npy")
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    for old in glob.glob(os.path.join(glob.escape(folder), f"{name}-*-*.npy")):
        os.unlink(old)
    os.replace(temporary, path)
    return np.load(path, mmap_mode="c")


def cache_key(paths):
    """16 hex digits that change with any path (below the common folder), size, time of change, or decoder."""
    root = os.path.commonpath(paths) if len(paths) > 1 else os.path.dirname(paths[0])
    digest = hashlib.sha256(f"{CACHE_FORMAT} Pillow {PIL.__version__}\n".encode())
    for path in paths:
        status = os.stat(path)
        digest.update(f"{os.path.relpath(path, root)}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _open_cache(path, shape):
    """The mapped array, or None (and a warning) if the file is damaged."""
    try:
        # 'c': pages are shared until written to, which torch wants to be possible
        images = np.load(path, mmap_mode="c")
        if images.shape == shape and images.dtype == np.uint8 and path.endswith(f"-{_crc(images)}.npy"):
            return images
    except (OSError, ValueError, EOFError):
        pass
    warn(f"{path} is damaged: it is made anew")
    return None


def _crc(images):
    value = 0
    for start in range(0, len(images), 1024):
        value = zlib.crc32(np.ascontiguousarray(images[start : start + 1024]).data, value)
    return f"{value:08x}"


def _decode_into(images, paths, read, workers):
    def one(index):
        picture = read(paths[index])
        if picture.shape != images.shape[1:]:
            sizes = [f"{shape[1]} x {shape[0]}" for shape in (picture.shape, images.shape[1:])]
            raise DataError(f"{paths[index]} has {sizes[0]} pixels, {paths[0]} has {sizes[1]}: they must agree")
        images[index] = picture

    if workers <= 1:
        for index in range(len(paths)):
            one(index)
        return
    with ThreadPoolExecutor(workers) as pool:  # Pillow decodes without holding the interpreter's lock
        for start in range(0, len(paths), 4096):  # in parts, so that an error ends it soon
            list(pool.map(one, range(start, min(start + 4096, len(paths)))))


# ------------------------------------------------------------------------------------- crop boxes and resize


def draw_boxes(n, height, width, generator, scale=CROP_SCALE, ratio=CROP_RATIO):
    """Crop boxes with the distribution of torchvision's RandomResizedCrop.get_params.

    Up to ten tries for each picture: an area share uniform in `scale`, an aspect ratio log-uniform in `ratio`;
    the first box that fits is placed uniformly. If none fits: the largest central box with a ratio in bounds.

    Args:
        n: boxes.
        height, width: of the pictures.
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


def resize_weights(start, length, size_in, size_out):
    """One axis of Pillow's antialiased bilinear resize of a crop, as matrices.

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


def resize(images, vertical, horizontal):
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


def resized_crops(images, boxes, flips, size):
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


def central_weights(height, width, shorter, size, device="cpu"):
    """Resize(shorter) and CenterCrop(size) as one pair of matrices for `resize`: (1, size, H), (1, size, W)."""
    matrices = []
    for side in (height, width):
        # torchvision cuts the longer side down to a whole number and rounds the corner
        length = shorter if side == min(height, width) else int(shorter * side / min(height, width))
        corner = round((length - size) / 2)
        start, whole = torch.tensor([[0], [side]], device=device)
        matrices.append(resize_weights(start, whole, side, length)[:, corner : corner + size])
    return matrices


def resize_all(images, size, batch=256):
    """Every picture resized to size x size: (N, size, size, 3) uint8 array; the same array if nothing changes."""
    if images.shape[1:3] == (size, size):
        return images
    matrices = [resize_weights(torch.tensor([0]), torch.tensor([side]), side, size) for side in images.shape[1:3]]
    parts = [
        resize(torch.as_tensor(images[start : start + batch]), *matrices).byte().numpy()
        for start in range(0, len(images), batch)
    ]
    return np.concatenate(parts)


# ------------------------------------------------------------------------------------------------- batches


class ResizedCropBatches:
    """RandomResizedCrop and flip for training, resize and central crop for evaluation, in batches.

    On the CPU a memory-mapped array is read batch by batch; another device receives the pictures once, as uint8.

    Args:
        images: (M, H, W, 3) uint8 array, whole or memory-mapped.
        rows: (N,) ints, the pictures that belong to the data set.
        targets: (N,) ints.
        image_size: side of the square that the net sees.
        batch_size, mean, std, device, seed: as TensorBatches.
    """

    def __init__(self, images, rows, targets, batch_size, mean, std, device="cpu", seed=0, image_size=224):
        rows = torch.as_tensor(rows, dtype=torch.int64)
        on_cpu = torch.device(device).type == "cpu"
        if not on_cpu:
            images, rows = images[rows.numpy()], torch.arange(len(rows))
        self.images, self.rows = torch.as_tensor(images).to(device), rows.to(device)
        self.targets = torch.as_tensor(targets, dtype=torch.int64).to(device)
        self.batch_size, self.image_size, self.seed = batch_size, image_size, seed
        # grey levels, of a whole row of pixels
        self.mean = 255 * torch.tensor(mean, device=device).repeat(image_size)
        self.std = 255 * torch.tensor(std, device=device).repeat(image_size)
        self.at_once = 8 if on_cpu else batch_size  # eight pictures of 224 x 224 stay in a core's cache
        shorter = round(image_size * RESIZE_OVER_CROP)
        self.height, self.width = self.images.shape[1:3]
        self.central = central_weights(self.height, self.width, shorter, image_size, device)

    def __len__(self):
        return -(-len(self.targets) // self.batch_size)

    def train_epoch(self, epoch, rates=None):
        """As TensorBatches.train_epoch; order, boxes and flips are drawn from (seed, epoch)."""
        generator, n, device = epoch_generator(self.seed, epoch), len(self.targets), self.images.device
        order = sample(rates, generator) if rates is not None else torch.randperm(n, generator=generator)
        boxes = draw_boxes(n, self.height, self.width, generator)
        flips = torch.rand(n, generator=generator) < 0.5
        order, boxes, flips = order.to(device), boxes.to(device), flips.to(device)

        def crop(part):
            return resized_crops(self.images[self.rows[order[part]]], boxes[part], flips[part], self.image_size)

        for batch in parts(n, self.batch_size):
            yield self._batch(crop, batch.start, batch.stop), self.targets[order[batch]]

    def eval_epoch(self):
        """The batches in order, resized and cropped in the middle."""

        def crop(part):
            return resize(self.images[self.rows[part]], *self.central)

        for batch in parts(len(self.targets), self.batch_size):
            yield self._batch(crop, batch.start, batch.stop), self.targets[batch]

    def _batch(self, crop, start, stop):
        """The pictures from `start` to `stop`, made by `crop(slice)`, normalised: (B, 3, size, size), channels last."""
        size, device = self.image_size, self.images.device
        batch = torch.empty(stop - start, size, size * 3, device=device)
        for first in range(start, stop, self.at_once):
            last = min(first + self.at_once, stop)
            pixels = crop(slice(first, last)).flatten(2)
            torch.sub(pixels, self.mean, out=batch[first - start : last - start]).div_(self.std)
        return batch.view(-1, size, size, 3).permute(0, 3, 1, 2)
