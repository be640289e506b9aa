"""Long-tailed CIFAR-10, CIFAR-100, and scikit-learn's handwritten digits (shipped with it, no download).

Only the training part is made long-tailed; `train=False` is the whole, balanced test set.
"""

import contextlib
import http.client
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torchvision
from PIL import Image
from torch.utils.data import Dataset

from files import folder_lock
from imbalance import InMemoryImages
from utils import DataError, network_timeout

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class IMBALANCECIFAR10(InMemoryImages, torchvision.datasets.CIFAR10):
    """CIFAR-10 (torchvision's, md5-checked) with a long-tailed training part.

    Args:
        root: folder that holds, or receives, the archive.
        imb_type, imb_factor, rand_number: see `imbalance.class_counts` and `imbalance.choose`.
        train: False: the whole test set, balanced.
        transform, target_transform, download: as torchvision's.

    Raises:
        UsageError: see `imbalance.class_counts`. RuntimeError: the data are missing or damaged.
    """

    mean, std, image_size = CIFAR_MEAN, CIFAR_STD, 32
    cls_num = 10

    def __init__(
        self, root: str | os.PathLike, imb_type: str = "exp", imb_factor: float = 0.01, rand_number: int = 0,
        train: bool = True, transform: Callable | None = None, target_transform: Callable | None = None,
        download: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(root, train, transform, target_transform, download)
        self.make_split(train, imb_type, imb_factor, rand_number)


class IMBALANCECIFAR100(IMBALANCECIFAR10, torchvision.datasets.CIFAR100):
    """CIFAR-100 with a long-tailed training part; see IMBALANCECIFAR10."""

    cls_num = 100


class IMBALANCEDIGITS(InMemoryImages, Dataset):
    """1,797 handwritten digits of 8 x 8 pixels as 32 x 32 x 3 uint8, 30 % of them (stratified, fixed) for testing.

    Arguments as IMBALANCECIFAR10, without `target_transform`; `root` and `download` are not used. Mean and std are
    CIFAR's.
    """

    mean, std, image_size = CIFAR_MEAN, CIFAR_STD, 32
    cls_num = 10
    flip = False  # a mirrored 2 is not a digit

    def __init__(
        self, root: str | os.PathLike | None = None, imb_type: str = "exp", imb_factor: float = 0.01,
        rand_number: int = 0, train: bool = True, transform: Callable | None = None, download: bool = False,
    ) -> None:  # fmt: skip
        self.root, self.train, self.transform = root, train, transform
        self.classes = [str(digit) for digit in range(10)]
        self.data, self.targets = _digits(train)
        self.make_split(train, imb_type, imb_factor, rand_number)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        image = Image.fromarray(self.data[index])
        return self.transform(image) if self.transform else image, self.targets[index]


def _digits(train):
    """One part of the digits: images (N, 32, 32, 3) uint8, a list of labels."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(np.arange(len(digits.target)), test_size=0.3, stratify=digits.target, random_state=0)
    indices = np.sort(parts[0] if train else parts[1])
    grey = np.round(digits.images[indices] * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in grey]
    return np.repeat(np.stack(large)[..., None], 3, axis=3), digits.target[indices].tolist()


DATASETS: dict[str, Any] = {"cifar10": IMBALANCECIFAR10, "cifar100": IMBALANCECIFAR100, "digits": IMBALANCEDIGITS}


def load(
    name: str, data_dir: str | os.PathLike, imb_type: str = "exp", imb_factor: float = 0.01, rand_number: int = 0
) -> tuple[InMemoryImages, InMemoryImages]:
    """(long-tailed training set, whole test set); downloads missing data, one process at a time.

    Args:
        name: a key of `DATASETS`.
        data_dir: folder that holds, or receives, the archive; not used for the digits.
        imb_type, imb_factor, rand_number: see `imbalance.class_counts` and `imbalance.choose`.

    Raises:
        UsageError: see `imbalance.class_counts`.
        DataError: data that are missing or damaged and cannot be downloaded.
    """
    dataset = DATASETS[name]
    try:
        with network_timeout(), contextlib.nullcontext() if name == "digits" else folder_lock(data_dir):
            train = dataset(data_dir, imb_type, imb_factor, rand_number, download=True)
            return train, dataset(data_dir, train=False, download=True)
    except (RuntimeError, OSError, EOFError, http.client.HTTPException) as error:
        if type(error) is RuntimeError and "corrupted" not in str(error):  # not torchvision's of a bad archive
            raise
        archive = getattr(dataset, "filename", "its files")
        raise DataError(
            f"no {name} in {data_dir}, or a damaged one, and it cannot be downloaded ({error}): put {archive} there, "
            "name another --data_dir, or try --dataset digits, which needs no download"
        ) from None
