"""Images of any size, from files where they do not fit into memory: a DataLoader's worker processes decode, crop, flip
and augment; batches are normalised on the device."""

import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional

from imbalance_folder import open_image
from loaders import Batches, sampled_order
from loaders.augment import Transform, centre, seeded, shorter_side, train_transform
from utils import DataError, epoch_generator

# torch's own advice on -j; how many processes help depends on the disk too
warnings.filterwarnings("ignore", "This DataLoader will create")


class Crops(Dataset):
    """Item (index, seed): the image as `train` makes it with that seed, or, seed None, as `evaluate` does.

    It is (image_size, image_size, 3) uint8, or the DataError of a file that cannot be decoded.

    Args:
        sources: paths, or (N, 3, H, W) uint8.
        exif: see `imbalance_folder.open_image`.
    """

    def __init__(self, sources: Any, exif: bool, train: Transform, evaluate: Transform, image_size: int) -> None:
        self.sources, self.exif, self.train, self.evaluate = sources, exif, train, evaluate
        self.image_size = image_size

    def __getitem__(self, item: tuple[int, int | None]) -> torch.Tensor | DataError:
        index, seed = item
        source = self.sources[index]
        try:
            image = source if torch.is_tensor(source) else functional.pil_to_tensor(open_image(source, self.exif))
        except DataError as error:  # an exception would come out of a worker with its whole traceback
            return error
        crop = self.evaluate(image) if seed is None else seeded(self.train, image, seed)
        return crop.permute(1, 2, 0)

    def stack(self, items: list[Any]) -> torch.Tensor | DataError:
        """(B, image_size, image_size, 3) uint8, or the first error."""
        error = next((item for item in items if isinstance(item, DataError)), None)
        empty = torch.empty((0, self.image_size, self.image_size, 3), dtype=torch.uint8)
        return error or (torch.stack(items) if items else empty)


class ImageFileBatches(Batches):
    """Crops and flips for training, resize and central crop for evaluation, in batches; see loaders/augment.py.

    Every image has a seed of its own, drawn from (seed, epoch), so an epoch is the same whatever `workers` is. The
    processes stay from epoch to epoch.

    Args:
        dataset: with `data`, (N, H, W, 3) uint8 in memory, or with `samples`, N pairs of an image file and a label, as
            torchvision's ImageFolder has them.
        image_size: side of the square that the model sees.
        workers: processes that decode; 0: this one.
        augment: a name in `loaders.augment.AUGMENTS`.
        The others: see `loaders.Batches`.

    Iterating raises DataError for a file that cannot be decoded, and for a worker that dies. An epoch ends where the
    next one starts: they share the processes.
    """

    def __init__(
        self, dataset: Any, batch_size: int, device: torch.device | str = "cpu", seed: int = 0, image_size: int = 224,
        workers: int = 0, flip: bool | None = None, augment: str = "none", rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        super().__init__(dataset, batch_size, device, seed, image_size, flip, rank, world_size)
        self._plan: list[list] = []  # the (index, seed) pairs of each batch of an epoch, read in each epoch
        self._epochs = 0
        train, evaluate = train_transform(image_size, self.flip, augment), centre(shorter_side(image_size), image_size)
        if hasattr(dataset, "data"):
            sources: Any = torch.as_tensor(dataset.data).permute(0, 3, 1, 2)
        else:
            sources = [path for path, _ in dataset.samples]
        crops = Crops(sources, getattr(dataset, "exif", False), train, evaluate, image_size)
        self._loader = DataLoader(
            crops, batch_sampler=self._plan, num_workers=workers, collate_fn=crops.stack,
            # Python 3.14 would start each worker afresh: seconds and hundreds of MB
            multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
            pin_memory=self.targets.is_cuda, persistent_workers=workers > 0,
            generator=torch.Generator(),  # else it draws from the global one
        )  # fmt: skip

    def train_epoch(self, epoch: int, rates: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As InMemoryBatches.train_epoch; order and crops are drawn from (seed, epoch)."""
        generator, n = epoch_generator(self.seed, epoch), len(self.targets)
        order = sampled_order(n, generator, rates)
        seeds = torch.randint(2**62, (n,), generator=generator)
        return self._batches(order, seeds.tolist(), self.batch_size)

    def eval_epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches in order, resized and cropped in the middle."""
        n = len(self.targets)
        return self._batches(torch.arange(n), [None] * n, self.eval_batch_size)

    def _batches(self, order, seeds, batch_size):
        items, slices = list(zip(order.tolist(), seeds, strict=True)), self._slices(batch_size)
        targets = self.targets[order.to(self.targets.device)]  # one upload an epoch
        self._plan[:] = [items[batch] for batch in slices]
        self._epochs += 1
        this = self._epochs
        for batch, images in zip(slices, _read(self._loader), strict=True):
            yield self._normalised(images), targets[batch]
            if self._epochs != this:
                raise RuntimeError("another epoch of the same batches has started: make a second object of this class")


def _read(loader):
    """The loader's batches; what went wrong in a worker as a DataError."""
    try:
        for images in loader:
            if isinstance(images, DataError):
                raise images
            yield images
    except RuntimeError as error:
        if "DataLoader worker" not in str(error) or str(error).startswith("Caught "):  # raised by what a worker ran
            raise
        raise DataError(f"a process that reads images died: a smaller -j may help ({error})") from None


def decode(paths: Sequence[str], image_size: int, workers: int = 1) -> np.ndarray:
    """Every image resized to image_size x image_size, to be kept in memory: (N, image_size, image_size, 3) uint8.

    Args:
        workers: threads that decode.

    Raises:
        DataError: see `imbalance_folder.open_image`.
    """

    def one(path):
        image = functional.pil_to_tensor(open_image(path))
        return functional.resize(image, [image_size, image_size]).permute(1, 2, 0).numpy()

    images = np.empty((len(paths), image_size, image_size, 3), np.uint8)
    with ThreadPoolExecutor(max(1, workers)) as pool:  # Pillow decodes without holding the interpreter's lock
        for number, image in enumerate(pool.map(one, paths)):
            images[number] = image
    return images
