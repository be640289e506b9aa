"""Images to batches.

Everything that an epoch draws comes from one CPU generator seeded by (seed, epoch), so an epoch is the same whatever
came before it, and whatever the device, the number of ranks and of workers.
"""

from collections.abc import Iterator

import torch

from imbalance import LabelledImages


class Batches:
    """Base class of the loaders. A subclass has `train_epoch(epoch, rates)` and `eval_epoch()`.

    Both give (images, targets): images (B, 3, H, W) float32, normalized, in channels-last layout; targets (B,) int64.

    Args:
        dataset: has targets, mean, std and flip.
        batch_size: images of all ranks together; the last batch may be smaller.
        device: the device of the batches.
        seed: the run's seed.
        image_size: width of the images in a batch, in pixels.
        flip: flip half of the training images left to right; None: as the data set says. Flips are drawn in any case,
            so that the other random draws stay the same.
        rank, world_size: each batch is divided among `world_size` ranks; this is the loader of rank `rank`.
    """

    def __init__(
        self, dataset: LabelledImages, batch_size: int, device: torch.device | str, seed: int, image_size: int,
        flip: bool | None, rank: int, world_size: int,
    ) -> None:  # fmt: skip
        self.targets = torch.as_tensor(dataset.targets, dtype=torch.int64).to(device)  # (N,)
        self.batch_size, self.eval_batch_size, self.image_size = batch_size, batch_size, image_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.flip = dataset.flip if flip is None else flip
        self.mean = torch.tensor(dataset.mean, device=device).repeat(image_size)
        self.std = torch.tensor(dataset.std, device=device).repeat(image_size)

    def __len__(self) -> int:
        """Batches of an epoch."""
        return -(-len(self.targets) // self.batch_size)

    def _slices(self, batch_size):
        return list(batch_slices(len(self.targets), batch_size, self.rank, self.world_size))

    def _normalised(self, images):
        """(B, H, W, 3) uint8, on the device or not yet, as the model takes them."""
        return normalise(images.to(self.mean.device, non_blocking=True), self.mean, self.std)


def batch_slices(n: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[slice]:
    """This rank's slice of each batch of range(n).

    The ranks' slices follow one another; the first ones are larger by one where a batch cannot be divided evenly, the
    last ones empty where it has fewer images than there are ranks.

    >>> list(batch_slices(5, 3, rank=1, world_size=2))
    [slice(2, 3, None), slice(4, 5, None)]
    """
    for start in range(0, n, batch_size):
        share, over = divmod(min(batch_size, n - start), world_size)
        first = start + rank * share + min(rank, over)
        yield slice(first, first + share + (rank < over))


def sampled_order(n: int, generator: torch.Generator, rates: torch.Tensor | None = None) -> torch.Tensor:
    """The images of an epoch, (n,) int64: a shuffle, or draws with replacement in proportion to (n,) float64 rates."""
    if rates is None:
        return torch.randperm(n, generator=generator)
    return torch.multinomial(rates, n, replacement=True, generator=generator)


def normalise(images: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in channels-last layout, as ToTensor and Normalize do.

    mean, std: of the channels, repeated for each pixel of a row, so that the inner loop is long.
    """
    rows = images.flatten(2).float()
    return rows.div_(255).sub_(mean).div_(std).view(images.shape).permute(0, 3, 1, 2)
