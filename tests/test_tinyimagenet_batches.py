"""Pictures decoded once, and tensor crops against torchvision's transforms on PIL pictures."""

import math
import os
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from tinyimagenet_maker import SUBSET, make_layout, tiles
from torchvision.transforms import functional as TF

from imbalance_tinyimagenet import MEAN, STD, read_picture
from training import image_batches
from training.image_batches import ResizedCropBatches, decode_once, draw_boxes, resized_crops
from utils import DataError, epoch_generator

# ------------------------------------------------------------------------------------------- against Pillow


def real_pictures(n=120):
    """(n, 64, 64, 3) uint8: real Tiny ImageNet pictures where there are some, else tiles of photographs."""
    if not SUBSET.exists():
        return tiles()[:n]
    import io
    import zipfile

    with zipfile.ZipFile(SUBSET) as file:
        names = [name for name in file.namelist() if name.endswith(".JPEG")]
        names = names[:: len(names) // n][:n]
        return np.stack([np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name in names])


PICTURES = {"subset": real_pictures, "photographs": lambda: tiles()[:60]}


def assert_within_bounds(ours, pillow):
    """In grey levels: 1 on average, 3 at most. Returns both; a rounding that tips over in each pass makes 2."""
    difference = (ours.double() - torch.as_tensor(np.stack(pillow)).double()).abs()
    assert difference.mean() <= 1
    assert difference.max() <= 3
    return difference.mean().item(), difference.max().item()


@pytest.mark.parametrize("size", [224, 96, 64, 48, 32])
@pytest.mark.parametrize("source", PICTURES)
def test_training_crops_equal_pillows(source, size):
    pictures = PICTURES[source]()
    generator = torch.Generator().manual_seed(size)
    boxes = draw_boxes(len(pictures), 64, 64, generator)
    boxes[0] = torch.tensor([0, 0, 64, 64])
    flips = torch.rand(len(pictures), generator=generator) < 0.5
    ours = resized_crops(torch.as_tensor(pictures), boxes, flips, size)
    pillow = []
    for picture, box, flip in zip(pictures, boxes.tolist(), flips.tolist(), strict=True):
        crop = TF.resized_crop(Image.fromarray(picture), *box, [size, size], T.InterpolationMode.BILINEAR)
        pillow.append(np.asarray(TF.hflip(crop) if flip else crop))
    mean, largest = assert_within_bounds(ours, pillow)
    if size == 224:  # the published size, where Pillow's order of the passes is ours
        assert mean < 0.02
        assert largest <= 2


@pytest.mark.parametrize("size", [224, 96, 64, 37, 32])
def test_evaluation_equals_torchvisions_transform(size):
    pictures = real_pictures(40)
    batches = ResizedCropBatches(pictures, range(40), [0] * 40, 16, MEAN, STD, image_size=size)
    ours = torch.cat([images for images, _ in batches.eval_epoch()])
    transform = T.Compose([T.Resize(round(size * 256 / 224)), T.CenterCrop(size), T.ToTensor(), T.Normalize(MEAN, STD)])
    theirs = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
    assert ours.shape == theirs.shape == (40, 3, size, size)
    levels = (ours - theirs).abs() * torch.tensor(STD)[:, None, None] * 255
    assert levels.mean() <= 0.1
    assert levels.max() <= 2.01


def test_pictures_that_are_not_square():
    pictures = np.stack([np.pad(tile, ((0, 0), (0, 26), (0, 0)), "reflect") for tile in tiles()[:6]])
    batches = ResizedCropBatches(pictures, range(6), [0] * 6, 6, MEAN, STD, image_size=48)
    ours = next(batches.eval_epoch())[0]
    transform = T.Compose([T.Resize(55), T.CenterCrop(48), T.ToTensor(), T.Normalize(MEAN, STD)])
    theirs = torch.stack([transform(Image.fromarray(picture)) for picture in pictures])
    assert ((ours - theirs).abs() * torch.tensor(STD)[:, None, None] * 255).max() <= 2.01
    assert image_batches.resize_all(pictures, 32).shape == (6, 32, 32, 3)


def test_resize_all_equals_pillows():
    pictures = tiles()[:20]
    assert image_batches.resize_all(pictures, 64) is pictures
    ours = torch.as_tensor(image_batches.resize_all(pictures, 40, batch=7))
    assert ours.dtype == torch.uint8
    assert_within_bounds(ours, [np.asarray(Image.fromarray(p).resize((40, 40), 2)) for p in pictures])


# ---------------------------------------------------------------------------------------------- crop boxes


def distance(one, two):
    """Kolmogorov-Smirnov distance of two samples."""
    one, two = np.sort(one), np.sort(two)
    values = np.concatenate([one, two])
    share = [np.searchsorted(sample, values, side="right") / len(sample) for sample in (one, two)]
    return np.abs(share[0] - share[1]).max()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 90)])
def test_boxes_have_torchvisions_distribution(height, width):
    n, picture = 6000, torch.empty(3, height, width)
    torch.manual_seed(0)
    get_params = T.RandomResizedCrop.get_params
    theirs = np.array([get_params(picture, image_batches.CROP_SCALE, image_batches.CROP_RATIO) for _ in range(n)])
    ours = draw_boxes(n, height, width, torch.Generator().manual_seed(0)).numpy()
    bound = 1.95 * math.sqrt(2 / n)  # exceeded once in a thousand by samples of one distribution

    def features(boxes):
        top, left, h, w = boxes.astype(float).T
        # places as a share of the room, and the joint behaviour of two of them
        return {"h": h, "w": w, "area": h * w, "ratio": w / h, "top": top, "left": left,
                "bottom": top + h, "right": left + w, "corner": top + left, "sides": h + w}  # fmt: skip

    for name, values in features(ours).items():
        assert distance(values, features(theirs)[name]) < bound, name
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()


@pytest.mark.parametrize(("height", "width"), [(10, 300), (300, 10), (64, 64)])
def test_fallback_box_is_torchvisions(height, width):
    scale = (2.0, 3.0)  # no box of that area fits
    theirs = T.RandomResizedCrop.get_params(torch.empty(3, height, width), scale, image_batches.CROP_RATIO)
    ours = draw_boxes(5, height, width, torch.Generator().manual_seed(0), scale=scale)
    assert ours.tolist() == [list(theirs)] * 5


# -------------------------------------------------------------------------------------------------- batches


@pytest.fixture
def batches():
    pictures = tiles()[:30]
    rows = np.arange(29, 4, -1)  # a data set is a choice of the decoded pictures, in an order of its own
    return ResizedCropBatches(pictures, rows, rows % 7, 8, MEAN, STD, seed=5, image_size=32)


def test_epoch_holds_every_picture_once(batches):
    seen = torch.cat([targets for _, targets in batches.train_epoch(0)])
    assert len(batches) == 4
    assert sorted(seen.tolist()) == sorted(batches.targets.tolist())
    assert [len(targets) for _, targets in batches.eval_epoch()] == [8, 8, 8, 1]
    assert torch.cat([targets for _, targets in batches.eval_epoch()]).equal(batches.targets)


def test_epoch_is_drawn_from_seed_and_epoch(batches):
    def epoch(number, **change):
        for name, value in change.items():
            setattr(batches, name, value)
        return torch.cat([images for images, _ in batches.train_epoch(number)])

    torch.manual_seed(1)
    first = epoch(3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert first.equal(epoch(3))
    assert torch.get_rng_state().equal(state)
    assert first.equal(epoch(3, at_once=3)), "pictures made at a time must not matter"
    assert not first.equal(epoch(4))
    assert not first.equal(epoch(3, seed=6))
    assert first.is_contiguous(memory_format=torch.channels_last)


def test_epoch_equals_the_pillow_path(batches):
    """The whole of it, from the draws: order, boxes, flips, normalisation, targets."""
    generator = epoch_generator(5, 2)
    order = torch.randperm(25, generator=generator)
    boxes = draw_boxes(25, 64, 64, generator)
    flips = torch.rand(25, generator=generator) < 0.5
    images = torch.cat([images for images, _ in batches.train_epoch(2)])
    for position, row in enumerate(batches.rows[order].tolist()):
        crop = TF.resized_crop(Image.fromarray(tiles()[row]), *boxes[position].tolist(), [32, 32])
        crop = TF.hflip(crop) if flips[position] else crop
        expected = TF.normalize(TF.to_tensor(crop), MEAN, STD)
        levels = (images[position] - expected).abs() * torch.tensor(STD)[:, None, None] * 255
        assert levels.mean() <= 1
        assert levels.max() <= 3.01


def test_resample_draws_in_proportion(batches):
    rates = torch.zeros(25, dtype=torch.float64)
    rates[3], rates[4] = 3, 1
    seen = torch.cat([targets for epoch in range(20) for _, targets in batches.train_epoch(epoch, rates)])
    assert len(seen) == 500
    assert (seen == batches.targets[3]).double().mean() == pytest.approx(0.75, abs=0.06)


@pytest.mark.gpu
def test_gpu_makes_the_same_batches(batches):
    on_gpu = ResizedCropBatches(
        tiles()[:30], batches.rows, batches.targets, 8, MEAN, STD, "cuda", seed=5, image_size=32
    )
    for here, there in zip(batches.train_epoch(1), on_gpu.train_epoch(1), strict=True):
        assert here[1].equal(there[1].cpu())
        assert ((here[0] - there[0].cpu()).abs() * 255 * max(STD)).max() <= 1.1


# --------------------------------------------------------------------------------------------- decoded once


@pytest.fixture
def paths(tmp_path):
    make_layout(tmp_path, classes=2, train=3, val=1)
    return sorted(str(path) for path in (tmp_path / "tiny-imagenet-200" / "train").rglob("*.JPEG"))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "decoded"


def never(path):
    raise AssertionError(f"{path} was decoded again")


def first_only(paths):
    """A reader that only looks at the first picture, for its size."""
    return lambda path: read_picture(path) if path == paths[0] else never(path)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_pictures_are_decoded_once(paths, cache, workers, capsys):
    images = decode_once(paths, read_picture, str(cache), "train", workers)
    assert images.dtype == np.uint8
    assert np.array_equal(images, np.stack([read_picture(path) for path in paths]))
    (file,) = os.listdir(cache)
    content = (cache / file).read_bytes()
    again = decode_once(paths, first_only(paths), str(cache), "train", workers)
    assert isinstance(again, np.memmap)
    assert np.array_equal(images, again)
    again[:] = 0  # in memory only
    assert (cache / file).read_bytes() == content
    assert capsys.readouterr().out.count("decoding") == 1


def test_cache_follows_the_files(paths, cache):
    key = image_batches.cache_key(paths)
    decode_once(paths, read_picture, str(cache), "train")
    decode_once(paths[:1], read_picture, str(cache), "val")
    assert len(os.listdir(cache)) == 2
    os.utime(paths[2], ns=(1, 1))
    assert image_batches.cache_key(paths) != key
    Image.fromarray(tiles()[0]).save(paths[1], quality=95)
    images = decode_once(paths, read_picture, str(cache), "train")
    assert np.array_equal(images[1], read_picture(paths[1]))
    assert len(os.listdir(cache)) == 2, "the old one of the same part goes, that of another stays"
    keys = {image_batches.cache_key(paths), image_batches.cache_key(paths[:-1])}
    with mock.patch("PIL.__version__", "0"):
        keys.add(image_batches.cache_key(paths))
    with mock.patch.object(image_batches, "CACHE_FORMAT", 0):
        keys.add(image_batches.cache_key(paths))
    assert len(keys) == 4


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-100], lambda c: c[:-5] + b"?" + c[-4:], lambda c: b"", lambda c: b"x" * 99]
)
def test_damaged_cache_is_made_anew(paths, cache, capsys, damage):
    images = np.array(decode_once(paths, read_picture, str(cache), "train"))  # not mapped: the file is written to
    (file,) = os.listdir(cache)
    content = (cache / file).read_bytes()
    (cache / file).write_bytes(damage(content))
    assert np.array_equal(images, decode_once(paths, read_picture, str(cache), "train"))
    assert "is damaged" in capsys.readouterr().err
    assert os.listdir(cache) == [file]
    assert (cache / file).read_bytes() == content


@pytest.mark.parametrize("error", [DataError, KeyboardInterrupt])
def test_stopped_decoding_leaves_nothing(paths, cache, error):
    def read(path):
        if path == paths[4]:
            raise error(path)
        return read_picture(path)

    for workers in (1, 2):
        with pytest.raises(error):
            decode_once(paths, read, str(cache), "train", workers)
        assert os.listdir(cache) == []
    (cache / "train.partial").write_bytes(b"left by a killed process")
    decode_once(paths, read_picture, str(cache), "train")
    assert len(os.listdir(cache)) == 1


def test_pictures_of_two_sizes(paths, cache):
    Image.fromarray(tiles()[0][:50]).save(paths[3])
    with pytest.raises(DataError, match="64 x 50") as error:
        decode_once(paths, read_picture, str(cache), "train")
    assert paths[3] in str(error.value)


def test_folder_that_cannot_be_written(paths, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    images = decode_once(paths, read_picture, str(tmp_path / "file" / "decoded"), "train", 2)
    assert np.array_equal(images, np.stack([read_picture(path) for path in paths]))
    assert "cannot keep the decoded pictures" in capsys.readouterr().err
