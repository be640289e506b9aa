"""Batches of image files: crops against torchvision's on PIL images, draws, workers and ranks, what goes wrong."""

import os
from unittest import mock

import numpy as np
import pytest
import torch
from image_runs import make_folder
from PIL import Image
from torchvision import transforms
from torchvision.transforms import v2

from imbalance_folder import ImageSet, open_image, read_folder
from loaders.augment import AUGMENTS, Augment, centre
from loaders.image_folder import ImageFileBatches, decode
from utils import DataError, epoch_generator

N = 23


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """23 files of different sizes, each with its number as label."""
    root = make_folder(tmp_path_factory.mktemp("data"), counts=(12, 7, 4))
    paths = read_folder(str(root / "train")).paths
    return ImageSet(paths, range(N), map(str, range(N)))


def in_levels(dataset):
    """The data set without mean and std: batches hold grey levels."""
    dataset.mean, dataset.std = (0, 0, 0), (1 / 255,) * 3
    return dataset


def saved(folder, *arrays):
    """A data set of these (H, W, 3) arrays, each with its number as label, in grey levels."""
    paths = [str(folder / f"{number}.png") for number in range(len(arrays))]
    for path, array in zip(paths, arrays, strict=True):
        Image.fromarray(array).save(path)
    return in_levels(ImageSet(paths, range(len(paths)), map(str, range(len(paths)))))


def whole(epoch):
    found, targets = zip(*epoch, strict=True)
    return torch.cat(found), torch.cat(targets)


def assert_same(one, other):
    assert all(torch.equal(a, b) for a, b in zip(whole(one), whole(other), strict=True))


# --------------------------------------------------------------------------------------------------- crops


def test_evaluation_equals_torchvisions_transform_on_pil_images(images):
    few = images.subset(range(6))
    few.mean, few.std = mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = transforms.Compose([
        transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor(), transforms.Normalize(mean, std),
    ])  # fmt: skip
    found, _ = next(ImageFileBatches(few, 6, image_size=28).eval_epoch())
    theirs = torch.stack([expected(Image.open(path).convert("RGB")) for path in few.paths])
    levels = (found - theirs).abs() * torch.tensor(std)[:, None, None] * 255
    assert levels.max() <= 1.01  # torch's and Pillow's resize round differently
    assert levels.mean() < 0.02
    assert found.is_contiguous(memory_format=torch.channels_last)


def test_training_images_are_torchvisions_in_the_order_and_with_the_seeds_of_the_epoch(images):
    theirs = v2.Compose([v2.RandomResizedCrop(24), v2.RandomHorizontalFlip(), v2.RandAugment()])
    dataset = in_levels(images.subset(range(N)))
    batches = ImageFileBatches(dataset, 8, image_size=24, seed=3, augment="randaugment")
    generator = epoch_generator(3, 5)
    order, seeds = torch.randperm(N, generator=generator), torch.randint(2**62, (N,), generator=generator)
    found, targets = whole(batches.train_epoch(5))
    assert torch.equal(targets, order)
    for image, index, seed in zip(found, order.tolist(), seeds.tolist(), strict=True):
        original = torch.as_tensor(np.array(open_image(images.paths[index]))).permute(2, 0, 1)
        torch.manual_seed(seed)
        assert torch.equal(image.round().byte(), theirs(original))


@pytest.mark.parametrize(("flip", "vertical", "kinds"), [(True, False, 2), (False, True, 2), (True, True, 4)])
def test_flips_mirror_half_of_the_images(tmp_path, flip, vertical, kinds):
    levels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    dataset = saved(tmp_path, *[levels] * 200)
    with mock.patch.object(v2, "RandomResizedCrop", return_value=v2.Identity()):
        augment = "verticalflip" if vertical else "none"
        batches = ImageFileBatches(dataset, 200, image_size=4, flip=flip, augment=augment)
    found = next(batches.train_epoch(0))[0].round().permute(0, 2, 3, 1).numpy()
    turned = levels, levels[:, ::-1], levels[::-1], levels[::-1, ::-1]
    counts = [sum(np.array_equal(image, way) for image in found) for way in turned]
    assert sum(counts) == 200
    assert counts[0] == pytest.approx(200 / kinds, abs=30)
    assert (counts[1] > 0, counts[2] > 0, counts[3] > 0) == (flip, vertical, flip and vertical)


def test_of_a_long_strip_only_the_middle_is_resized():
    """The same pixels as of the whole strip, to a grey level."""
    strip = torch.randint(0, 256, (3, 1, 2000), generator=torch.Generator().manual_seed(0)).byte()
    wanted = v2.Compose([v2.Resize(32), v2.CenterCrop(28)])(strip)
    assert (centre(32, 28)(strip).int() - wanted.int()).abs().max() <= 1
    huge = torch.zeros(3, 1, 10**6, dtype=torch.uint8)  # whole, it would become 3 x 256 x 256 million pixels
    assert centre(256, 224)(huge).shape == (3, 224, 224)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_augmentations_keep_shape_and_type_and_change_what_they_should(augment):
    for size in (32, 224):
        image = torch.randint(0, 256, (3, size, size), generator=torch.Generator().manual_seed(1)).byte()
        torch.manual_seed(0)
        found = [AUGMENTS[augment].make(size)(image) for _ in range(8)]
        assert {(crop.shape, crop.dtype) for crop in found} == {(image.shape, torch.uint8)}
        changed = sum(not torch.equal(crop, image) for crop in found)
        assert (changed == 0) if augment == "none" else (changed >= 4)


def test_autoaugment_has_the_policy_of_images_of_that_size():
    policies = [AUGMENTS["autoaugment"].make(size).policy for size in (32, 95, 96, 224)]
    assert policies == [v2.AutoAugmentPolicy.CIFAR10] * 2 + [v2.AutoAugmentPolicy.IMAGENET] * 2


# --------------------------------------------------------------------------------------------------- draws


def test_epoch_is_the_same_with_workers_and_in_other_batches(images):
    how = {"image_size": 24, "seed": 3, "augment": "randaugment"}
    alone, helped = ImageFileBatches(images, 8, **how), ImageFileBatches(images, 5, workers=2, **how)
    for epoch in (5, 6, 5):
        assert_same(alone.train_epoch(epoch), helped.train_epoch(epoch))
    first, other = (next(iter(alone.train_epoch(epoch))) for epoch in (5, 6))
    assert not torch.equal(first[1], other[1])


def test_two_epochs_at_once_are_refused(images):
    """Their images and labels would be mixed."""
    batches = ImageFileBatches(images, 2)
    with pytest.raises(RuntimeError, match="another epoch"):
        list(zip(batches.train_epoch(0), batches.train_epoch(1), strict=True))


def test_a_left_epoch_leaves_nothing_behind(images):
    batches = ImageFileBatches(images, 4, image_size=16, seed=3, workers=2)
    expected = whole(ImageFileBatches(images, 4, image_size=16, seed=3).train_epoch(2))
    next(batches.eval_epoch())
    for _ in range(2):
        next(batches.train_epoch(1))
        found = whole(batches.train_epoch(2))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize("workers", [0, 1])
def test_drawing_touches_no_global_generator(images, workers):
    batches = ImageFileBatches(images, 8, image_size=8, workers=workers, augment="trivialaugment")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    whole(batches.train_epoch(0))
    whole(batches.eval_epoch())
    assert torch.equal(torch.get_rng_state(), state)


def test_another_augmentation_leaves_order_and_crops_as_they_are(images):
    dataset = in_levels(images.subset(range(N)))
    with mock.patch.dict(AUGMENTS, half=Augment(lambda size: lambda image: image // 2, "darker")):
        half = ImageFileBatches(dataset, 8, image_size=16, seed=1, augment="half")
    (found, targets), (plain, same) = (
        whole(b.train_epoch(2)) for b in (half, ImageFileBatches(dataset, 8, image_size=16, seed=1))
    )
    assert torch.equal(targets, same)
    assert torch.equal(found.round(), (plain.round() / 2).floor())


def test_images_keep_their_labels_and_rates_choose_them(tmp_path):
    dataset = saved(tmp_path, *[np.full((20, 30, 3), 6 * level, np.uint8) for level in range(40)])
    batches = ImageFileBatches(dataset, 7, image_size=8)
    rates = torch.zeros(40, dtype=torch.float64)
    rates[[3, 7]] = 1.0
    for dealt, labels in (
        (batches.train_epoch(1), range(40)), (batches.eval_epoch(), range(40)), (batches.train_epoch(1, rates), (3, 7)),
    ):  # fmt: skip
        found, targets = whole(dealt)
        assert torch.equal((found[:, 0, 4, 4] / 6).round().long(), targets)
        assert len(targets) == 40
        assert set(targets.tolist()) == set(labels)
    assert [len(target) for _, target in batches.train_epoch(0)] == [7, 7, 7, 7, 7, 5]
    assert len(batches) == 6


def test_ranks_batches_put_together_are_the_single_processes(images):
    ranks = 4
    dataset = images.subset(range(17))  # of the last batch, one image, most ranks have nothing
    how = {"image_size": 8, "seed": 1}
    parts = [
        list(ImageFileBatches(dataset, 8, rank=rank, world_size=ranks, **how).train_epoch(1)) for rank in range(ranks)
    ]
    for number, (found, targets) in enumerate(ImageFileBatches(dataset, 8, **how).train_epoch(1)):
        assert torch.equal(torch.cat([rank[number][0] for rank in parts]), found)
        assert torch.equal(torch.cat([rank[number][1] for rank in parts]), targets)


# ------------------------------------------------------------------------------------------------- decoding


def test_decoded_images_are_the_files(tmp_path):
    workers = 2
    levels = np.random.default_rng(0).integers(0, 256, (9, 64, 64, 3), dtype=np.uint8)
    dataset = saved(tmp_path, *levels)
    from_files, paths = ImageFileBatches(dataset, 4, image_size=32, workers=workers), dataset.paths
    dataset.data = decode(paths, 64, workers)
    assert np.array_equal(dataset.data, levels)
    from_memory = ImageFileBatches(dataset, 4, image_size=32, workers=workers)
    assert_same(from_memory.train_epoch(1), from_files.train_epoch(1))
    assert_same(from_memory.eval_epoch(), from_files.eval_epoch())
    smaller = np.stack([np.asarray(Image.fromarray(image).resize((40, 40), 2)) for image in levels])
    assert np.abs(decode(paths, 40, workers).astype(int) - smaller).max() <= 1
    (tmp_path / "5.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"5\.png cannot be decoded"):
        decode(paths, 64, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_the_epoch_with_its_name(images, tmp_path, workers):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    dataset = ImageSet([*images.paths, str(tmp_path / "bad.jpg")], [0] * 24, ["a"])
    batches = ImageFileBatches(dataset, 8, image_size=8, workers=workers)
    for epoch in (batches.train_epoch(0), batches.eval_epoch()):
        with pytest.raises(DataError, match=r"bad\.jpg cannot be decoded"):
            list(epoch)


def test_a_dead_worker_is_one_line(images):
    with (
        mock.patch("loaders.image_folder.open_image", side_effect=lambda *args: os._exit(3)),
        mock.patch("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2),  # seconds
    ):
        batches = ImageFileBatches(images, 8, image_size=8, workers=1)
        with pytest.raises(DataError, match="a process that reads images died: a smaller -j may help"):
            list(batches.train_epoch(0))
