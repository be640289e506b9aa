"""Any pictures on disk: a folder for each class, with the imbalance that they have, or made long-tailed."""

import dataclasses
import os

import numpy as np

from imbalance import choose, class_counts, count_classes
from utils import DataError, UsageError, one_line


@dataclasses.dataclass
class PictureSet:
    """Picture files and their classes; `chosen` are indices into all that the data set has."""

    paths: list
    targets: list
    classes: list
    chosen: np.ndarray

    @classmethod
    def whole(cls, paths, targets, classes):
        return cls(list(paths), list(targets), list(classes), np.arange(len(paths)))

    @property
    def samples(self):
        """(path, class) of each picture, as ImageFolder has them."""
        return list(zip(self.paths, self.targets, strict=True))

    def subset(self, positions):
        """The pictures at these positions."""
        return PictureSet(
            [self.paths[i] for i in positions],
            [self.targets[i] for i in positions],
            self.classes,
            self.chosen[positions],
        )

    def long_tailed(self, imb_type, imb_factor, rand_number):
        """The imbalance of `imbalance.class_counts`; 'none' leaves the one that the data have.

        Raises:
            UsageError: see `imbalance.class_counts`.
        """
        if imb_type == "none":
            return self
        available = count_classes(self.targets, len(self.classes))
        try:
            counts = class_counts(available, imb_type, imb_factor)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return self.subset(choose(self.targets, counts, rand_number))


def read_folder(folder):
    """The PictureSet of a folder with one folder for each class. Raises DataError."""
    from torchvision.datasets import ImageFolder

    if not os.path.isdir(folder):
        raise DataError(f"no folder {folder}")
    try:
        found = ImageFolder(folder)
    except FileNotFoundError as error:  # no class, or classes without a picture, which it names
        raise DataError(str(error)) from None
    paths, targets = zip(*found.samples, strict=True)
    return PictureSet.whole(paths, targets, found.classes)


def named(names, limit=5):
    """The first few names, safe to print, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(one_line(name) for name in names[:limit]) + more
