"""uint8 images in memory -> augmented, normalised batches on the device."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from loaders import Batches, sampled_order
from loaders.augment import AUGMENTS, seeded
from utils import epoch_generator

#: On CUDA images are evaluated so many pixels at a time (4096 of 32 x 32), or by the training batch if that is larger.
EVALUATION_PIXELS = 2**22


class InMemoryBatches(Batches):
    """A data set held as one uint8 tensor on the device, cropped from a padded image and flipped for training.

    Args:
        dataset: with `data`, (N, side, side, 3) uint8.
        padding: zero pixels around an image before the random crop back to H x W.
        augment: a name in `loaders.augment.AUGMENTS`. All but 'none' are made image by image on the host.
        The others: see `loaders.Batches`.

    Raises:
        ValueError: data of another shape or type.
    """

    def __init__(
        self, dataset: Any, batch_size: int, device: torch.device | str = "cpu", seed: int = 0, padding: int = 4,
        flip: bool | None = None, augment: str = "none", rank: int = 0, world_size: int = 1,
    ) -> None:  # fmt: skip
        images = torch.as_tensor(dataset.data)
        width = images.shape[1]
        if images.dtype != torch.uint8 or images.shape[1:] != (width, width, 3):
            raise ValueError(f"data must be (N, side, side, 3) uint8, got {tuple(images.shape)} {images.dtype}")
        super().__init__(dataset, batch_size, device, seed, width, flip, rank, world_size)
        if self.targets.is_cuda:
            self.eval_batch_size = max(batch_size, EVALUATION_PIXELS // width**2)
        self.padding, self.augment, self.draws_on_host = padding, AUGMENTS[augment].make(width), augment != "none"
        self.images = images.to("cpu" if self.draws_on_host else device)

    def train_epoch(self, epoch: int, rates: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Augmented batches: images (B, 3, H, W) float32 in channels-last layout, targets (B,).

        Args:
            epoch: with the seed, all that the draws depend on.
            rates: (N,) float64 weights: draw N images with replacement, in proportion; None: a shuffle.

        Returns:
            A TrainEpoch, which a CUDA graph can hold; with `augment` a plain iterator.
        """
        generator, n = epoch_generator(self.seed, epoch), len(self.targets)
        slices = self._slices(self.batch_size)

        def mine(draws):  # this rank's, batch after batch
            return torch.cat([draws[batch] for batch in slices])

        order = sampled_order(n, generator, rates)
        offsets = torch.randint(0, 2 * self.padding + 1, (n, 2), generator=generator)
        flips = (torch.rand(n, generator=generator) < 0.5) & self.flip
        batches = TrainEpoch(self, [part.stop - part.start for part in slices], mine(order), mine(offsets), mine(flips))
        if not self.draws_on_host:
            return batches
        return self._augmented(batches, mine(torch.randint(2**62, (n,), generator=generator)).tolist())

    def _augmented(self, batches, seeds):
        """The batches, each image augmented with a seed of its own."""
        for size in batches.sizes:
            images, targets = batches.crops(size)
            for image, seed in zip(images, seeds[:size], strict=True):
                image.copy_(seeded(self.augment, image.permute(2, 0, 1), seed).permute(1, 2, 0))
            seeds = seeds[size:]
            yield self._normalised(images), targets

    def eval_epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches in order, not augmented."""
        for batch in self._slices(self.eval_batch_size):
            yield self._normalised(self.images[batch]), self.targets[batch]


class TrainEpoch(Iterator[tuple[torch.Tensor, torch.Tensor]]):
    """This rank's batches of an epoch, see `InMemoryBatches.train_epoch`.

    Which images come next is written on the device, in `places`, and `take` moves it on there. So the host hands over
    nothing that changes from batch to batch, and a CUDA graph can hold `take` and the step after it.

    Args:
        source: whose images they are.
        sizes: of the batches; the attribute has those that iterating has not made yet.
        order: (N,) images, batch after batch.
        offsets, flips: (N, 2) and (N,), see `crop_and_flip`.
    """

    def __init__(
        self, source: InMemoryBatches, sizes: Sequence[int], order: torch.Tensor, offsets: torch.Tensor,
        flips: torch.Tensor,
    ) -> None:  # fmt: skip
        device = source.images.device
        self.source, self.sizes = source, iter(sizes)
        self.order, self.offsets, self.flips = order.to(device), offsets.to(device), flips.to(device)
        self.places = torch.arange(max(sizes), device=device)  # of the next batch, in `order`

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.take(next(self.sizes))

    def take_draws(self, other: "TrainEpoch") -> None:
        """Become the epoch `other` of the same source, which nobody has iterated yet, in this epoch's memory."""
        self.sizes = other.sizes
        for name in ("order", "offsets", "flips", "places"):
            getattr(self, name).copy_(getattr(other, name))

    def take(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next `size` images and their targets."""
        images, targets = self.crops(size)
        return self.source._normalised(images), targets

    def crops(self, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The next `size` images as (size, H, W, 3) uint8, cropped and flipped, and their targets."""
        source, places = self.source, self.places[:size]
        chosen = self.order[places]
        images = crop_and_flip(source.images[chosen], self.offsets[places], self.flips[places], source.padding)
        self.places += size
        # with `augment` the order is on the host, and an index from there would wait for the device
        return images, source.targets[chosen.to(source.targets.device, non_blocking=True)]


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
