"""Images decoded once, and tensor crops against torchvision's transforms on PIL images."""

import errno
import math
import os
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torchvision.transforms as T
from PIL import Image
from tinyimagenet_maker import SUBSET, make_layout, tiles
from torchvision.transforms import functional as TF

import imbalance_tinyimagenet as tiny
from imbalance_folder import IMAGENET_MEAN as MEAN
from imbalance_folder import IMAGENET_STD as STD
from imbalance_folder import read_image
from loaders import resized_crops, transforms
from loaders.in_memory import InMemoryBatches
from loaders.resized_crops import ResizedCropBatches, decode_once, make_batches
from loaders.transforms import crop_resize_and_flip, draw_boxes
from utils import DataError, epoch_generator

# ------------------------------------------------------------------------------------------- against Pillow


def real_images(n=120):
    """(n, 64, 64, 3) uint8: real Tiny ImageNet images where there are some, else tiles of photographs."""
    if not SUBSET.exists():
        return tiles()[:n]
    import io
    import zipfile

    with zipfile.ZipFile(SUBSET) as file:
        names = [name for name in file.namelist() if name.endswith(".JPEG")]
        names = names[:: len(names) // n][:n]
        return np.stack([np.asarray(Image.open(io.BytesIO(file.read(name))).convert("RGB")) for name in names])


def chosen(rows, flip=True):
    """A data set of these rows of the decoded images, with seven classes."""
    rows = np.asarray(rows)
    return SimpleNamespace(chosen=rows, targets=(rows % 7).tolist(), mean=MEAN, std=STD, flip=flip)


IMAGES = {"subset": real_images, "photographs": lambda: tiles()[:60]}


def assert_within_bounds(ours, pillow):
    """In grey levels: 1 on average, 3 at most. Returns both; a rounding that tips over in each pass makes 2."""
    difference = (ours.double() - torch.as_tensor(np.stack(pillow)).double()).abs()
    assert difference.mean() <= 1
    assert difference.max() <= 3
    return difference.mean().item(), difference.max().item()


@pytest.mark.parametrize("size", [224, 96, 64, 48, 32])
@pytest.mark.parametrize("source", IMAGES)
def test_training_crops_equal_pillows(source, size):
    images = IMAGES[source]()
    generator = torch.Generator().manual_seed(size)
    boxes = draw_boxes(len(images), 64, 64, generator)
    boxes[0] = torch.tensor([0, 0, 64, 64])
    flips = torch.rand(len(images), generator=generator) < 0.5
    ours = crop_resize_and_flip(torch.as_tensor(images), boxes, flips, size)
    pillow = []
    for image, box, flip in zip(images, boxes.tolist(), flips.tolist(), strict=True):
        crop = TF.resized_crop(Image.fromarray(image), *box, [size, size], T.InterpolationMode.BILINEAR)
        pillow.append(np.asarray(TF.hflip(crop) if flip else crop))
    mean, largest = assert_within_bounds(ours, pillow)
    if size == 224:  # the published size, where Pillow's order of the passes is ours
        assert mean < 0.02
        assert largest <= 2


@pytest.mark.parametrize("size", [224, 96, 64, 37, 32])
def test_evaluation_equals_torchvisions_transform(size):
    images = real_images(40)
    batches = ResizedCropBatches(chosen(range(40)), images, 16, image_size=size)
    ours = torch.cat([images for images, _ in batches.eval_epoch()])
    transform = T.Compose([T.Resize(round(size * 256 / 224)), T.CenterCrop(size), T.ToTensor(), T.Normalize(MEAN, STD)])
    theirs = torch.stack([transform(Image.fromarray(image)) for image in images])
    assert ours.shape == theirs.shape == (40, 3, size, size)
    levels = (ours - theirs).abs() * torch.tensor(STD)[:, None, None] * 255
    assert levels.mean() <= 0.1
    assert levels.max() <= 2.01


def test_images_that_are_not_square():
    images = np.stack([np.pad(tile, ((0, 0), (0, 26), (0, 0)), "reflect") for tile in tiles()[:6]])
    batches = ResizedCropBatches(chosen(range(6)), images, 6, image_size=48)
    ours = next(batches.eval_epoch())[0]
    transform = T.Compose([T.Resize(55), T.CenterCrop(48), T.ToTensor(), T.Normalize(MEAN, STD)])
    theirs = torch.stack([transform(Image.fromarray(image)) for image in images])
    assert ((ours - theirs).abs() * torch.tensor(STD)[:, None, None] * 255).max() <= 2.01
    assert transforms.resize_all(images, 32).shape == (6, 32, 32, 3)


def test_resize_all_equals_pillows():
    images = tiles()[:20]
    assert transforms.resize_all(images, 64) is images
    ours = torch.as_tensor(transforms.resize_all(images, 40, batch=7))
    assert ours.dtype == torch.uint8
    assert_within_bounds(ours, [np.asarray(Image.fromarray(p).resize((40, 40), 2)) for p in images])


# ---------------------------------------------------------------------------------------------- crop boxes


def distance(one, two):
    """Kolmogorov-Smirnov distance of two samples."""
    one, two = np.sort(one), np.sort(two)
    values = np.concatenate([one, two])
    share = [np.searchsorted(sample, values, side="right") / len(sample) for sample in (one, two)]
    return np.abs(share[0] - share[1]).max()


@pytest.mark.parametrize(("height", "width"), [(64, 64), (64, 90)])
def test_boxes_have_torchvisions_distribution(height, width):
    n, image = 6000, torch.empty(3, height, width)
    torch.manual_seed(0)
    get_params = T.RandomResizedCrop.get_params
    theirs = np.array([get_params(image, transforms.CROP_SCALE, transforms.CROP_RATIO) for _ in range(n)])
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
    theirs = T.RandomResizedCrop.get_params(torch.empty(3, height, width), scale, transforms.CROP_RATIO)
    ours = draw_boxes(5, height, width, torch.Generator().manual_seed(0), scale=scale)
    assert ours.tolist() == [list(theirs)] * 5


# -------------------------------------------------------------------------------------------------- batches


@pytest.fixture
def batches():
    images = tiles()[:30]
    rows = np.arange(29, 4, -1)  # a data set is a choice of the decoded images, in an order of its own
    return ResizedCropBatches(chosen(rows), images, 8, seed=5, image_size=32)


def test_epoch_holds_every_image_once(batches):
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
    assert first.equal(epoch(3, at_once=3)), "images made at a time must not matter"
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


def test_without_flips_order_and_boxes_stay_the_same():
    rows = range(29, 4, -1)
    images = tiles()[:30]
    sources = [ResizedCropBatches(chosen(rows, flip), images, 25, seed=5, image_size=32) for flip in (False, True)]
    (plain, targets), (flipped, same) = (next(source.train_epoch(2)) for source in sources)
    assert torch.equal(targets, same)
    turned = 0
    for one, two in zip(plain, flipped, strict=True):
        mirrored = torch.allclose(one, two.flip(2), atol=2.01 / 255 / min(STD))
        assert mirrored != torch.equal(one, two)
        turned += mirrored
    assert 5 < turned < 20


@pytest.mark.gpu
def test_gpu_makes_the_same_batches(batches):
    on_gpu = ResizedCropBatches(chosen(batches.rows.numpy()), tiles()[:30], 8, "cuda", seed=5, image_size=32)
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
    """A reader that only looks at the first image, for its size."""
    return lambda path: read_image(path) if path == paths[0] else never(path)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_images_are_decoded_once(paths, cache, workers, capsys):
    images = decode_once(paths, read_image, str(cache), "train", workers)
    assert images.dtype == np.uint8
    assert np.array_equal(images, np.stack([read_image(path) for path in paths]))
    (file,) = os.listdir(cache)
    content = (cache / file).read_bytes()
    again = decode_once(paths, first_only(paths), str(cache), "train", workers)
    assert isinstance(again, np.memmap)
    assert np.array_equal(images, again)
    again[:] = 0  # in memory only
    assert (cache / file).read_bytes() == content
    assert capsys.readouterr().out.count("decoding") == 1


def test_cache_follows_the_files(paths, cache):
    key = resized_crops.cache_key(paths)
    decode_once(paths, read_image, str(cache), "train")
    decode_once(paths[:1], read_image, str(cache), "val")
    assert len(os.listdir(cache)) == 2
    os.utime(paths[2], ns=(1, 1))
    assert resized_crops.cache_key(paths) != key
    Image.fromarray(tiles()[0]).save(paths[1], quality=95)
    images = decode_once(paths, read_image, str(cache), "train")
    assert np.array_equal(images[1], read_image(paths[1]))
    assert len(os.listdir(cache)) == 2, "the old one of the same part goes, that of another stays"
    keys = {resized_crops.cache_key(paths), resized_crops.cache_key(paths[:-1])}
    with mock.patch("PIL.__version__", "0"):
        keys.add(resized_crops.cache_key(paths))
    with mock.patch.object(resized_crops, "CACHE_FORMAT", 0):
        keys.add(resized_crops.cache_key(paths))
    assert len(keys) == 4


@pytest.mark.parametrize(
    "damage", [lambda c: c[:-100], lambda c: c[:-5] + b"?" + c[-4:], lambda c: b"", lambda c: b"x" * 99]
)
def test_damaged_cache_is_made_anew(paths, cache, capsys, damage):
    images = np.array(decode_once(paths, read_image, str(cache), "train"))  # not mapped: the file is written to
    (file,) = os.listdir(cache)
    content = (cache / file).read_bytes()
    (cache / file).write_bytes(damage(content))
    assert np.array_equal(images, decode_once(paths, read_image, str(cache), "train"))
    assert "is damaged" in capsys.readouterr().err
    assert os.listdir(cache) == [file]
    assert (cache / file).read_bytes() == content


@pytest.mark.parametrize("error", [DataError, KeyboardInterrupt])
def test_stopped_decoding_leaves_nothing(paths, cache, error):
    def read(path):
        if path == paths[4]:
            raise error(path)
        return read_image(path)

    for workers in (1, 2):
        with pytest.raises(error):
            decode_once(paths, read, str(cache), "train", workers)
        assert os.listdir(cache) == []
    (cache / "train.partial").write_bytes(b"left by a killed process")
    decode_once(paths, read_image, str(cache), "train")
    assert len(os.listdir(cache)) == 1


def test_images_of_two_sizes(paths, cache):
    Image.fromarray(tiles()[0][:50]).save(paths[3])
    with pytest.raises(DataError, match="64 x 50") as error:
        decode_once(paths, read_image, str(cache), "train")
    assert paths[3] in str(error.value)


def test_folder_that_cannot_be_written(paths, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    images = decode_once(paths, read_image, str(tmp_path / "file" / "decoded"), "train", 2)
    assert np.array_equal(images, np.stack([read_image(path) for path in paths]))
    assert "cannot keep the decoded images" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- the data set's


def test_batches_of_a_part_of_tiny_imagenet(tmp_path):
    names = make_layout(tmp_path, classes=3, train=4)
    train = tmp_path / "tiny-imagenet-200" / "train"
    whole = tiny.IMBALANETINYIMGNET(str(train), "exp", 0.25)
    part = whole.subset([6, 0, 4])
    batches = make_batches(part, 2, seed=1, image_size=40)
    assert isinstance(batches, ResizedCropBatches)
    assert batches.targets.tolist() == part.targets == [2, 0, 1]
    expected = np.stack([read_image(path) for path, _ in part.samples])
    assert np.array_equal(batches.images[batches.rows].numpy(), expected)
    padded = make_batches(part, 2, seed=1, image_size=32, crop="padded", flip=False)
    assert isinstance(padded, InMemoryBatches)
    assert (padded.padding, padded.flip, batches.flip) == (4, False, True)
    assert np.array_equal(padded.images.numpy(), transforms.resize_all(expected, 32))
    assert padded.targets.tolist() == [2, 0, 1]
    assert os.listdir(train.parent / "decoded")[0].startswith("train-")
    assert len(names) == whole.num_classes


def test_a_full_disk_is_noticed_before_the_map_is_written_to(paths, cache, capsys):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(os, "posix_fallocate", side_effect=full) as reserve:
        images = decode_once(paths, read_image, str(cache), "train")
    assert reserve.call_args.args[2] > images.nbytes, "the header and all pixels"
    assert np.array_equal(images, np.stack([read_image(path) for path in paths]))
    assert "cannot keep the decoded images ([Errno 28] No space left on device)" in capsys.readouterr().err
    assert not list(cache.glob("train*"))


def test_a_file_of_decoded_images_has_no_holes(paths, cache):
    decode_once(paths, read_image, str(cache), "train")
    status = next(cache.glob("train-*.npy")).stat()
    assert status.st_blocks * 512 >= status.st_size
