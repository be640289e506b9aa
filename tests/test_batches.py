"""Batches: the augmentation against torchvision's, the draws, Resample, and the real CIFAR-10 where it is found."""

import hashlib
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import functional as tv

import losses
from imbalance_cifar import CIFAR_MEAN, CIFAR_STD, IMBALANCECIFAR10, IMBALANCEDIGITS
from training.batches import TensorBatches, crop_and_flip, normalise, sample

GOLDEN = Path(__file__).parent / "golden"
REPOSITORY = Path(__file__).resolve().parent.parent
PADDING, PLACES = 4, 9


def pictures(n, height=32, width=32, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, height, width, 3)).astype(np.uint8)


def batches_of(images, targets=None, batch_size=32, **how):
    targets = range(len(images)) if targets is None else targets
    return TensorBatches(images, list(targets), batch_size, CIFAR_MEAN, CIFAR_STD, **how)


# -------------------------------------------------------------------------------------------- augmentation


@pytest.mark.parametrize("flip", [False, True])
def test_crop_and_flip_is_torchvisions_bit_for_bit_at_every_offset(flip):
    image = pictures(1)[0]
    offsets = torch.cartesian_prod(torch.arange(PLACES), torch.arange(PLACES))
    images = torch.as_tensor(image).expand(len(offsets), -1, -1, -1)
    source, flips = batches_of(images), torch.full((len(offsets),), flip)
    ours = normalise(crop_and_flip(images, offsets, flips, PADDING), source.mean, source.std)
    padded = tv.pad(Image.fromarray(image), [PADDING] * 4)
    for (top, left), tensor in zip(offsets.tolist(), ours, strict=True):
        crop = tv.crop(padded, top, left, 32, 32)
        crop = tv.hflip(crop) if flip else crop
        theirs = tv.normalize(tv.to_tensor(crop), CIFAR_MEAN, CIFAR_STD)
        assert torch.equal(tensor, theirs), (top, left)


def test_every_image_of_a_batch_gets_its_own_draw():
    images = torch.as_tensor(pictures(6))
    offsets = torch.tensor([[0, 0], [8, 8], [4, 4], [0, 8], [3, 5], [4, 4]])
    flips = torch.tensor([False, True, False, True, False, True])
    together = crop_and_flip(images, offsets, flips, PADDING)
    for i in range(len(images)):
        alone = crop_and_flip(images[i : i + 1], offsets[i : i + 1], flips[i : i + 1], PADDING)
        assert torch.equal(together[i], alone[0]), i
    assert torch.equal(together[2], images[2])
    assert torch.equal(together[5], images[5].flip(1))


def test_pictures_need_not_be_square():
    image = pictures(1, 20, 28)[0]
    ours = crop_and_flip(torch.as_tensor(image)[None], torch.tensor([[1, 7]]), torch.tensor([True]), PADDING)
    theirs = tv.hflip(tv.crop(tv.pad(Image.fromarray(image), [PADDING] * 4), 1, 7, 20, 28))
    assert np.array_equal(ours[0].numpy(), np.asarray(theirs))


def test_evaluation_sees_the_pictures_as_they_are():
    images = pictures(70)
    dealt = list(batches_of(images).eval_epoch())
    assert [len(target) for _, target in dealt] == [32, 32, 6]
    theirs = torch.stack([tv.normalize(tv.to_tensor(image), CIFAR_MEAN, CIFAR_STD) for image in images])
    assert torch.equal(torch.cat([batch for batch, _ in dealt]), theirs)
    assert torch.cat([target for _, target in dealt]).tolist() == list(range(70))


# ------------------------------------------------------------------------------------------------ the draws


def marked(n):
    """n pictures of one white pixel each, right of the middle and above it: where it lands tells offset and flip."""
    images = np.zeros((n, 32, 32, 3), np.uint8)
    images[:, 14, 20] = 255
    return images


def read_draws(batches, epoch):
    """(top offset, left offset, flipped) of each picture of an epoch of `marked` pictures."""
    draws = []
    for images, _ in batches.train_epoch(epoch):
        for image in images:
            row, column = divmod(int(image[0].argmax()), 32)
            flipped = column < 16  # unflipped it lands in 16..24, flipped in 7..15
            draws.append((14 + PADDING - row, 20 + PADDING - (31 - column if flipped else column), flipped))
    return np.array(draws)


def test_offsets_and_flips_are_uniform_and_independent():
    draws = read_draws(batches_of(marked(8100), batch_size=900), epoch=0)
    counts = np.zeros((PLACES, PLACES, 2))
    np.add.at(counts, tuple(draws.T), 1)
    assert counts.sum() == 8100
    # one test over all 162 combinations covers the margins and their independence
    assert 0.001 < stats.chisquare(counts.ravel()).pvalue < 0.999
    for axis, others in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        assert stats.chisquare(counts.sum(axis=others)).pvalue > 0.001, axis


def epoch_of(batches, epoch, rates=None):
    images, targets = zip(*batches.train_epoch(epoch, rates), strict=True)
    return torch.cat(images), torch.cat(targets)


def test_an_epoch_depends_on_seed_and_epoch_and_on_nothing_else():
    images = pictures(50)
    fresh = epoch_of(batches_of(images, seed=3), 7)
    used = batches_of(images, seed=3)
    for epoch in (0, 1, 6):
        epoch_of(used, epoch)
    torch.manual_seed(99)
    torch.rand(5)
    again = epoch_of(used, 7)
    assert torch.equal(fresh[0], again[0])
    assert torch.equal(fresh[1], again[1])
    for other_seed, other_epoch in ((3, 8), (4, 7), (7, 3)):
        other = epoch_of(batches_of(images, seed=other_seed), other_epoch)
        assert not torch.equal(fresh[1], other[1])


def test_drawing_touches_no_global_generator():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    batches = batches_of(pictures(40))
    epoch_of(batches, 0)
    epoch_of(batches, 1, torch.ones(40, dtype=torch.float64))
    assert torch.equal(torch.rand(3), expected)
    assert np.array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize(("n", "batch_size", "sizes"), [(70, 32, [32, 32, 6]), (64, 32, [32, 32]), (5, 32, [5])])
def test_an_epoch_shows_every_image_once_and_the_last_batch_may_be_smaller(n, batch_size, sizes):
    batches = batches_of(pictures(n), batch_size=batch_size)
    dealt = [target for _, target in batches.train_epoch(0)]
    assert [len(target) for target in dealt] == sizes
    assert len(batches) == len(sizes)
    order = torch.cat(dealt).tolist()
    assert sorted(order) == list(range(n))
    assert order != list(range(n))


def test_images_keep_their_labels():
    # the colour of a picture is its label, so that a mix-up of the two would show
    images = np.repeat(np.arange(200, dtype=np.uint8), 32 * 32 * 3).reshape(200, 32, 32, 3)
    batches = batches_of(images, batch_size=48)
    for dealt in (batches.train_epoch(2), batches.train_epoch(2, torch.ones(200, dtype=torch.float64))):
        for batch, targets in dealt:
            middle = batch[:, 0, 16, 16] * CIFAR_STD[0] + CIFAR_MEAN[0]
            assert torch.equal((middle * 255).round().long(), targets)


# ------------------------------------------------------------------------------------------------- Resample


@pytest.mark.parametrize("name", ["sampler_10.json", "sampler_100.json"])
def test_sampler_draws_the_official_indices(name):
    golden = json.loads((GOLDEN / name).read_text())
    targets = torch.repeat_interleave(torch.arange(len(golden["counts"])), torch.tensor(golden["counts"]))
    rates = losses.effective_number_rates(golden["counts"], 0.9999)[targets]
    head, tail = golden["weights_first"], golden["weights_last"]
    torch.testing.assert_close(rates[: len(head)], torch.tensor(head, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(rates[-len(tail) :], torch.tensor(tail, dtype=torch.float64), rtol=1e-12, atol=0)
    indices = sample(rates, torch.Generator().manual_seed(golden["seed"]))
    assert indices[: len(golden["first"])].tolist() == golden["first"]
    digest = hashlib.sha256(indices.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest == golden["indices_sha256"]


def test_resample_reaches_the_batches():
    counts = [2000, 600, 200, 40]
    targets = np.repeat(np.arange(4), counts)
    rates = losses.effective_number_rates(counts, 0.9999)[torch.as_tensor(targets)]
    batches = batches_of(np.zeros((len(targets), 32, 32, 3), np.uint8), targets, batch_size=512)
    drawn = np.bincount(epoch_of(batches, 0, rates)[1].numpy(), minlength=4)
    assert drawn.sum() == len(targets)
    share = np.array([n * float(rates[targets == k][0]) for k, n in enumerate(counts)])
    expected = share / share.sum() * len(targets)
    assert stats.chisquare(drawn, expected).pvalue > 0.001
    # the shuffle is the long tail itself, and the expectation above is near balance: the two cannot be confused
    assert np.bincount(epoch_of(batches, 0)[1].numpy()).tolist() == counts
    assert drawn[3] > 10 * counts[3]


# ------------------------------------------------------------------------------------------------ real data


@pytest.fixture(scope="session")
def cifar_root(tmp_path_factory):
    """A folder with the real CIFAR-10, or a skip that says where it was looked for."""
    places = [os.environ.get("CIFAR_ROOT"), REPOSITORY / "data"]
    for place in places:
        if place and (Path(place) / "cifar-10-batches-py" / "test_batch").is_file():
            return place
    archive = REPOSITORY.parent / "shared" / "data" / "cifar-10-batches-py.tar.xz"
    if not archive.is_file():
        pytest.skip("no CIFAR-10: neither where CIFAR_ROOT points, nor in data/, nor in ../shared/data/")
    root = tmp_path_factory.mktemp("cifar")
    with tarfile.open(archive) as file:
        file.extractall(root, filter="data")
    return root


def test_real_cifar10_gets_the_published_split(cifar_root):
    np.random.seed(123)
    before = np.random.get_state()[1].copy()
    train = IMBALANCECIFAR10(cifar_root, "exp", 0.01)
    assert np.array_equal(np.random.get_state()[1], before)
    assert train.get_cls_num_list() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert len(train) == train.data.shape[0] == 12406
    assert train.data.dtype == np.uint8
    image, label = train[0]
    assert image.size == (32, 32)
    assert label == train.targets[0] == 0

    whole = IMBALANCECIFAR10(cifar_root, "none", 1.0)
    assert whole.get_cls_num_list() == [5000] * 10
    labels = np.asarray(whole.targets)[np.argsort(whole.chosen)]  # in the order of the archive
    pixels = whole.data[np.argsort(whole.chosen)]
    assert len(set(train.chosen.tolist())) == 12406
    assert np.array_equal(labels[train.chosen], train.targets)
    assert np.array_equal(pixels[train.chosen], train.data)

    test = IMBALANCECIFAR10(cifar_root, train=False)
    assert test.get_cls_num_list() == [1000] * 10


def test_another_rand_number_keeps_other_images_of_the_same_classes(cifar_root):
    one, other = (IMBALANCECIFAR10(cifar_root, "step", 0.01, rand_number=r) for r in (0, 1))
    assert one.get_cls_num_list() == other.get_cls_num_list() == [5000] * 5 + [50] * 5
    assert not np.array_equal(one.chosen, other.chosen)


def test_digits_are_split_once_and_the_test_part_is_whole():
    train, tail, test = IMBALANCEDIGITS(imb_type="none"), IMBALANCEDIGITS(imb_factor=0.1), IMBALANCEDIGITS(train=False)
    assert len(train) + len(test) == 1797
    assert len(test) == 540
    assert min(test.get_cls_num_list()) >= 50
    seen = {image.tobytes() for image in test.data}
    assert not any(image.tobytes() in seen for image in train.data)
    assert {image.tobytes() for image in tail.data} <= {image.tobytes() for image in train.data}
    assert train.data.shape[1:] == (32, 32, 3)
    assert train.data.min() == 0
    assert train.data.max() > 200
