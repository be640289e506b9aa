"""Images from files: folders and lists read, what is skipped and refused, decoding (batches: test_image_batches.py)."""

import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image
from tinyimagenet_maker import image_of
from torchvision.datasets import ImageFolder

import imbalance
import imbalance_folder
import imbalance_inat
from imbalance_folder import load, open_image, read_folder, read_image, read_list
from utils import DataError, UsageError

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


@pytest.fixture
def data(source, tmp_path):
    return shutil.copytree(source, tmp_path / "data")


@pytest.fixture(scope="module")
def images(source):
    return read_folder(str(source / "train"))


# ------------------------------------------------------------------------------------------------- folders


def test_folder_is_read_as_torchvision_reads_it(images, source):
    theirs = ImageFolder(str(source / "train"))
    assert images.samples == theirs.samples
    assert images.classes == theirs.classes
    assert images.chosen.tolist() == list(range(23))
    assert images.get_cls_num_list() == list(COUNTS)
    assert (images.num_classes, images.flip, images.image_size) == (3, True, 224)


def test_natural_imbalance_is_kept_and_another_one_made(images):
    assert images.long_tailed("none", 0.01, 0).samples == images.samples
    tailed = images.long_tailed("step", 0.5, 4)
    counts = imbalance.class_counts(COUNTS, "step", 0.5)
    assert tailed.get_cls_num_list() == counts == [12, 7, 4]
    tailed = images.long_tailed("exp", 0.1, 4)
    assert tailed.chosen.tolist() == imbalance.choose(images.targets, [12, 3, 1], 4).tolist()
    assert tailed.samples == [images.samples[i] for i in tailed.chosen]
    assert images.get_cls_num_list() == list(COUNTS)
    with pytest.raises(UsageError, match="leaves 1 of 3 classes empty"):
        images.long_tailed("exp", 0.01, 0)


def test_links_inside_classes_are_not_followed(data, tmp_path, capsys):
    before = read_folder(str(data / "train")).paths
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number in range(3):
        image_of(1, 60 + number).save(elsewhere / f"{number}.jpg")
    folder = data / "train" / "class0"
    (folder / "self").symlink_to(".")
    (folder / "up").symlink_to("../..")
    (folder / "out").symlink_to(elsewhere)
    (folder / "other.jpg").symlink_to("../class1/0.jpg")
    (folder / "a.jpg").symlink_to(elsewhere / "0.jpg")  # one image more
    (folder / "b.jpg").symlink_to(elsewhere / "0.jpg")  # the same again
    found = read_folder(str(data / "train"))
    assert sorted(found.paths) == sorted([*before, str(folder / "a.jpg")])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "symbolic links: 5" in err


def test_a_class_may_be_a_link_out_of_the_tree_but_not_into_it(data, tmp_path, capsys):
    shutil.move(data / "train" / "class2", tmp_path / "elsewhere")
    (data / "train" / "class2").symlink_to(tmp_path / "elsewhere")
    found = read_folder(str(data / "train"))
    assert found.get_cls_num_list() == list(COUNTS)
    assert capsys.readouterr().err == ""
    for target in ("class0", "..", tmp_path / "elsewhere"):
        (data / "train" / "class3").symlink_to(target)
        with pytest.raises(DataError, match=r"class folders without images: .*class3"):
            read_folder(str(data / "train"))
        assert "symbolic links: 1" in capsys.readouterr().err
        (data / "train" / "class3").unlink()


def test_named_pipes_are_skipped(data, capsys):
    os.mkfifo(data / "train" / "class0" / "pipe.jpg")
    (data / "train" / "class1" / "gone.jpg").symlink_to("nowhere")
    (data / "train" / "class1" / "folder.jpg").mkdir()
    assert read_folder(str(data / "train")).get_cls_num_list() == list(COUNTS)
    assert "symbolic links: 1, no regular files: 1" in capsys.readouterr().err


def test_class_folders_without_images_are_named_by_path(data):
    (data / "train" / "empty").mkdir()
    (data / "train" / "notes").mkdir()
    (data / "train" / "notes" / "readme.txt").write_text("no image")
    with pytest.raises(DataError) as error:
        read_folder(str(data / "train"))
    assert f"{data / 'train' / 'empty'}, {data / 'train' / 'notes'} (images end in .jpg" in str(error.value)


def test_hidden_folders_and_files_are_skipped(data, capsys):
    before = read_folder(str(data / "train")).samples
    for hidden in (".ipynb_checkpoints", "class0/.ipynb_checkpoints", "class1/more/.thumbs"):
        (data / "train" / hidden / "deeper").mkdir(parents=True)
        shutil.copy(before[0][0], data / "train" / hidden / "a.jpg")
        shutil.copy(before[0][0], data / "train" / hidden / "deeper" / "a.jpg")
    shutil.copy(before[0][0], data / "train" / "class1" / "._a.jpg")
    assert read_folder(str(data / "train")).samples == before
    assert capsys.readouterr().err == f"warning: skipped in {data / 'train'}: hidden: 4\n"


def test_what_does_not_end_as_an_image_and_links_to_nowhere_are_counted(data, capsys):
    folder = data / "train" / "class0"
    before = read_folder(str(data / "train")).paths
    for number in range(3):
        (folder / f"{number}.gif").write_bytes(b"GIF89a")
    (data / "train" / "class3").symlink_to("nowhere")
    assert read_folder(str(data / "train")).paths == before
    err = capsys.readouterr().err
    assert err.endswith(": links that lead nowhere: 1, files that do not end as images do: 3, as 0.gif\n")
    assert err.count("\n") == 1


def test_other_endings_of_jpeg_are_read(data, capsys):
    before = read_folder(str(data / "train"))
    for old, new in (("0.jpg", "0.jfif"), ("1.jpg", "1.JPE"), ("2.jpg", "2.JFIF")):
        (data / "train" / "class2" / old).rename(data / "train" / "class2" / new)
    found = read_folder(str(data / "train"))
    assert found.targets == before.targets
    for path in found.paths[-4:]:
        assert np.array_equal(read_image(path), np.asarray(Image.open(path).convert("RGB")))
    assert capsys.readouterr().err == ""


def test_test_images_that_lie_in_train_are_counted(data, capsys):
    load(str(data))
    assert capsys.readouterr().err == ""
    shutil.rmtree(data / "val" / "class2")
    (data / "val" / "class2").symlink_to(data / "train" / "class2")
    load(str(data))
    line = f"warning: 4 of the 8 images of {data / 'val'} are training images too\n"
    assert capsys.readouterr().err == line
    shutil.rmtree(data / "val")
    (data / "val").symlink_to("train")
    load(str(data))
    assert capsys.readouterr().err == line.replace("4 of the 8", "23 of the 23")


def test_a_copy_of_train_as_val_is_a_warning(data, capsys):
    shutil.rmtree(data / "val")
    shutil.copytree(data / "train", data / "val")
    load(str(data))
    line = f"warning: the images of {data / 'val'} look like training images: all have the names and sizes of images"
    assert capsys.readouterr().err == f"{line} of train/\n"
    first = data / "val" / "class0" / "0.jpg"
    first.write_bytes(first.read_bytes()[:-1] + b"x")  # names and sizes alone: bitmaps share them
    load(str(data))
    assert capsys.readouterr().err == ""
    shutil.copy(data / "train" / "class0" / "0.jpg", first)
    shutil.copy(first, data / "val" / "class0" / "new.jpg")
    load(str(data))
    assert capsys.readouterr().err == ""


def test_missing_folders_are_named(data, monkeypatch):
    monkeypatch.chdir(data)
    with pytest.raises(DataError, match=r"no folder \./data: --data_dir"):
        load("./data")
    with pytest.raises(DataError, match=r"no folder .*/data/train/train"):
        load(str(data / "train"))
    with pytest.raises(DataError, match="no class folders in"):
        read_folder(str(data / "val" / "class0" / "more"))
    shutil.rmtree(data / "val")
    with pytest.raises(UsageError, match=r"no val folder in .*: --val_fraction F"):
        load(str(data))


def test_load_gives_both_parts_of_the_same_classes(data):
    train, test = load(str(data), "exp", 0.1, 4)
    assert (train.get_cls_num_list(), test.get_cls_num_list()) == ([12, 3, 1], [2, 2, 2])
    (data / "val" / "class2").rename(data / "val" / "other\n")
    with pytest.raises(DataError, match="classes in train/ only: class2"):
        load(str(data))
    shutil.rmtree(data / "train" / "class2")
    with pytest.raises(DataError, match=r"classes in val/ only: other\\n"):
        load(str(data))


def test_a_part_of_train_for_testing(data):
    train, test = load(str(data), test_fraction=0.5)
    assert (train.get_cls_num_list(), test.get_cls_num_list()) == ([6, 3, 2], [6, 4, 2])
    assert sorted([*train.chosen, *test.chosen]) == list(range(23))
    assert load(str(data), test_fraction=0.001)[1].get_cls_num_list() == [1, 1, 1]


def test_classes_of_one_image_have_no_test_image_and_are_named(data, capsys):
    def keep_one(name):
        for path in sorted(path for path in (data / "train" / name).rglob("*") if path.is_file())[1:]:
            path.unlink()

    keep_one("class1")
    train, test = load(str(data), test_fraction=0.5)
    assert (train.get_cls_num_list(), test.get_cls_num_list()) == ([6, 1, 2], [6, 0, 2])
    assert capsys.readouterr().err == "warning: --val_fraction: no test image of classes that have one image: class1\n"
    keep_one("class0")
    keep_one("class2")
    with pytest.raises(UsageError, match="--val_fraction: no class has two images"):
        load(str(data), test_fraction=0.5)


@pytest.mark.parametrize("workers", [0, 3])
def test_damaged_images_are_found_at_the_start(data, workers):
    assert len(load(str(data), check_images=True, workers=workers)[0].paths) == 23
    cut = data / "train" / "class0" / "0.jpg"
    cut.write_bytes(cut.read_bytes()[:400])
    (data / "val" / "class1" / "0.jpg").write_bytes(b"no image")
    load(str(data), workers=workers)
    with pytest.raises(DataError) as error:
        load(str(data), check_images=True, workers=workers)
    assert str(error.value).startswith("2 of 29 images are damaged: ")
    assert f"{cut} cannot be decoded" in str(error.value)
    assert f"{data / 'val' / 'class1' / '0.jpg'} cannot be decoded" in str(error.value)


# --------------------------------------------------------------------------------------------------- lists


@pytest.fixture
def listed(data):
    """The folder's images as two lists, in another order, and a path with spaces."""
    (data / "train" / "class1" / "0.jpg").rename(data / "train" / "class1" / "with two spaces.jpg")
    for part in ("train", "val"):
        samples = read_folder(str(data / part)).samples[::-1]
        rows = [f"{os.path.relpath(path, data)} {label}\n" for path, label in samples]
        (data.parent / f"{part}.txt").write_text("".join(rows))
    return data.parent


def of_lists(folder, **how):
    return load(str(folder / "data"), train_list=str(folder / "train.txt"), val_list=str(folder / "val.txt"), **how)


def test_lists_of_files(listed):
    train, test = of_lists(listed)
    whole = read_folder(str(listed / "data" / "train"))
    assert train.samples == whole.samples[::-1]
    assert (train.classes, test.classes) == (["0", "1", "2"], ["0", "1", "2"])
    assert test.samples == read_folder(str(listed / "data" / "val")).samples[::-1]
    assert of_lists(listed, imb_type="exp", imb_factor=0.1)[0].get_cls_num_list() == [12, 3, 1]


def test_other_forms_of_lists(listed):
    rows = (listed / "train.txt").read_text().splitlines()
    absolute = [f"{listed}/data/{rows[0]}", f"./train/../{rows[1]}", *rows[2:]]
    (listed / "train.txt").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(absolute).replace(" 2", "\t2").encode() + b"\r\n\n"
    )
    assert [pathlib.Path(path).exists() for path in of_lists(listed)[0].paths] == [True] * 23
    assert of_lists(listed)[0].targets == [2] * 4 + [1] * 7 + [0] * 12


def test_train_list_alone_needs_a_fraction(listed):
    files = {"train_list": str(listed / "train.txt")}
    train, test = load(str(listed / "data"), test_fraction=0.5, **files)
    assert (train.get_cls_num_list(), test.get_cls_num_list()) == ([6, 3, 2], [6, 4, 2])
    with pytest.raises(UsageError, match="--train_list needs --val_list"):
        load(str(listed / "data"), **files)
    with pytest.raises(UsageError, match="--val_list needs --train_list"):
        load(str(listed / "data"), val_list=str(listed / "val.txt"))


def test_images_of_both_lists_are_counted(listed, capsys):
    rows = (listed / "train.txt").read_text().splitlines(keepends=True)
    (listed / "val.txt").write_text("".join([rows[0], rows[10], rows[22]]))
    of_lists(listed)
    assert "3 of the 3 images of" in capsys.readouterr().err


def test_a_test_list_without_a_class_is_refused(listed):
    rows = (listed / "val.txt").read_text().splitlines(keepends=True)
    (listed / "val.txt").write_text("".join(row for row in rows if row.endswith(" 1\n")))
    with pytest.raises(DataError, match=r"val\.txt has no images of classes of the training list: 0, 2$"):
        of_lists(listed)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("train/class0/0.jpg", "line 24: .*is not 'path label'"),
        ("train/class0/0.jpg one", "line 24: .*is not 'path label'"),
        ("train/class0/0.jpg -1", "line 24: .*is not 'path label'"),
        ("train/class0/0.jpg 1.0", "line 24: .*is not 'path label'"),
        ("train/class0/0.jpg " + "9" * 5000, "line 24: .*is not 'path label'"),
        ("0", "line 24: .*is not 'path label'"),
        ("../../secret.jpg 0", r"names files outside .*data: \.\./\.\./secret\.jpg"),
        ("../data2/a.jpg 0", "names files outside"),
        ("/etc/hosts.jpg 0", "names files outside"),
        ("train/no\0name.jpg 0", r"names files outside .*no\\x00name"),
        ("train/class0/none.jpg 0", "1 of 24 files are missing .*none.jpg"),
        ("train/pipe.jpg 0", "1 of 24 files are missing .*pipe.jpg"),
        ("train/class0/../class0/1.jpg 0", "duplicated files: .*train/class0/1.jpg"),
        ("val/class0/0.jpg 4", "labels must be 0 to K - 1 without gaps, none of its 24 images has 3"),
        ("val/class0/0.jpg 999999999", "without gaps, none of its 24 images has 3"),
    ],
)
def test_wrong_rows_of_a_list_are_named(listed, row, message):
    os.mkfifo(listed / "data" / "train" / "pipe.jpg")
    with open(listed / "train.txt", "a") as file:
        file.write(f"{row}\n")
    with pytest.raises(DataError, match=message) as error:
        of_lists(listed)
    assert "\n" not in str(error.value)
    assert str(listed / "train.txt") in str(error.value)


def test_lists_that_cannot_be_used(listed):
    with open(listed / "val.txt", "a") as file:
        file.write("train/class0/0.jpg 3\n")
    with pytest.raises(DataError, match=r"val\.txt has the label 3, the training list has labels 0 to 2"):
        of_lists(listed)
    (listed / "val.txt").write_text("\n")
    with pytest.raises(DataError, match=r"val\.txt lists no images"):
        of_lists(listed)
    (listed / "val.txt").unlink()
    with pytest.raises(DataError, match=r"val\.txt cannot be read: No such file"):
        of_lists(listed)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        read_list(str(listed), str(listed / "data"))
    (listed / "train.txt").write_bytes(b"\xff\xfe\x00\xd8 1")
    with pytest.raises(DataError, match=r"names files outside|are missing"):
        of_lists(listed)


# -------------------------------------------------------------------------------------------------- images


def test_grey_images_become_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "big.tif", "deep.pgm"])
def test_16_bit_images_are_scaled(tmp_path, name):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5\n8 8\n65535\n" + levels.astype(">u2").tobytes())
    elif name == "big.tif":
        Image.frombytes("I;16B", (8, 8), levels.astype(">u2").tobytes()).save(tmp_path / name)
    else:
        Image.fromarray(levels).save(tmp_path / name)
    found = read_image(tmp_path / name)
    assert found.shape == (8, 8, 3)
    assert np.array_equal(found[..., 1], levels // 256)
    assert len(np.unique(found)) == 64


def test_pixels_of_unknown_range_are_refused_by_name(tmp_path):
    share = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(share).save(tmp_path / "share.tif")
    Image.fromarray((share * 2**30).astype(np.int32)).save(tmp_path / "wide.tif")
    for name, kind in (("share.tif", "float"), ("wide.tif", "32-bit")):
        with pytest.raises(DataError, match=f"{name} has {kind} pixels, whose range is unknown: convert it"):
            open_image(tmp_path / name)


def test_what_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff\xe0nothing")
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(DataError, match=r"bad\.jpg cannot be decoded"):
        open_image(tmp_path / "bad.jpg")
    for name in ("pipe.jpg", "none.jpg", "folder.jpg"):
        with pytest.raises(DataError, match=f"{name} is missing or no regular file"):
            open_image(tmp_path / name)


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_the_line_of_an_undecodable_image_names_it_once(tmp_path, kind):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(DataError) as error:
        open_image(kind(tmp_path / "bad.jpg"))
    assert str(error.value) == f"{tmp_path / 'bad.jpg'} cannot be decoded (cannot identify image file)"


# --------------------------------------------------------------------------------------------- iNaturalist


@pytest.mark.parametrize("part", ["train", "val"])
def test_an_empty_list_of_inaturalist_is_refused(tmp_path, part):
    (tmp_path / "train_val2018" / "a").mkdir(parents=True)
    image_of(0, 0).save(tmp_path / "train_val2018" / "a" / "0.jpg")
    row = '{"images": [{"id": 1, "file_name": "train_val2018/a/0.jpg"}], '
    row += '"annotations": [{"image_id": 1, "category_id": 5}]}'
    for name in ("train", "val"):
        (tmp_path / f"{name}2018.json").write_text(row)
    train, _ = imbalance_inat.load(str(tmp_path))
    assert (train.targets, train.classes) == ([0], ["5"])
    (tmp_path / f"{part}2018.json").write_text('{"images": [], "annotations": []}')
    with pytest.raises(DataError, match=f"{part}2018.json lists no images"):
        imbalance_inat.load(str(tmp_path))


def test_images_of_inaturalist_are_checked(tmp_path):
    (tmp_path / "train_val2018").mkdir()
    (tmp_path / "train_val2018" / "0.jpg").write_bytes(b"no image")
    row = '{"images": [{"id": 1, "file_name": "train_val2018/0.jpg"}], '
    row += '"annotations": [{"image_id": 1, "category_id": 5}]}'
    for name in ("train", "val"):
        (tmp_path / f"{name}2018.json").write_text(row)
    imbalance_inat.load(str(tmp_path))
    with pytest.raises(DataError, match="2 of 2 images are damaged"):
        imbalance_inat.load(str(tmp_path), check_images=True)


def test_names_are_shown_up_to_a_limit():
    assert imbalance_folder.named(["a\n", "b"]) == "a\\n, b"
    assert imbalance_folder.named([*"abcdefg"]) == "a, b, c, d, e and 2 more"
