"""Long-tailed CIFAR-10, CIFAR-100, and scikit-learn's handwritten digits (shipped with it, no download).

Only the training part is made long-tailed; `train=False` is the whole, balanced test set.
"""

from typing import Any

import numpy as np
import torchvision
from torch.utils.data import Dataset

import imbalance

CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


class _LongTailed:
    """Keeps a long-tailed choice of `.data` and `.targets`; `.chosen` are the indices of it."""

    cls_num = 10

    def _make_imbalanced(self, imb_type, imb_factor, rand_number):
        available = imbalance.count_classes(self.targets, self.cls_num)
        counts = imbalance.class_counts(available, imb_type, imb_factor)
        self._keep(imbalance.choose(self.targets, counts, rand_number))

    def _keep(self, indices):
        self.chosen = indices
        self.data = self.data[indices]
        self.targets = np.asarray(self.targets)[indices].tolist()

    def get_cls_num_list(self):
        """Images of each class, K ints."""
        return imbalance.count_classes(self.targets, self.cls_num)


class IMBALANCECIFAR10(_LongTailed, torchvision.datasets.CIFAR10):
    """CIFAR-10 (torchvision's, md5-checked) with a long-tailed training part.

    Args:
        root: folder that holds, or receives, the archive.
        imb_type, imb_factor, rand_number: see `imbalance.class_counts` and `imbalance.choose`.
        train: False: the whole test set, balanced.
        transform, target_transform, download: as torchvision's.

    Raises:
        ValueError: see `imbalance.class_counts`. RuntimeError: no data, or damaged.
    """

    cls_num = 10

    def __init__(
        self, root, imb_type="exp", imb_factor=0.01, rand_number=0, train=True,
        transform=None, target_transform=None, download=False,
    ):  # fmt: skip
        super().__init__(root, train, transform, target_transform, download)
        if train:
            self._make_imbalanced(imb_type, imb_factor, rand_number)
        else:
            self.chosen = np.arange(len(self.targets))


class IMBALANCECIFAR100(IMBALANCECIFAR10):
    """CIFAR-100 with a long-tailed training part; see IMBALANCECIFAR10."""

    cls_num = 100
    base_folder = torchvision.datasets.CIFAR100.base_folder
    url = torchvision.datasets.CIFAR100.url
    filename = torchvision.datasets.CIFAR100.filename
    tgz_md5 = torchvision.datasets.CIFAR100.tgz_md5
    train_list = torchvision.datasets.CIFAR100.train_list
    test_list = torchvision.datasets.CIFAR100.test_list
    meta = torchvision.datasets.CIFAR100.meta


class IMBALANCEDIGITS(_LongTailed, Dataset):
    """1,797 handwritten digits of 8 x 8 pixels as 32 x 32 x 3 uint8, 30 % of them (stratified, fixed) for testing.

    Arguments as IMBALANCECIFAR10; `root` and `download` are not used.
    """

    cls_num = 10
    TEST_SHARE, SPLIT_SEED = 0.3, 0

    def __init__(
        self, root=None, imb_type="exp", imb_factor=0.01, rand_number=0, train=True,
        transform=None, target_transform=None, download=False,
    ):  # fmt: skip
        self.root, self.train = root, train
        self.transform, self.target_transform = transform, target_transform
        self.classes = [str(digit) for digit in range(10)]
        self.data, self.targets = _digits(train, self.TEST_SHARE, self.SPLIT_SEED)
        if train:
            self._make_imbalanced(imb_type, imb_factor, rand_number)
        else:
            self.chosen = np.arange(len(self.targets))

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        from PIL import Image

        image, target = Image.fromarray(self.data[index]), self.targets[index]
        image = self.transform(image) if self.transform else image
        return image, self.target_transform(target) if self.target_transform else target


def _digits(train, test_share, seed):
    """One part of the digits: images (N, 32, 32, 3) uint8, a list of labels."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    parts = train_test_split(
        np.arange(len(digits.target)), test_size=test_share, stratify=digits.target, random_state=seed
    )
    indices = np.sort(parts[0] if train else parts[1])
    grey = np.round(digits.images[indices] * (255 / 16)).astype(np.uint8)
    large = [np.asarray(Image.fromarray(image).resize((32, 32), Image.Resampling.BILINEAR)) for image in grey]
    return np.repeat(np.stack(large)[..., None], 3, axis=3), digits.target[indices].tolist()


DATASETS: dict[str, Any] = {"cifar10": IMBALANCECIFAR10, "cifar100": IMBALANCECIFAR100, "digits": IMBALANCEDIGITS}
