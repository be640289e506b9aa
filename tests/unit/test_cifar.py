"""IMBALANCECIFAR10 and IMBALANCECIFAR100 on archives in the official form (real images: test_in_memory.py)."""

import urllib.error
from unittest import mock

import numpy as np
import pytest
from cifar_maker import CLASS_NAMES, TRAIN, image_of, official_archive

import imbalance_cifar
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


def test_an_item_is_the_image_and_its_label_and_the_rand_number_chooses(name, tmp_path):
    one, other = (imbalance_cifar.load(name, tmp_path, "exp", 0.1, rand_number)[0] for rand_number in (0, 1))
    assert one.get_cls_num_list() == other.get_cls_num_list()
    assert set(known(one)) != set(known(other))
    image, label = one[5]
    assert np.array_equal(image, image_of(label, np.asarray(image)[0, 0, 1]))


def test_a_changed_byte_of_any_file_is_refused_by_name(name, tmp_path):
    imbalance_cifar.load(name, tmp_path, "none")
    next(tmp_path.glob("*.tar.gz")).unlink()
    files = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"]
    assert len(files) == {"cifar10": 7, "cifar100": 3}[name]
    for path in files:
        content = path.read_bytes()
        path.write_bytes(content[:-2] + bytes([content[-2] ^ 1]) + content[-1:])
        with (
            mock.patch("urllib.request.urlopen", side_effect=urllib.error.URLError("no network")),
            pytest.raises(DataError, match=f"{path.name} is damaged, and {name} cannot be downloaded again"),
        ):
            imbalance_cifar.load(name, tmp_path, "none")
        path.write_bytes(content)
