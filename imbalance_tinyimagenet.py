"""Tiny ImageNet with a long-tailed training part.

    python imbalance_tinyimagenet.py --data_dir data
    python imbalance_tinyimagenet.py --data_dir data --zip tiny-imagenet-200.zip

The commands put the archive in order (see prepare_tinyimagenet.py).
"""

import collections
import os
from collections.abc import Callable

import numpy as np
from torchvision.datasets import ImageFolder

import prepare_tinyimagenet
from imbalance import LabelledImages
from imbalance_folder import IMAGENET_MEAN, IMAGENET_STD
from utils import DataError, UsageError

CLASSES = 200


class TINYIMAGENET(LabelledImages, ImageFolder):
    """One whole part of Tiny ImageNet: `root` holds a folder for each class.

    `.samples`, `.imgs` and `.targets` agree; `.chosen` are indices into `.available`, all that ImageFolder found;
    `.cls_num` is the number of classes; `.class_names` are words.txt's, where it is there.

    Raises:
        DataError: a part that is not arranged by class. FileNotFoundError: no folder, or a class without images.
    """

    mean, std, image_size = IMAGENET_MEAN, IMAGENET_STD, 64
    cls_num = CLASSES

    def __init__(
        self, root: str | os.PathLike, transform: Callable | None = None, target_transform: Callable | None = None
    ) -> None:
        if os.path.isdir(os.path.join(root, "images")):
            raise DataError(
                f"{root} is as the archive has it, not by class: run python imbalance_tinyimagenet.py "
                f"--data_dir {os.path.dirname(os.path.dirname(os.path.abspath(root)))} once"
            )
        super().__init__(root, transform, target_transform)
        self.cls_num = len(self.classes)
        self.available = self.samples
        self.chosen = np.arange(len(self.samples))

    @property
    def class_names(self) -> list[str]:
        """The first name of each class in words.txt beside the part, with the wnid where two share it; or the wnids."""
        words = os.path.join(os.path.dirname(os.path.abspath(self.root)), "words.txt")
        try:
            with open(words, encoding="utf-8", errors="replace") as file:
                names = dict(line.rstrip("\n").split("\t", 1) for line in file if "\t" in line)
        except OSError:
            names = {}
        found = [names.get(wnid, wnid).split(",")[0] for wnid in self.classes]
        many = {name for name, count in collections.Counter(found).items() if count > 1}
        return [f"{name} ({wnid})" if name in many else name for wnid, name in zip(self.classes, found, strict=True)]

    def _keep(self, positions):
        super()._keep(positions)
        self.samples = self.imgs = [self.available[i] for i in self.chosen]


class IMBALANETINYIMGNET(TINYIMAGENET):  # the published spelling
    """The training part of Tiny ImageNet, long-tailed.

    Args:
        root: .../tiny-imagenet-200/train, or the folder above it.
        imb_type, imb_factor, rand_number: see `imbalance.class_counts` and `imbalance.choose`.
        transform, target_transform: as torchvision's ImageFolder.

    Raises:
        ValueError: see `imbalance.class_counts`. The rest: see TINYIMAGENET.
    """

    def __init__(
        self, root: str | os.PathLike, imb_type: str = "exp", imb_factor: float = 0.01, rand_number: int = 0,
        transform: Callable | None = None, target_transform: Callable | None = None,
    ) -> None:  # fmt: skip
        train = os.path.join(root, "train")
        super().__init__(train if os.path.isdir(train) else root, transform, target_transform)
        self.make_imbalanced(imb_type, imb_factor, rand_number)


IMBALANCETINYIMAGENET = IMBALANETINYIMGNET


def load(
    data_dir: str, imb_type: str = "exp", imb_factor: float = 0.01, rand_number: int = 0
) -> tuple[TINYIMAGENET, TINYIMAGENET]:
    """(training set, test set), as file names; the archive is downloaded and put in order where it is not yet.

    Raises:
        UsageError: an imbalance that cannot be, see `imbalance.class_counts`. DataError: missing or damaged data.
    """
    folder, _ = prepare_tinyimagenet.arrange(data_dir)
    try:
        train = IMBALANETINYIMGNET(os.path.join(folder, "train"), imb_type, imb_factor, rand_number)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if train.num_classes != CLASSES:
        raise DataError(f"{folder} has {train.num_classes} classes, Tiny ImageNet has {CLASSES}")
    return train, TINYIMAGENET(os.path.join(folder, "val"))


if __name__ == "__main__":
    prepare_tinyimagenet.main()
