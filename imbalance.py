"""The long tail itself: how many images each class keeps, and which ones.

Pure numpy: no torch, no files. Class 0 is the head, as published.
"""

import hashlib

import numpy as np

IMB_TYPES = ("exp", "step", "none")

#: Thresholds of the many / medium / few groups, in training images of a class.
MANY_OVER, FEW_UNDER = 100, 20
GROUP_RULE = f"many: over {MANY_OVER} training images, medium: {FEW_UNDER} to {MANY_OVER}, few: under {FEW_UNDER}"


def class_counts(available, imb_type="exp", imb_factor=0.01):
    """Number of training images that each class keeps.

    `exp`: int(n_max * f ** (k / (K - 1))), `step`: n_max for the first half of the classes (an odd one
    included) and int(n_max * f) for the rest, `none`: everything. n_max is the size of the largest class;
    no class gets more than it has.

    Args:
        available: length-K sequence, images that each class has.
        imb_type: 'exp', 'step' or 'none'.
        imb_factor: f in (0, 1], smallest class over largest (the paper's 1 / rho).

    Returns:
        list of K ints, all at least 1.

    Raises:
        ValueError: unknown type, factor outside (0, 1], or a class that would be left empty.

    >>> class_counts([5000] * 10, "exp", 0.01)
    [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    >>> class_counts([100] * 5, "step", 0.1)
    [100, 100, 100, 10, 10]
    """
    available = [int(n) for n in available]
    if imb_type not in IMB_TYPES:
        raise ValueError(f"unknown imbalance type {imb_type!r}: choose from {', '.join(IMB_TYPES)}")
    if not 0 < imb_factor <= 1:
        raise ValueError(f"the imbalance factor must lie in (0, 1], got {imb_factor}")
    n_max, num_classes = max(available), len(available)
    if imb_type == "exp":
        wanted = [int(n_max * imb_factor ** (k / max(num_classes - 1, 1))) for k in range(num_classes)]
    elif imb_type == "step":
        head = (num_classes + 1) // 2
        wanted = [n_max] * head + [int(n_max * imb_factor)] * (num_classes - head)
    else:
        wanted = available
    counts = [min(n, m) for n, m in zip(wanted, available, strict=True)]
    empty = [k for k, n in enumerate(counts) if n < 1]
    if empty:
        raise ValueError(
            f"imbalance factor {imb_factor} leaves {len(empty)} of {num_classes} classes empty "
            f"(the first is class {empty[0]}; the largest class has {n_max} images)"
        )
    return counts


def choose(targets, counts, rand_number=0):
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
    chosen = []
    for label, count in enumerate(counts):
        indices = np.where(targets == label)[0]
        generator.shuffle(indices)
        chosen.append(indices[:count])
    return np.concatenate(chosen)


def hold_out(targets, fraction, seed=0):
    """Split positions into a training and a stratified validation part; every class keeps a training image.

    Args:
        targets: (N,) ints.
        fraction: share of each class that is held out, in [0, 1).
        seed: seed of the choice.

    Returns:
        (train, validation): two sorted int64 arrays that partition range(N).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"the held-out fraction must lie in [0, 1), got {fraction}")
    targets = np.asarray(targets, dtype=np.int64)
    generator = np.random.RandomState(seed)
    held = []
    for label in np.unique(targets):
        indices = np.where(targets == label)[0]
        generator.shuffle(indices)
        held.append(indices[: min(round(len(indices) * fraction), len(indices) - 1)])
    validation = np.sort(np.concatenate(held))
    return np.setdiff1d(np.arange(len(targets)), validation), validation


def count_classes(targets, num_classes):
    """Images of each class as a list of `num_classes` ints."""
    return np.bincount(np.asarray(targets, dtype=np.int64), minlength=num_classes).tolist()


def groups(counts):
    """Classes of the many, medium and few groups, as a dict of lists, by training images (see GROUP_RULE).

    >>> groups([101, 100, 20, 19])
    {'many': [0], 'medium': [1, 2], 'few': [3]}
    """
    split = {"many": [], "medium": [], "few": []}
    for label, count in enumerate(counts):
        name = "many" if count > MANY_OVER else "few" if count < FEW_UNDER else "medium"
        split[name].append(label)
    return split


def split_sha256(indices):
    """Hex sha256 of the chosen indices, in order, as little-endian int64."""
    return hashlib.sha256(np.asarray(indices).astype("<i8").tobytes()).hexdigest()
