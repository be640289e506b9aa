"""Images decoded once into one uint8 array, and crops of them resized a batch at a time, on the device.

For data sets of small images of one size. Every image of a batch has a crop box of its own.
"""

import contextlib
import glob
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import PIL
import torch

from files import folder_lock
from imbalance import LabelledImages
from imbalance_folder import map_in_threads, read_image
from loaders import Batches, sampled_order
from loaders.in_memory import InMemoryBatches
from loaders.transforms import central_weights, crop_resize_and_flip, draw_boxes, resize, resize_all
from utils import DataError, epoch_generator, warn

#: Part of the cache's key: to be raised when `decode_once` writes something else.
CACHE_FORMAT = 1


def make_batches(
    dataset: Any, batch_size: int, device: torch.device | str = "cpu", seed: int = 0, image_size: int = 224,
    crop: str | None = "resized", flip: bool | None = None, workers: int = 1,
) -> Batches:  # fmt: skip
    """Batches of a part of Tiny ImageNet (see imbalance_tinyimagenet.py), decoded once into a file beside the data.

    Args:
        image_size: side of the square that the model sees.
        crop: 'resized': ResizedCropBatches. 'padded': images of `image_size`, cropped from ones padded by an eighth.
        workers: threads that decode.
        The others: see `loaders.Batches`.
    """
    part, folder = os.path.basename(dataset.root), os.path.join(os.path.dirname(dataset.root), "decoded")
    images = decode_once([path for path, _ in dataset.available], read_image, folder, part, workers)
    if crop != "padded":
        return ResizedCropBatches(dataset, images, batch_size, device, seed, image_size, flip)
    resized = dataset.subset(range(len(dataset.targets)))
    resized.data = resize_all(images[dataset.chosen], image_size)
    return InMemoryBatches(resized, batch_size, device, seed, image_size // 8, flip)


class ResizedCropBatches(Batches):
    """RandomResizedCrop and flip for training, resize and central crop for evaluation, in batches.

    On the CPU a memory-mapped array is read batch by batch; another device receives the images once, as uint8.

    Args:
        dataset: `chosen` are its rows in `images`.
        images: (M, H, W, 3) uint8 array, whole or memory-mapped.
        image_size: side of the square that the model sees.
        The others: see `loaders.Batches`.
    """

    def __init__(
        self, dataset: LabelledImages, images: np.ndarray, batch_size: int, device: torch.device | str = "cpu",
        seed: int = 0, image_size: int = 224, flip: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(dataset, batch_size, device, seed, flip)
        rows = torch.as_tensor(dataset.chosen, dtype=torch.int64)
        on_cpu = self.targets.device.type == "cpu"
        if not on_cpu:
            images, rows = images[rows.numpy()], torch.arange(len(rows))
        self.images, self.rows, self.image_size = torch.as_tensor(images).to(device), rows.to(device), image_size
        # grey levels, of a whole row of pixels
        self.mean = 255 * torch.tensor(dataset.mean, device=device).repeat(image_size)
        self.std = 255 * torch.tensor(dataset.std, device=device).repeat(image_size)
        self.at_once = 8 if on_cpu else batch_size  # eight images of 224 x 224 stay in a core's cache
        self.height, self.width = self.images.shape[1:3]
        self.central = central_weights(self.height, self.width, image_size, device)

    def train_epoch(self, epoch: int, rates: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As InMemoryBatches.train_epoch; order, boxes and flips are drawn from (seed, epoch)."""
        generator, n, device = epoch_generator(self.seed, epoch), len(self.targets), self.images.device
        order = sampled_order(n, generator, rates)
        boxes = draw_boxes(n, self.height, self.width, generator)
        flips = (torch.rand(n, generator=generator) < 0.5) & self.flip
        order, boxes, flips = order.to(device), boxes.to(device), flips.to(device)

        def crop(part):
            images = self.images[self.rows[order[part]]]
            return crop_resize_and_flip(images, boxes[part], flips[part], self.image_size)

        for batch in self._slices():
            yield self._batch(crop, batch), self.targets[order[batch]]

    def eval_epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches in order, resized and cropped in the middle."""

        def crop(part):
            return resize(self.images[self.rows[part]], *self.central)

        for batch in self._slices():
            yield self._batch(crop, batch), self.targets[batch]

    def _batch(self, crop, batch):
        """The images of a slice, made by `crop(slice)`, normalised: (B, 3, size, size), channels last."""
        size, start, stop = self.image_size, batch.start, batch.stop
        images = torch.empty(stop - start, size, size * 3, device=self.images.device)
        for first in range(start, stop, self.at_once):
            last = min(first + self.at_once, stop)
            pixels = crop(slice(first, last)).flatten(2)
            torch.sub(pixels, self.mean, out=images[first - start : last - start]).div_(self.std)
        return images.view(-1, size, size, 3).permute(0, 3, 1, 2)


# ------------------------------------------------------------------------------------------- decoding once


def decode_once(
    paths: Sequence[str], read: Callable[[str], np.ndarray], folder: str, name: str, workers: int = 1
) -> np.ndarray:
    """All images as one array, memory-mapped from a file that is made the first time.

    The file is `folder/<name>-<key>-<crc>.npy`: the key is of the paths, sizes, times of change and the decoder's
    version, the crc of the pixels. Files of other keys are deleted when a new one is made. Where the folder
    cannot be written, the array stays in memory.

    Args:
        paths: N files below one folder, all images of one size.
        read: path -> (H, W, 3) uint8 array; raises DataError for what cannot be decoded.
        folder: where the cache lies; made if needed.
        name: prefix of the cache's file.
        workers: threads that decode.

    Returns:
        (N, H, W, 3) uint8 array; writing into it changes no file.

    Raises:
        DataError: from `read`, or an image of another size than the first.
    """
    first = read(paths[0])
    shape, key = (len(paths), *first.shape), cache_key(paths)
    try:
        os.makedirs(folder, exist_ok=True)
        with folder_lock(folder):
            return _cached(paths, read, folder, name, key, shape, workers)
    except OSError as error:
        warn(f"{folder} cannot keep the decoded images ({error}): they are decoded anew in every run")
    images = np.empty(shape, np.uint8)
    _decode_into(images, paths, read, workers)
    return images


def _cached(paths, read, folder, name, key, shape, workers):
    """The mapped file of that key, made if there is none that is whole."""
    for path in glob.glob(os.path.join(glob.escape(folder), f"{name}-{key}-*.npy")):
        images = _open_cache(path, shape)
        if images is not None:
            return images
    print(f"decoding {len(paths):,} images, once, into {folder}", flush=True)
    temporary = os.path.join(folder, f"{name}.partial")  # one writer at a time: a lock is held
    try:
        images = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        _reserve(temporary)
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


def _reserve(path):
    """Take the space of a file with holes now: where the disk is full, a write into its map would end the process."""
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, os.path.getsize(path))


def cache_key(paths: Sequence[str]) -> str:
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
        image = read(paths[index])
        if image.shape != images.shape[1:]:
            sizes = [f"{shape[1]} x {shape[0]}" for shape in (image.shape, images.shape[1:])]
            raise DataError(f"{paths[index]} has {sizes[0]} pixels, {paths[0]} has {sizes[1]}: they must agree")
        images[index] = image

    for _ in map_in_threads(one, range(len(paths)), workers):
        pass
