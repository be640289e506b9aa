"""uint8 images in memory -> augmented, normalised batches on the device."""

from collections.abc import Iterator
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

    def train_epoch(self, epoch: int, rates: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Augmented batches: images (B, 3, H, W) float32 in channels-last layout, targets (B,).

        Args:
            epoch: with the seed, all that the draws depend on.
            rates: (N,) float64 weights: draw N images with replacement, in proportion; None: a shuffle.
        """
        generator, n, device = epoch_generator(self.seed, epoch), len(self.targets), self.images.device
        order = sampled_order(n, generator, rates)
        offsets = torch.randint(0, 2 * self.padding + 1, (n, 2), generator=generator)
        flips = (torch.rand(n, generator=generator) < 0.5) & self.flip
        order, offsets, flips = order.to(device), offsets.to(device), flips.to(device)
        for batch in self._slices():
            images = crop_and_flip(self.images[order[batch]], offsets[batch], flips[batch], self.padding)
            yield normalise(images, self.mean, self.std), self.targets[order[batch]]

    def eval_epoch(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The batches in order, not augmented."""
        for batch in self._slices():
            yield normalise(self.images[batch], self.mean, self.std), self.targets[batch]
