"""Batches in memory: crop and flip against torchvision's, the draws, Resample, --augment; digits."""

import hashlib
import itertools
import random
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import golden
from PIL import Image
from scipy import stats
from torchvision.transforms import functional as tv
from torchvision.transforms import v2

import losses
from imbalance_cifar import CIFAR_MEAN, CIFAR_STD, IMBALANCEDIGITS
from loaders import batch_slices, sampled_order
from loaders.augment import AUGMENTS, Augment
from loaders.in_memory import InMemoryBatches, TrainEpoch, crop_and_flip

PADDING, PLACES = 4, 9


def noise(n, height=32, width=32):
    return np.random.RandomState(0).randint(0, 256, (n, height, width, 3)).astype(np.uint8)


def batches_of(images, targets=None, batch_size=32, **how):
    targets = range(len(images)) if targets is None else targets
    dataset = SimpleNamespace(data=images, targets=list(targets), mean=CIFAR_MEAN, std=CIFAR_STD, flip=True)
    return InMemoryBatches(dataset, batch_size, **how)


# ------------------------------------------------------------------------------------------- crop and flip


def test_crop_and_flip_is_torchvisions_bit_for_bit_at_every_offset():
    """Each image, which need not be square, has a draw of its own: the 81 offsets, flipped or not."""
    draws = torch.cartesian_prod(torch.arange(PLACES), torch.arange(PLACES), torch.arange(2))
    images = noise(len(draws), 20, 28)
    together = crop_and_flip(torch.as_tensor(images), draws[:, :2], draws[:, 2].bool(), PADDING)
    for ours, image, (top, left, flip) in zip(together, images, draws.tolist(), strict=True):
        theirs = tv.crop(tv.pad(Image.fromarray(image), [PADDING] * 4), top, left, 20, 28)
        assert np.array_equal(ours.numpy(), np.asarray(tv.hflip(theirs) if flip else theirs)), (top, left, flip)


def test_evaluation_sees_the_images_as_they_are():
    images = noise(70)
    dealt = list(batches_of(images).eval_epoch())
    assert [len(target) for _, target in dealt] == [32, 32, 6]
    theirs = torch.stack([tv.normalize(tv.to_tensor(image), CIFAR_MEAN, CIFAR_STD) for image in images])
    assert torch.equal(torch.cat([batch for batch, _ in dealt]), theirs)
    assert torch.cat([target for _, target in dealt]).tolist() == list(range(70))


def test_without_flips_order_and_crops_stay_the_same():
    images = noise(40)
    (plain, targets), (flipped, same) = (next(batches_of(images, flip=flip).train_epoch(4)) for flip in (False, True))
    assert torch.equal(targets, same)
    kept = torch.tensor([torch.equal(a, b) for a, b in zip(plain, flipped, strict=True)])
    turned = torch.tensor([torch.equal(a, b.flip(2)) for a, b in zip(plain, flipped, strict=True)])
    assert torch.equal(turned, ~kept)
    assert 5 < turned.sum() < 27


# ------------------------------------------------------------------------------------------------ the draws


def epoch_of(batches, epoch, rates=None):
    images, targets = zip(*batches.train_epoch(epoch, rates), strict=True)
    return torch.cat(images), torch.cat(targets)


def test_an_epoch_has_the_bits_that_it_always_had():
    """Of the release that the committed records were made with."""
    digest = hashlib.sha256()
    batches = InMemoryBatches(IMBALANCEDIGITS(imb_factor=0.1), 44, seed=3)
    for rates in (None, torch.linspace(0, 1, len(batches.targets), dtype=torch.float64)):
        for tensor in epoch_of(batches, 7, rates):
            digest.update(tensor.contiguous().numpy().tobytes())
    assert digest.hexdigest() == "1860a25c9e86b55af86b9e04c2d44cc04332134bb82101bdd3457de198917f03"


def marked(n):
    """n images of one white pixel each, right of the middle and above it: where it lands tells offset and flip."""
    images = np.zeros((n, 32, 32, 3), np.uint8)
    images[:, 14, 20] = 255
    return images


def read_draws(batches, epoch):
    """(top offset, left offset, flipped) of each image of an epoch of `marked` images."""
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


@pytest.mark.parametrize("augment", ["none", "randaugment"])
def test_an_epoch_depends_on_seed_and_epoch_and_on_nothing_else(augment):
    images = noise(50)
    fresh = epoch_of(batches_of(images, seed=3, augment=augment), 7)
    used = batches_of(images, seed=3, batch_size=13, augment=augment)
    for epoch in (0, 1, 6):
        epoch_of(used, epoch)
    torch.manual_seed(99)
    torch.rand(5)
    again = epoch_of(used, 7)
    assert torch.equal(fresh[0], again[0])
    assert torch.equal(fresh[1], again[1])
    for other_seed, other_epoch in ((3, 8), (4, 7), (7, 3)):
        other = epoch_of(batches_of(images, seed=other_seed, augment=augment), other_epoch)
        assert not torch.equal(fresh[1], other[1])


def test_a_batch_is_the_one_at_the_places_that_the_device_holds():
    """No number of the host says which one comes next."""
    expected, epoch = (batches_of(noise(50), batch_size=8).train_epoch(3) for _ in range(2))
    expected = list(expected)
    for number in (4, 0, 5):
        epoch.places.copy_(torch.arange(8) + 8 * number)
        images, targets = epoch.take(8)
        assert torch.equal(images, expected[number][0])
        assert torch.equal(targets, expected[number][1])
        assert epoch.places.tolist() == list(range(8 * number + 8, 8 * number + 16))
    assert torch.equal(epoch.take(2)[0], expected[6][0])


@pytest.mark.parametrize("augment", ["none", "randaugment"])
def test_drawing_touches_no_global_generator(augment):
    torch.manual_seed(5)
    np.random.seed(5)
    random.seed(5)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    batches = batches_of(noise(20), augment=augment)
    epoch_of(batches, 0)
    epoch_of(batches, 1, torch.ones(20, dtype=torch.float64))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])
    assert random.getstate() == states[2]


def test_an_epoch_shows_every_image_once_and_the_last_batch_may_be_smaller():
    for n, sizes in ((70, [32, 32, 6]), (64, [32, 32]), (5, [5])):
        batches = batches_of(noise(n), batch_size=32)
        dealt = [target for _, target in batches.train_epoch(0)]
        assert [len(target) for target in dealt] == sizes
        assert len(batches) == len(sizes)
        order = torch.cat(dealt).tolist()
        assert sorted(order) == list(range(n))
        assert order != list(range(n))


def test_images_keep_their_labels():
    # the colour of a image is its label, so that a mix-up of the two would show
    images = np.repeat(np.arange(200, dtype=np.uint8), 32 * 32 * 3).reshape(200, 32, 32, 3)
    batches = batches_of(images, batch_size=48)
    for dealt in (batches.train_epoch(2), batches.train_epoch(2, torch.ones(200, dtype=torch.float64))):
        for batch, targets in dealt:
            middle = batch[:, 0, 16, 16] * CIFAR_STD[0] + CIFAR_MEAN[0]
            assert torch.equal((middle * 255).round().long(), targets)


def test_slices_of_the_ranks_are_even_and_leave_nothing_out():
    for ranks, n in itertools.product([1, 2, 3, 5], [0, 1, 4, 5, 44, 45]):
        dealt = list(zip(*(batch_slices(n, 22, rank, ranks) for rank in range(ranks)), strict=True))
        assert len(dealt) == -(-n // 22)
        assert [i for slices in dealt for part in slices for i in range(n)[part]] == list(range(n))
        for slices in dealt:
            sizes = [part.stop - part.start for part in slices]
            assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(("ranks", "augment"), [(2, "trivialaugment"), (4, "none")])
def test_ranks_batches_put_together_are_the_single_processes(ranks, augment):
    """Of the last batch, one image, most ranks have nothing."""
    how = {"batch_size": 10, "seed": 1, "augment": augment}
    alone = batches_of(noise(21), **how)
    parts = [batches_of(noise(21), rank=rank, world_size=ranks, **how) for rank in range(ranks)]
    rates = torch.linspace(0, 1, 21, dtype=torch.float64)
    for epoch in (lambda b: b.train_epoch(3), lambda b: b.train_epoch(3, rates), lambda b: b.eval_epoch()):
        dealt = [list(epoch(part)) for part in parts]
        for number, (images, targets) in enumerate(epoch(alone)):
            assert torch.equal(torch.cat([rank[number][0] for rank in dealt]), images)
            assert torch.equal(torch.cat([rank[number][1] for rank in dealt]), targets)


# ------------------------------------------------------------------------------------------------ --augment


def test_another_augmentation_is_one_entry_made_after_crop_and_flip():
    """Order, crops and flips are those of the run without it; evaluation does not see it."""
    paint = Augment(lambda size: lambda image: image // 2 + size, "darker")
    with mock.patch.dict(AUGMENTS, paint=paint):
        painted = batches_of(noise(40), seed=2, augment="paint")
    plain = batches_of(noise(40), seed=2)
    assert (painted.draws_on_host, plain.draws_on_host) == (True, False)
    assert isinstance(plain.train_epoch(5), TrainEpoch)
    assert not isinstance(painted.train_epoch(5), TrainEpoch), "what a CUDA graph replays"
    for (ours, targets), (theirs, same) in zip(painted.train_epoch(5), plain.train_epoch(5), strict=True):
        assert torch.equal(targets, same)
        levels = [
            (images * torch.tensor(CIFAR_STD)[:, None, None] + torch.tensor(CIFAR_MEAN)[:, None, None]) * 255
            for images in (ours, theirs)
        ]
        assert torch.equal(levels[0].round(), (levels[1].round() / 2).floor() + 32)
        assert ours.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(next(painted.eval_epoch())[0], next(plain.eval_epoch())[0])


def test_every_image_is_augmented_with_a_seed_of_its_own():
    """Cutout of one image repeated: the holes lie in different places."""
    cutout = Augment(lambda size: v2.RandomErasing(1, (0.1, 0.1), (1, 1)), "a square hole")
    with mock.patch.dict(AUGMENTS, cutout=cutout):
        batches = batches_of(np.full((30, 32, 32, 3), 255, np.uint8), padding=0, augment="cutout")
    images = next(batches.train_epoch(0))[0]
    assert [(image < 0).sum().item() for image in images] == [3 * 10 * 10] * 30
    assert len({image.numpy().tobytes() for image in images}) > 25


@pytest.mark.parametrize("name", ["sampler_10.json", "sampler_100.json"])
def test_sampler_draws_the_official_indices(name):
    expected = golden(name)
    targets = torch.repeat_interleave(torch.arange(len(expected["counts"])), torch.tensor(expected["counts"]))
    rates = losses.effective_number_rates(expected["counts"], 0.9999)[targets]
    head, tail = expected["weights_first"], expected["weights_last"]
    torch.testing.assert_close(rates[: len(head)], torch.tensor(head, dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(rates[-len(tail) :], torch.tensor(tail, dtype=torch.float64), rtol=1e-12, atol=0)
    indices = sampled_order(len(rates), torch.Generator().manual_seed(expected["seed"]), rates)
    assert indices[: len(expected["first"])].tolist() == expected["first"]
    digest = hashlib.sha256(indices.numpy().astype("<i8").tobytes()).hexdigest()
    assert digest == expected["indices_sha256"]


def test_digits_are_split_once_and_the_test_part_is_whole():
    train, tail, test = IMBALANCEDIGITS(imb_type="none"), IMBALANCEDIGITS(imb_factor=0.1), IMBALANCEDIGITS(train=False)
    assert len(train) + len(test) == 1797
    assert len(test) == 540
    assert min(test.get_cls_num_list()) >= 50
    seen = {image.tobytes() for image in test.data}
    assert not any(image.tobytes() in seen for image in train.data)
    assert {image.tobytes() for image in tail.data} <= {image.tobytes() for image in train.data}
    assert not test.flip
    assert test.class_names == test.classes == list("0123456789")


@pytest.mark.parametrize("images", [noise(2) / 255, noise(2)[..., :1], noise(2, width=20), noise(2)[..., 0]])
def test_images_of_another_form_are_refused(images):
    with pytest.raises(ValueError, match=r"data must be \(N, side, side, 3\) uint8, got"):
        batches_of(images)
