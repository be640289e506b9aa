"""Pictures read from files, of any size, for data that do not fit into memory: a DataLoader's worker processes
decode, crop and flip; batches are normalised on the device."""

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional

from training.batches import normalise, parts, sample
from training.image_batches import RESIZE_OVER_CROP, draw_boxes
from utils import DataError, epoch_generator, open_picture

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class _Crops(Dataset):
    """Item (index, seed): the picture cropped and flipped as the seed says; seed None: resized, its middle."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __getitem__(self, item):
        index, seed = item
        try:
            image = open_picture(self.paths[index])
        except DataError as error:  # an exception would come out of a worker with its whole traceback
            return error
        crop = self._central(image) if seed is None else self._random(image, seed)
        return torch.from_numpy(np.array(crop))

    def stack(self, items):
        """(B, size, size, 3) uint8, or the first error."""
        error = next((item for item in items if isinstance(item, DataError)), None)
        return error or (torch.stack(items) if items else torch.empty((0, self.size, self.size, 3), dtype=torch.uint8))

    def _central(self, image):
        shorter = functional.resize(image, round(self.size * RESIZE_OVER_CROP))
        return functional.center_crop(shorter, self.size)

    def _random(self, image, seed):
        generator = torch.Generator().manual_seed(seed)
        top, left, height, width = draw_boxes(1, image.height, image.width, generator)[0].tolist()
        crop = functional.resized_crop(image, top, left, height, width, [self.size, self.size])
        return functional.hflip(crop) if torch.rand((), generator=generator) < 0.5 else crop


class FileBatches:
    """RandomResizedCrop and flip for training, resize and central crop for evaluation, in batches.

    Every picture has a seed of its own, drawn from (seed, epoch), so an epoch is the same whatever `workers` is.

    Args:
        paths: N picture files.
        targets: (N,) ints.
        image_size: side of the square that the net sees.
        workers: processes that decode; 0: this one.
        batch_size, mean, std, device, seed: as TensorBatches.

    Iterating raises DataError for a file that cannot be decoded, and for a worker that dies.
    """

    def __init__(
        self, paths, targets, batch_size, mean=IMAGENET_MEAN, std=IMAGENET_STD, device="cpu", seed=0,
        image_size=224, workers=0,
    ):  # fmt: skip
        self.crops = _Crops(list(paths), image_size)
        self.targets = torch.as_tensor(targets, dtype=torch.int64).to(device)
        self.batch_size, self.seed, self.workers = batch_size, seed, workers
        self.mean = torch.tensor(mean, device=device).repeat(image_size)
        self.std = torch.tensor(std, device=device).repeat(image_size)

    def __len__(self):
        return -(-len(self.targets) // self.batch_size)

    def train_epoch(self, epoch, rates=None):
        """As TensorBatches.train_epoch; order and crops are drawn from (seed, epoch)."""
        generator, n = epoch_generator(self.seed, epoch), len(self.targets)
        order = sample(rates, generator) if rates is not None else torch.randperm(n, generator=generator)
        seeds = torch.randint(2**62, (n,), generator=generator)
        yield from self._batches(order.tolist(), seeds.tolist())

    def eval_epoch(self):
        """The batches in order, resized and cropped in the middle."""
        n = len(self.targets)
        yield from self._batches(range(n), [None] * n)

    def _batches(self, order, seeds):
        device, items = self.targets.device, list(zip(order, seeds, strict=True))
        batches = [items[batch] for batch in parts(len(items), self.batch_size)]
        loader = DataLoader(
            self.crops, batch_sampler=batches, num_workers=self.workers, collate_fn=self.crops.stack,
            pin_memory=device.type == "cuda",
        )  # fmt: skip
        for batch, images in zip(batches, _reading(loader), strict=True):
            rows = torch.tensor([index for index, _ in batch], dtype=torch.int64, device=device)
            yield normalise(images.to(device, non_blocking=True), self.mean, self.std), self.targets[rows]


def _reading(loader):
    """The loader's batches; what went wrong in a worker as a DataError."""
    try:
        for images in loader:
            if isinstance(images, DataError):
                raise images
            yield images
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise DataError(f"a process that reads pictures died: a smaller -j may help ({error})") from None


def make_batches(options, dataset, positions, device):
    """The whole PictureSet, or its `positions`."""
    part = dataset if positions is None else dataset.subset(positions)
    return FileBatches(
        part.paths, part.targets, options.batch_size, device=device, seed=options.seed or 0,
        image_size=options.image_size, workers=options.workers,
    )  # fmt: skip
