"""uint8 images in memory -> augmented, normalised batches on the device."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from loaders import Batches, sampled_order
from loaders.transforms import crop_and_flip, normalise
from utils import epoch_generator


class InMemoryBatches(Batches):
    """A data set held as one uint8 tensor on the device, cropped from a padded image and flipped for training.

    Args:
        dataset: with `data`, (N, H, W, 3) uint8; of one image size.
        padding: zero pixels around an image before the random crop back to H x W.
        The others: see `loaders.Batches`.
    """

    def __init__(
        self, dataset: Any, batch_size: int, device: torch.device | str = "cpu", seed: int = 0, padding: int = 4,
        flip: bool | None = None,
    ) -> None:  # fmt: skip
        super().__init__(dataset, batch_size, device, seed, flip)
        self.images, self.padding = torch.as_tensor(dataset.data).to(device), padding
        width = self.images.shape[2]
        self.mean = torch.tensor(dataset.mean, device=device).repeat(width)
        self.std = torch.tensor(dataset.std, device=device).repeat(width)

    def train_epoch(self, epoch: int, rates: torch.Tensor | None = None) -> "TrainEpoch":
        """Augmented batches: images (B, 3, H, W) float32 in channels-last layout, targets (B,).

        Args:
            epoch: with the seed, all that the draws depend on.
            rates: (N,) float64 weights: draw N images with replacement, in proportion; None: a shuffle.
        """
        generator, n = epoch_generator(self.seed, epoch), len(self.targets)
        order = sampled_order(n, generator, rates)
        offsets = torch.randint(0, 2 * self.padding + 1, (n, 2), generator=generator)
        flips = (torch.rand(n, generator=generator) < 0.5) & self.flip
        slices = list(self._slices())  # this rank's draws, batch after batch
        mine = (torch.cat([draws[batch] for batch in slices]) for draws in (order, offsets, flips))
        return TrainEpoch(self, [batch.stop - batch.start for batch in slices], *mine)

    def eval_epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches in order, not augmented."""
        for batch in self._slices():
            yield normalise(self.images[batch], self.mean, self.std), self.targets[batch]


class TrainEpoch(Iterator[tuple[torch.Tensor, torch.Tensor]]):
    """This rank's batches of an epoch, see `InMemoryBatches.train_epoch`.

    Which images come next is written on the device, in `places`, and `take` moves it on there. So the host hands over
    nothing that changes from batch to batch, and a CUDA graph can hold `take` and the step after it.

    Args:
        source: whose images they are.
        sizes: of the batches; the attribute has those that iterating has not made yet.
        order: (N,) images, batch after batch.
        offsets, flips: (N, 2) and (N,), see `transforms.crop_and_flip`.
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
        source, places = self.source, self.places[:size]
        chosen = self.order[places]
        images = crop_and_flip(source.images[chosen], self.offsets[places], self.flips[places], source.padding)
        self.places += size
        return normalise(images, source.mean, source.std), source.targets[chosen]
