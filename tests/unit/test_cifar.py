"""IMBALANCECIFAR10 and IMBALANCECIFAR100 on archives in the official form, of made images."""

import urllib.error
from unittest import mock

import numpy as np
import pytest
import torchvision
from cifar_maker import CLASS_NAMES, TRAIN, image_of, official_archive

import imbalance
import imbalance_cifar
from files import LOCK
from utils import DataError


@pytest.fixture(params=CLASS_NAMES)
def name(request, tmp_path):
    with official_archive(tmp_path, request.param):
        yield request.param


def known(dataset):
    """The (label, number in its class) of each image, read from its pixels, which must be those of its label."""
    found = []
    for image, label in zip(dataset.data, dataset.targets, strict=True):
        number = int(image[0, 0, 1])
        assert np.array_equal(image, image_of(label, number))
        found.append((label, number))
    return found


@pytest.mark.parametrize("imb_type", ["exp", "step"])
def test_the_training_part_has_the_published_counts_and_the_test_part_is_whole(name, imb_type, tmp_path):
    n, classes = TRAIN[name], len(CLASS_NAMES[name])
    counts = {
        "exp": [int(n * 0.1 ** (k / (classes - 1))) for k in range(classes)],
        "step": [n] * (classes // 2) + [n // 10] * (classes // 2),
    }[imb_type]
    train, test = imbalance_cifar.load(name, tmp_path, imb_type, 0.1)
    images = known(train)
    assert train.get_cls_num_list() == counts
    assert len(set(images)) == len(images) == len(train) == sum(counts)
    assert max(number for _, number in images) < n
    whole = {(label, n + number) for label in range(classes) for number in range(2 + label % 2)}
    assert set(known(test)) == whole
    assert len(test) == len(test.data) == len(whole)
    assert train.class_names == test.class_names == CLASS_NAMES[name]
    assert (train.num_classes, train.cls_num) == (classes, classes)
    spare = known(train.left_out(5))
    assert spare
    assert not set(spare) & set(images)


def test_an_item_is_the_image_and_its_label_and_the_rand_number_chooses(name, tmp_path):
    one, other = (imbalance_cifar.load(name, tmp_path, "exp", 0.1, rand_number)[0] for rand_number in (0, 1))
    assert one.get_cls_num_list() == other.get_cls_num_list()
    assert set(known(one)) != set(known(other))
    image, label = one[5]
    assert np.array_equal(image, image_of(label, np.asarray(image)[0, 0, 1]))


def test_nothing_is_left_out_where_no_imbalance_is_made():
    for imb_type, factor in (("none", 0.1), ("exp", 1.0), ("step", 1.0)):
        digits = imbalance_cifar.IMBALANCEDIGITS(imb_type=imb_type, imb_factor=factor)
        with pytest.raises(ValueError, match="no image was left out"):
            digits.left_out(3) if imb_type != "exp" else digits.subset([0, 1]).left_out(3)


def test_one_process_downloads_at_a_time(name, tmp_path):
    """The folder is locked while torchvision looks and downloads."""
    held = []

    class Watched(imbalance_cifar.DATASETS[name]):
        def download(self):
            held.append((tmp_path / LOCK).exists())
            super().download()

    with mock.patch.dict(imbalance_cifar.DATASETS, {name: Watched}):
        imbalance_cifar.load(name, tmp_path, "none")
    assert held == [True, True], "the training part and the test part, which some data sets have in another file"


class Torchvisions(imbalance.InMemoryImages, torchvision.datasets.SVHN):
    """As docs/extending.md derives one: a data set whose files are not CIFAR's."""

    mean, std, image_size, cls_num = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2), 32, 10

    def __init__(self, root, imb_type="exp", imb_factor=0.01, rand_number=0, train=True, download=False):
        super().__init__(root, split="train" if train else "test", download=download)


def test_data_of_another_kind_that_are_missing_are_one_line(tmp_path):
    with (
        mock.patch.dict(imbalance_cifar.DATASETS, svhn=Torchvisions),
        mock.patch("urllib.request.urlopen", side_effect=urllib.error.URLError("no network")),
    ):
        with pytest.raises(DataError, match=r"no svhn in .*, and it cannot be downloaded .*: put its files"):
            imbalance_cifar.load("svhn", tmp_path)
        (tmp_path / "train_32x32.mat").write_bytes(b"damaged")
        with pytest.raises(DataError, match="no svhn in"):
            imbalance_cifar.load("svhn", tmp_path)


def test_a_changed_byte_of_any_file_is_refused(name, tmp_path):
    imbalance_cifar.load(name, tmp_path, "none")
    next(tmp_path.glob("*.tar.gz")).unlink()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(files) == {"cifar10": 7, "cifar100": 3}[name]
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with (
            mock.patch("urllib.request.urlopen", side_effect=urllib.error.URLError("no network")),
            pytest.raises(DataError, match=f"no {name} in .*, or a damaged one, and it cannot be downloaded"),
        ):
            imbalance_cifar.load(name, tmp_path, "none")
        path.write_bytes(content)
