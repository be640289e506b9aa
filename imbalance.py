"""The long tail: how many images each class keeps, which ones, and what every data set says of itself.

Pure numpy: no torch, no files. Class 0 is the head, as published.
"""

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from utils import UsageError, warn

if TYPE_CHECKING:
    from typing_extensions import Self

#: name -> images of class k of K, from (n_max, k, K, imb_factor)
SHAPES: dict[str, Callable[[int, int, int, float], int]] = {
    "exp": lambda n_max, k, classes, factor: int(n_max * factor ** (k / max(classes - 1, 1))),
    "step": lambda n_max, k, classes, factor: n_max if k < (classes + 1) // 2 else int(n_max * factor),
}
IMB_TYPES = (*SHAPES, "none")

#: Thresholds of the many / medium / few groups, in training images of a class.
MANY_OVER, FEW_UNDER = 100, 20
GROUP_RULE = f"many: over {MANY_OVER} training images, medium: {FEW_UNDER} to {MANY_OVER}, few: under {FEW_UNDER}"


def class_counts(available: Sequence[int], imb_type: str = "exp", imb_factor: float = 0.01) -> list[int]:
    """Number of training images that each class keeps.

    `exp`: int(n_max * f ** (k / (K - 1))), `step`: n_max for the first half of the classes (an odd one
    included) and int(n_max * f) for the rest, `none`: everything. n_max is the size of the largest class;
    no class gets more than it has.

    Args:
        available: length-K sequence, images that each class has.
        imb_type: a key of `SHAPES`, or 'none'.
        imb_factor: f in (0, 1], smallest class over largest (the paper's 1 / rho).

    Returns:
        list of K ints, all at least 1.

    Raises:
        UsageError: unknown type, factor outside (0, 1], or a class that would be left empty.

    >>> class_counts([5000] * 10, "exp", 0.01)
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    >>> class_counts([100] * 5, "step", 0.1)
    [100, 100, 100, 10, 10]
    """
    available = [int(n) for n in available]
    if imb_type not in IMB_TYPES:
        raise UsageError(f"unknown imbalance type {imb_type!r}: choose from {', '.join(IMB_TYPES)}")
    if not 0 < imb_factor <= 1:
        raise UsageError(f"the imbalance factor must lie in (0, 1], got {imb_factor}")
    n_max, num_classes, wanted = max(available), len(available), available
    if imb_type != "none":
        wanted = [SHAPES[imb_type](n_max, k, num_classes, imb_factor) for k in range(num_classes)]
    counts = [min(n, m) for n, m in zip(wanted, available, strict=True)]
    empty = [k for k, n in enumerate(counts) if n < 1]
    if empty:
        raise UsageError(
            f"imbalance factor {imb_factor} leaves {len(empty)} of {num_classes} classes empty "
            f"(the first is class {empty[0]}; the largest class has {n_max} images)"
        )
    return counts


def choose(targets: npt.ArrayLike, counts: Sequence[int], rand_number: int = 0) -> np.ndarray:
    """Indices of the images that are kept, class after class.

    One RandomState(rand_number); classes in ascending order; each class's indices are shuffled and cut.
    numpy's global generator is never touched.

    Args:
        targets: (N,) ints in [0, K).
        counts: K ints, from `class_counts`.
        rand_number: seed of the choice.

    Returns:
        (sum(counts),) int64 array of indices into `targets`.
    """
    targets = np.asarray(targets, dtype=np.int64)
    generator = np.random.RandomState(rand_number)
    by_class = [np.where(targets == label)[0] for label in range(len(counts))]
    for indices in by_class:
        generator.shuffle(indices)
    return np.concatenate([indices[:count] for indices, count in zip(by_class, counts, strict=True)])


def hold_out(targets: npt.ArrayLike, fraction: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Split positions into a training and a stratified validation part.

    Each class with two or more images has at least one in each part; the only image of a class is a training image.

    Args:
        targets: (N,) ints.
        fraction: share of each class that is held out, in [0, 1), rounded, at least one image; 0 holds out nothing.
        seed: seed of the choice.

    Returns:
        (train, validation): two sorted int64 arrays that partition range(N).

    Raises:
        UsageError: a fraction outside [0, 1), or over 0 where no class has two images.
    """
    if not 0 <= fraction < 1:
        raise UsageError(f"the held-out fraction must lie in [0, 1), got {fraction}")
    targets = np.asarray(targets, dtype=np.int64)
    generator = np.random.RandomState(seed)
    held = []
    for label in np.unique(targets):
        indices = np.where(targets == label)[0]
        generator.shuffle(indices)
        size = max(round(len(indices) * fraction), 1) if fraction else 0
        held.append(indices[: min(size, len(indices) - 1)])
    validation = np.sort(np.concatenate(held))
    if fraction and not len(validation):
        raise UsageError("no class has two images, one to train on and one to hold out")
    return np.setdiff1d(np.arange(len(targets)), validation), validation


def groups(counts: Sequence[int]) -> dict[str, list[int]]:
    """Classes of the many, medium and few groups, as a dict of lists, by training images (see GROUP_RULE).

    >>> groups([101, 100, 20, 19])
    {'many': [0], 'medium': [1, 2], 'few': [3]}
    """
    split = {"many": [], "medium": [], "few": []}
    for label, count in enumerate(counts):
        name = "many" if count > MANY_OVER else "few" if count < FEW_UNDER else "medium"
        split[name].append(label)
    return split


def split_sha256(indices: npt.ArrayLike) -> str:
    """Hex sha256 of the chosen indices, in order, as little-endian int64."""
    return hashlib.sha256(np.asarray(indices).astype("<i8").tobytes()).hexdigest()


class LabelledImages:
    """What every data set here says of itself.

    Attributes:
        classes: K names. targets: N labels in [0, K). chosen: (N,) int64, indices into all images that there are.
        mean, std: of the three channels, in [0, 1] units. image_size: side of the square that a model sees.
        flip: whether a mirrored image still belongs to its class.
        tail: (imb_type, imb_factor, rand_number) of `make_imbalanced`; None: the imbalance is the data's own.
    """

    classes: list[str]
    targets: list[int]
    chosen: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    flip: bool = True
    tail: tuple[str, float, int] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def class_names(self) -> list[str]:
        """The names of the classes, as they are printed."""
        return self.classes

    def get_cls_num_list(self) -> list[int]:
        """Images of each class, K ints (the published name)."""
        return np.bincount(np.asarray(self.targets, dtype=np.int64), minlength=self.num_classes).tolist()

    def subset(self, positions: npt.ArrayLike) -> "Self":
        """The same data set with the images at these positions only."""
        part = copy.copy(self)
        part._keep(np.asarray(positions, dtype=np.int64))
        return part

    def hold_out(self, fraction: float, rand_number: int = 0) -> "tuple[Self, Self]":
        """(training part, held-out part) of the function `hold_out`; its seed is not the run's. Raises UsageError."""
        kept, held = hold_out(self.targets, fraction, rand_number)
        return self.subset(kept), self.subset(held)

    def make_imbalanced(self, imb_type: str, imb_factor: float, rand_number: int) -> None:
        """Keep a long-tailed choice, in place; see `class_counts` and `choose`. Raises UsageError.

        Where a class has a tenth less than the imbalance asks for, a warning gives the ratio that there is.
        """
        available = self.get_cls_num_list()
        counts = class_counts(available, imb_type, imb_factor)
        if imb_type != "none":
            wanted = class_counts([max(available)] * len(available), imb_type, imb_factor)
            short = [k for k, (n, m) in enumerate(zip(wanted, counts, strict=True)) if m < 0.9 * n]
            if short:
                warn(
                    f"{len(short)} of {len(counts)} classes have fewer images than the imbalance asks for (class "
                    f"{short[0]}: {counts[short[0]]} of {wanted[short[0]]}); the largest class has "
                    f"{max(counts) / min(counts):.3g} times the images of the smallest"
                )
        self._keep(choose(self.targets, counts, rand_number))
        self.tail = (imb_type, imb_factor, rand_number)

    def left_out(self, limit: int) -> "Self":
        """Up to `limit` images of each class that `make_imbalanced` left out, read again from `root`.

        Raises:
            UsageError: an imbalance that is the data's own, or that leaves out no image.
        """
        imb_type, imb_factor, rand_number = self.tail or ("none", 1.0, 0)
        if imb_type == "none":
            raise UsageError("no image was left out: the imbalance is the data's own (another --imb_type makes one)")
        # class after class, each in the order of the choice: what is kept comes first
        whole = type(self)(self.root, "none", rand_number=rand_number)  # type: ignore[attr-defined, call-arg]
        available = whole.get_cls_num_list()
        by_class = np.split(np.arange(len(whole.targets)), np.cumsum(available)[:-1])
        counts = class_counts(available, imb_type, imb_factor)
        spare = [indices[n : n + limit] for indices, n in zip(by_class, counts, strict=True)]
        part = whole.subset(np.concatenate(spare))
        if not part.targets:
            raise UsageError(f"no image was left out: --imb_factor {imb_factor} keeps all")
        return part

    def _keep(self, positions):
        self.chosen = self.chosen[positions]
        self.targets = [self.targets[i] for i in positions]


class InMemoryImages(LabelledImages):
    """Images in memory: `data` (N, H, W, 3) uint8; `cls_num` is the number of classes (the published name)."""

    cls_num: int
    data: np.ndarray

    def make_split(self, train: bool, imb_type: str, imb_factor: float, rand_number: int) -> None:
        """Make the training part long-tailed, in place; the test part stays whole. Raises UsageError."""
        self.chosen = np.arange(len(self.targets))
        if train:
            self.make_imbalanced(imb_type, imb_factor, rand_number)

    def _keep(self, positions):
        super()._keep(positions)
        self.data = self.data[positions]
