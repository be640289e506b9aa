"""CIFAR-10 and CIFAR-100 as the official archives have them, with a few made images in place of 60,000 real ones."""

import contextlib
import functools
import hashlib
import io
import pickle
import tarfile
from pathlib import Path
from unittest import mock

import numpy as np

from imbalance_cifar import DATASETS

CLASS_NAMES = {
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    "cifar100": [f"fine{label:02d}" for label in range(100)],
}
#: Training images of each class; in the archive the classes are mixed.
TRAIN = {"cifar10": 40, "cifar100": 10}


def labels_of_test(name):
    """The labels of the test images, in order: two or three images of each class."""
    return [label for number in range(3) for label in range(len(CLASS_NAMES[name])) if number < 2 + label % 2]


def image_of(label, number):
    """(32, 32, 3) uint8: blocks of colour that the class shares, under noise; the first pixel is (label, number, 0)."""
    blocks = np.random.RandomState(label).randint(0, 200, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
    image = (blocks + np.random.RandomState(1000 * label + number).randint(0, 56, (32, 32, 3))).astype(np.uint8)
    image[0, 0] = label, number, 0
    return image


def images_of(labels, first=0):
    """(N, 32, 32, 3): images of these classes, those of each class numbered from `first` on."""
    seen = dict.fromkeys(labels, first)
    images = []
    for label in labels:
        images.append(image_of(label, seen[label]))
        seen[label] += 1
    return np.stack(images)


def _batch(label_of_batch, images, labels):
    """What every file of images holds, but the labels: a row is an image, its red plane first."""
    names = [f"made_{label}_{number}.png" for number, label in enumerate(labels)]
    rows = images.transpose(0, 3, 1, 2).reshape(len(images), 3072)
    return {"batch_label": label_of_batch, "data": rows, "filenames": names}


def _files(name):
    """The folder in the archive, and file name -> what its pickle holds."""
    names, test = CLASS_NAMES[name], labels_of_test(name)
    train = np.random.RandomState(0).permutation(np.repeat(np.arange(len(names)), TRAIN[name])).tolist()
    images, test_images = images_of(train), images_of(test, TRAIN[name])
    if name == "cifar100":
        files = {
            part: {**_batch(f"{part}ing batch", *of_part), "fine_labels": of_part[1]}
            | {"coarse_labels": [label // 5 for label in of_part[1]]}
            for part, of_part in {"train": (images, train), "test": (test_images, test)}.items()
        }
        coarse = [f"coarse{label:02d}" for label in range(20)]
        return "cifar-100-python", {**files, "meta": {"fine_label_names": names, "coarse_label_names": coarse}}
    size = len(train) // 5
    files = {"test_batch": {**_batch("testing batch 1 of 1", test_images, test), "labels": test}}
    for k in range(5):
        part = slice(k * size, (k + 1) * size)
        batch = _batch(f"training batch {k + 1} of 5", images[part], train[part])
        files[f"data_batch_{k + 1}"] = {**batch, "labels": train[part]}
    meta = {"num_cases_per_batch": size, "label_names": names, "num_vis": 3072}
    return "cifar-10-batches-py", {**files, "batches.meta": meta}


@functools.cache
def _archive(name):
    """The bytes of the archive, and file name -> md5 of what is in it."""
    folder, files = _files(name)
    packed, md5 = io.BytesIO(), {}
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for file, content in files.items():
            info, content = tarfile.TarInfo(f"{folder}/{file}"), pickle.dumps(content, protocol=2)
            info.size, md5[file] = len(content), hashlib.md5(content).hexdigest()
            archive.addfile(info, io.BytesIO(content))
    return packed.getvalue(), md5


@contextlib.contextmanager
def official_archive(root, name):
    """`root` with the archive of 'cifar10' or 'cifar100', not unpacked, and a data set that expects its checksums.

    Every file is still checked, against the md5 of the made one; the names and places are the official ones.
    """
    (content, md5), of = _archive(name), DATASETS[name]
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    (root / f"cifar-{name.removeprefix('cifar')}-python.tar.gz").write_bytes(content)
    with mock.patch.multiple(
        of,
        tgz_md5=hashlib.md5(content).hexdigest(),
        train_list=[[file, md5[file]] for file, _ in of.train_list],
        test_list=[[file, md5[file]] for file, _ in of.test_list],
        meta={**of.meta, "md5": md5[of.meta["filename"]]},
    ):
        yield
