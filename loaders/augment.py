"""What is done to one image, composed of torchvision.transforms.v2 on (3, H, W) uint8 tensors.

Another augmentation is an entry of `AUGMENTS`. What it draws from torch's random state comes from the image's own seed.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torchvision.transforms import v2

Image = torch.Tensor
Transform = Callable[[Image], Image]


class Augment(NamedTuple):
    """An augmentation.

    Attributes:
        make: function from the side of the images in pixels to the transform, which keeps shape and dtype.
        help: the text for --help.
    """

    make: Callable[[int], Transform]
    help: str


def _autoaugment(size):
    return v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10 if size < 96 else v2.AutoAugmentPolicy.IMAGENET)


#: Applied to training images after crop and flip. In `InMemoryBatches` all but 'none' run on the CPU.
AUGMENTS = {
    "none": Augment(lambda size: v2.Identity(), "crop and flip only, as published"),
    "randaugment": Augment(lambda size: v2.RandAugment(), "2 random operations of magnitude 9"),
    "autoaugment": Augment(
        _autoaugment, "the policy learned on CIFAR-10, or on ImageNet for images of 96 pixels or more"
    ),
    "trivialaugment": Augment(lambda size: v2.TrivialAugmentWide(), "1 random operation of random magnitude"),
    "verticalflip": Augment(lambda size: v2.RandomVerticalFlip(), "half of the images upside down"),
}


def middle_of_strip(image: Image) -> Image:
    """The middle of an image over 32 times as long as wide, the image otherwise: resized, the whole could take GBs."""
    height, width = image.shape[-2:]
    longest = 32 * min(height, width)
    longest += (max(height, width) - longest) % 2  # the same middle
    return v2.functional.center_crop(image, [min(height, longest), min(width, longest)])


def train_transform(image_size: int, flip: bool = True, augment: str = "none") -> Transform:
    """Crop, flip and augmentation of a training image: (3, H, W) uint8 to (3, image_size, image_size) uint8.

    Args:
        image_size: side of the square that the model sees.
        flip: mirror half of the images; drawn in any case, so that the other draws stay the same.
        augment: a name in `AUGMENTS`.
    """
    steps = [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(0.5 if flip else 0)]
    return v2.Compose([*steps, AUGMENTS[augment].make(image_size)])


def shorter_side(size: int) -> int:
    """What the shorter side of a test image is resized to before its central crop of `size` pixels: 256 for 224."""
    return round(size * 256 / 224)


def centre(resize: int, size: int) -> Transform:
    """The centre, `size` pixels wide and high, of an image resized to a shorter side of `resize` pixels."""
    return v2.Compose([middle_of_strip, v2.Resize(resize), v2.CenterCrop(size)])


def seeded(transform: Transform, image: Image, seed: int) -> Image:
    """The transformed image; what the transform draws comes from `seed`, and torch's random state stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # the CPU's alone; torch.manual_seed would set CUDA's too
        return transform(image)
