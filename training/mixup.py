"""mixup (Zhang et al., ICLR 2018): each image is mixed with another one of its batch, and so is its target."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F


class Mixup:
    """Mixes the batches of a loader. A batch's share and its pairs come from (seed, epoch, the batch's number) alone.

    With several ranks each mixes its own part of a batch, so the pairs are not those of a single process.

    Args:
        batches: a loader, see `loaders.Batches`.
        alpha: of Beta(alpha, alpha), from which the share of the first image of a pair is drawn; 0: nothing is mixed.
        num_classes: K.
        seed: of the run.
    """

    def __init__(self, batches: Any, alpha: float, num_classes: int, seed: int) -> None:
        self.batches, self.alpha, self.num_classes, self.seed = batches, alpha, num_classes, seed

    def train_epoch(self, epoch: int, rates: torch.Tensor | None = None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The loader's (images (N, 3, H, W), labels (N,)), mixed, with soft targets (N, K); for alpha 0 unchanged."""
        batches = self.batches.train_epoch(epoch, rates)
        return self._mixed(batches, epoch) if self.alpha else batches

    def _mixed(self, batches, epoch):
        for number, (images, target) in enumerate(batches):
            generator = np.random.default_rng([self.seed, epoch, number])
            share = generator.beta(self.alpha, self.alpha)
            other = torch.from_numpy(generator.permutation(len(target))).to(target.device, non_blocking=True)
            soft = F.one_hot(target, self.num_classes).to(images.dtype)
            yield torch.lerp(images[other], images, share), torch.lerp(soft[other], soft, share)
