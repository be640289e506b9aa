"""uint8 images in memory -> augmented, normalised batches on the device.

Everything that an epoch draws (order, crop offsets, flips) comes from one generator seeded by (seed, epoch)
on the CPU, so an epoch is the same whatever came before it and whatever the device.
"""

import torch
from torch.nn import functional as F

from training import distributed
from utils import epoch_generator


class TensorBatches:
    """A data set held as one uint8 tensor on the device, dealt out in batches; of each batch a rank gets its part.

    Args:
        images: (N, H, W, 3) uint8 array or tensor.
        targets: (N,) ints.
        batch_size: the last batch may be smaller.
        mean, std: of the three channels, in [0, 1] units.
        device: where batches are made.
        padding: zero pixels around an image before the random crop back to H x W.
        seed: of the run.
    """

    def __init__(self, images, targets, batch_size, mean, std, device="cpu", padding=4, seed=0):
        self.images = torch.as_tensor(images).to(device)
        self.targets = torch.as_tensor(targets, dtype=torch.int64).to(device)
        self.batch_size, self.padding, self.seed = batch_size, padding, seed
        width = self.images.shape[2]
        self.mean = torch.tensor(mean, device=device).repeat(width)
        self.std = torch.tensor(std, device=device).repeat(width)

    def __len__(self):
        return -(-len(self.targets) // self.batch_size)

    def train_epoch(self, epoch, rates=None):
        """Augmented batches (images, targets) of one epoch.

        Args:
            epoch: with the seed, all that the draws depend on.
            rates: (N,) float64 weights: draw N images with replacement, in proportion (Resample);
                None: a shuffle.
        """
        generator = epoch_generator(self.seed, epoch)
        n, device = len(self.targets), self.images.device
        order = sample(rates, generator) if rates is not None else torch.randperm(n, generator=generator)
        offsets = torch.randint(0, 2 * self.padding + 1, (n, 2), generator=generator)
        flips = torch.rand(n, generator=generator) < 0.5
        order, offsets, flips = order.to(device), offsets.to(device), flips.to(device)
        for batch in parts(n, self.batch_size):
            images = crop_and_flip(self.images[order[batch]], offsets[batch], flips[batch], self.padding)
            yield normalise(images, self.mean, self.std), self.targets[order[batch]]

    def eval_epoch(self):
        """The batches in order, not augmented."""
        for batch in parts(len(self.targets), self.batch_size):
            yield normalise(self.images[batch], self.mean, self.std), self.targets[batch]


def parts(n, batch_size):
    """This rank's part of each batch of [0, n), as slices."""
    for start in range(0, n, batch_size):
        yield slice(*distributed.part(start, min(start + batch_size, n)))


def normalise(images, mean, std):
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32 in channels-last layout, as ToTensor and Normalize do.

    mean, std: of the channels, repeated for each pixel of a row, so that the inner loop is long.
    """
    rows = images.flatten(2).float()
    return rows.div_(255).sub_(mean).div_(std).view(images.shape).permute(0, 3, 1, 2)


def crop_and_flip(images, offsets, flips, padding):
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
    first_row = torch.arange(batch, device=images.device)[:, None] * padded.shape[1]
    pixels = (first_row + rows)[:, :, None] * padded.shape[2] + columns[:, None, :]
    return padded.view(-1, channels).index_select(0, pixels.view(-1)).view(images.shape)


def sample(rates, generator):
    """As many indices as there are rates, drawn with replacement in proportion to them (float64)."""
    return torch.multinomial(rates, len(rates), replacement=True, generator=generator)
