"""Images from files in batches, made by workers (folders and lists: test_folders.py)."""

import os
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from tinyimagenet_maker import image_of, tiles
from torchvision import transforms
from torchvision.transforms import functional

from imbalance_folder import ImageSet, read_folder
from loaders.image_folder import ImageFileBatches
from utils import DataError

COUNTS = (12, 7, 4)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """train/ and val/ with three classes of images of different sizes; some lie deeper."""
    root = tmp_path_factory.mktemp("source") / "data"
    for part, counts, first in (("train", COUNTS, 0), ("val", (2, 2, 2), 30)):
        for label, count in enumerate(counts):
            folder = root / part / f"class{label}"
            (folder / "more").mkdir(parents=True)
            for number in range(count):
                place = folder / "more" if number % 4 == 3 else folder
                image = image_of(label, first + number).resize((64 + 8 * (number % 3), 64))
                image.save(place / f"{number}.jpg", quality=95)
    return root


@pytest.fixture(scope="module")
def images(source):
    return read_folder(str(source / "train"))


# ------------------------------------------------------------------------------------------------- batches


def numbered(images):
    """The same files, each with its number as label."""
    return ImageSet(images.paths, range(len(images.paths)), map(str, range(len(images.paths))))


def epoch_of(batches):
    found, targets = zip(*batches, strict=True)
    return torch.cat(found), torch.cat(targets)


def test_epoch_is_the_same_with_and_without_workers(images):
    alone, helped = (ImageFileBatches(numbered(images), 8, image_size=24, seed=3, workers=n) for n in (0, 2))
    for epoch in (5, 6, 5):
        for one, two in zip(alone.train_epoch(epoch), helped.train_epoch(epoch), strict=True):
            assert torch.equal(one[0], two[0])
            assert torch.equal(one[1], two[1])
    first, other = (next(iter(alone.train_epoch(epoch))) for epoch in (5, 6))
    assert not torch.equal(first[1], other[1])


def test_workers_stay_and_a_left_epoch_leaves_nothing_behind(images):
    batches = ImageFileBatches(numbered(images), 4, image_size=16, seed=3, workers=2)
    expected = epoch_of(ImageFileBatches(numbered(images), 4, image_size=16, seed=3).train_epoch(2))
    next(batches.eval_epoch())
    processes = [worker.pid for worker in batches._loader._iterator._workers]
    for _ in range(2):
        next(batches.train_epoch(1))
        found = epoch_of(batches.train_epoch(2))
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])
    assert [worker.pid for worker in batches._loader._iterator._workers] == processes


@pytest.mark.parametrize("workers", [0, 1])
def test_drawing_touches_no_global_generator(images, workers):
    torch.manual_seed(5)
    expected = torch.rand(3)
    batches = ImageFileBatches(images, 8, image_size=8, workers=workers)
    torch.manual_seed(5)
    epoch_of(batches.train_epoch(0))
    epoch_of(batches.eval_epoch())
    assert torch.equal(torch.rand(3), expected)


def test_epoch_deals_every_image_once(images):
    batches = ImageFileBatches(numbered(images), 8, image_size=8)
    targets = [target for _, target in batches.train_epoch(0)]
    assert sorted(torch.cat(targets).tolist()) == list(range(23))
    assert [len(target) for target in targets] == [8, 8, 7]
    assert len(batches) == 3


def test_resample_draws_in_proportion(images):
    rates = torch.zeros(23, dtype=torch.float64)
    rates[[3, 7]] = 1.0
    drawn = epoch_of(ImageFileBatches(numbered(images), 8, image_size=8).train_epoch(0, rates))[1]
    assert len(drawn) == 23
    assert set(drawn.tolist()) == {3, 7}


def test_images_keep_their_labels(tmp_path):
    paths = [str(tmp_path / f"{level}.png") for level in range(40)]
    for level, path in enumerate(paths):
        Image.fromarray(np.full((20, 30, 3), 6 * level, np.uint8)).save(path)
    dataset = ImageSet(paths, range(40), map(str, range(40)))
    dataset.mean, dataset.std = (0, 0, 0), (1, 1, 1)
    batches = ImageFileBatches(dataset, 7, image_size=8)
    for dealt in (batches.train_epoch(1), batches.eval_epoch(), batches.train_epoch(1, torch.ones(40).double())):
        found, targets = epoch_of(dealt)
        assert torch.equal((found[:, 0, 4, 4] * 255 / 6).round().long(), targets)


def test_evaluation_equals_torchvisions_transform(images):
    few = images.subset([0, 1, 2])
    few.mean, few.std = mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    expected = transforms.Compose([
        transforms.Resize(32), transforms.CenterCrop(28), transforms.ToTensor(), transforms.Normalize(mean, std),
    ])  # fmt: skip
    found, _ = next(ImageFileBatches(few, 3, image_size=28).eval_epoch())
    for image, path in zip(found, few.paths, strict=True):
        torch.testing.assert_close(image, expected(Image.open(path).convert("RGB")), rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(2000, 1), (1999, 1), (3, 1000), (999, 2)])
def test_of_a_long_strip_only_the_middle_is_resized(tmp_path, size):
    """The same pixels as of the whole strip, to a grey level, from a part of it."""
    levels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "strip.png")
    dataset = ImageSet([str(tmp_path / "strip.png")], [0], ["a"])
    dataset.mean, dataset.std = (0, 0, 0), (1 / 255,) * 3
    wanted = transforms.CenterCrop(28)(transforms.Resize(32)(Image.fromarray(levels)))
    with mock.patch("loaders.image_folder.functional.resize", side_effect=functional.resize) as resize:
        found, _ = next(ImageFileBatches(dataset, 1, image_size=28).eval_epoch())
    assert max(resize.call_args.args[0].size) <= 33 * min(size)
    difference = found[0].permute(1, 2, 0).numpy() - np.asarray(wanted, dtype=np.float32)
    assert np.abs(difference).max() <= (1.01 if min(size) == 1 else 12)


def test_training_crop_of_a_whole_box_is_a_resize(tmp_path):
    """Where the crop box is the whole image, the crop is torchvision's resize of it, flipped or not."""
    path = str(tmp_path / "a.png")
    Image.fromarray(tiles()[3]).save(path)
    dataset = ImageSet([path], [0], ["a"])
    dataset.mean, dataset.std = (0, 0, 0), (1, 1, 1)
    resized = transforms.ToTensor()(transforms.Resize((32, 32))(Image.open(path)))
    for flip, kinds in ((None, {1, -1}), (True, {1, -1}), (False, {1})):
        batches = ImageFileBatches(dataset, 1, image_size=32, flip=flip)
        with mock.patch("loaders.image_folder.draw_boxes", return_value=torch.tensor([[0, 0, 64, 64]])):
            crops = [next(batches.train_epoch(epoch))[0][0] for epoch in range(8)]
        equal = [
            torch.allclose(crop, resized, atol=1e-6) - torch.allclose(crop, resized.flip(2), atol=1e-6)
            for crop in crops
        ]
        assert set(equal) == kinds, flip


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_ends_the_epoch_with_its_name(images, tmp_path, workers):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    dataset = ImageSet([*images.paths, str(tmp_path / "bad.jpg")], [0] * 24, ["a"])
    batches = ImageFileBatches(dataset, 8, image_size=8, workers=workers)
    for epoch in (batches.train_epoch(0), batches.eval_epoch()):
        with pytest.raises(DataError, match=r"bad\.jpg cannot be decoded"):
            list(epoch)


def test_a_dead_worker_is_one_line(images):
    with mock.patch("loaders.image_folder.open_image", side_effect=lambda *_: os._exit(3)):
        batches = ImageFileBatches(images, 8, image_size=8, workers=1)
        with pytest.raises(DataError, match="a process that reads images died: a smaller -j may help"):
            list(batches.train_epoch(0))


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_batches_put_together_are_the_single_processes(images, ranks):
    dataset = numbered(images).subset(range(17))  # of the last batch, one image, most ranks have nothing
    batches = ImageFileBatches(dataset, 8, image_size=8, seed=1)
    whole, dealt = list(batches.train_epoch(1)), []
    for rank in range(ranks):
        with mock.patch.multiple("training.distributed", rank=lambda rank=rank: rank, world_size=lambda: ranks):
            dealt.append(list(batches.train_epoch(1)))
    for number, (found, targets) in enumerate(whole):
        assert torch.equal(torch.cat([rank[number][0] for rank in dealt]), found)
        assert torch.equal(torch.cat([rank[number][1] for rank in dealt]), targets)
