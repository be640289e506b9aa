"""Images read from files, of any size, for data that do not fit into memory: a DataLoader's worker processes
decode, crop and flip; batches are normalised on the device."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

from imbalance_folder import open_image
from loaders import Batches, sampled_order
from loaders.transforms import RESIZE_OVER_CROP, draw_boxes, normalise
from utils import DataError, epoch_generator

#: Longest side over shortest. Of a longer strip only the middle is resized for evaluation: the whole could take GBs.
LONGEST_OVER_SHORTEST = 32


class _Crops(Dataset):
    """Item (index, seed): the image cropped and flipped as the seed says; seed None: resized, its middle."""

    def __init__(self, paths, size, flip, exif):
        self.paths, self.size, self.flip, self.exif = paths, size, flip, exif

    def __getitem__(self, item):
        index, seed = item
        try:
            image = open_image(self.paths[index], self.exif)
        except DataError as error:  # an exception would come out of a worker with its whole traceback
            return error
        crop = self._central(image) if seed is None else self._random(image, seed)
        return torch.from_numpy(np.array(crop))

    def stack(self, items):
        """(B, size, size, 3) uint8, or the first error."""
        error = next((item for item in items if isinstance(item, DataError)), None)
        return error or (torch.stack(items) if items else torch.empty((0, self.size, self.size, 3), dtype=torch.uint8))

    def _central(self, image):
        longest = LONGEST_OVER_SHORTEST * min(image.size)
        longest += (max(image.size) - longest) % 2  # the same middle
        if max(image.size) > longest:
            image = functional.center_crop(image, [min(image.height, longest), min(image.width, longest)])
        shorter = functional.resize(image, round(self.size * RESIZE_OVER_CROP))
        return functional.center_crop(shorter, self.size)

    def _random(self, image, seed):
        generator = torch.Generator().manual_seed(seed)
        top, left, height, width = draw_boxes(1, image.height, image.width, generator)[0].tolist()
        crop = functional.resized_crop(image, top, left, height, width, [self.size, self.size])
        flip = torch.rand((), generator=generator) < 0.5
        return functional.hflip(crop) if flip and self.flip else crop


class ImageFileBatches(Batches):
    """RandomResizedCrop and flip for training, resize and central crop for evaluation, in batches.

    Every image has a seed of its own, drawn from (seed, epoch), so an epoch is the same whatever `workers` is. The
    processes stay from epoch to epoch.

    Args:
        dataset: with `paths`, N image files.
        image_size: side of the square that the model sees.
        workers: processes that decode; 0: this one.
        The others: see `loaders.Batches`.

    Iterating raises DataError for a file that cannot be decoded, and for a worker that dies.
    """

    def __init__(
        self, dataset: Any, batch_size: int, device: torch.device | str = "cpu", seed: int = 0, image_size: int = 224,
        workers: int = 0, flip: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(dataset, batch_size, device, seed, flip)
        self.mean = torch.tensor(dataset.mean, device=device).repeat(image_size)
        self.std = torch.tensor(dataset.std, device=device).repeat(image_size)
        self._plan: list[list] = []  # the (index, seed) pairs of each batch of an epoch; the loader reads it anew
        crops = _Crops(list(dataset.paths), image_size, self.flip, dataset.exif)
        self._loader = DataLoader(
            crops, batch_sampler=self._plan, num_workers=workers, collate_fn=crops.stack,
            pin_memory=self.targets.is_cuda, persistent_workers=workers > 0,
            generator=torch.Generator(),  # else it draws from the global one
        )  # fmt: skip

    def train_epoch(self, epoch: int, rates: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As InMemoryBatches.train_epoch; order and crops are drawn from (seed, epoch)."""
        generator, n = epoch_generator(self.seed, epoch), len(self.targets)
        order = sampled_order(n, generator, rates)
        seeds = torch.randint(2**62, (n,), generator=generator)
        return self._batches(order, seeds.tolist())

    def eval_epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches in order, resized and cropped in the middle."""
        n = len(self.targets)
        return self._batches(torch.arange(n), [None] * n)

    def _batches(self, order, seeds):
        items, slices = list(zip(order.tolist(), seeds, strict=True)), list(self._slices())
        targets = self.targets[order.to(self.targets.device)]  # one upload an epoch
        self._plan[:] = [items[batch] for batch in slices]
        for batch, images in zip(slices, _read(self._loader), strict=True):
            yield normalise(images.to(targets.device, non_blocking=True), self.mean, self.std), targets[batch]


def _read(loader):
    """The loader's batches; what went wrong in a worker as a DataError."""
    try:
        for images in loader:
            if isinstance(images, DataError):
                raise images
            yield images
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"a process that reads images died: a smaller -j may help ({error})") from None
