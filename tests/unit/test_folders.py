"""Folders and lists of images: what is read, skipped and refused; the three parts; decoding."""

import os
import pathlib
import runpy
import shutil
import warnings
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import ImageFolder

import imbalance
from files import files_sha256
from imbalance_folder import ImageSet, load, open_image, read_folder, read_list, share_to_test
from utils import DataError, UsageError

COUNTS = (12, 7, 4)


def save(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 255, (8, 8, 3)).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """train/ and val/ with three classes; some images lie deeper."""
    root = tmp_path_factory.mktemp("source") / "data"
    for part, counts in (("train", COUNTS), ("val", (2, 2, 2))):
        for label, count in enumerate(counts):
            for number in range(count):
                deeper = "more" if number % 4 == 3 else "."
                save(root / part / f"class{label}" / deeper / f"{number}.jpg", 100 * label + number + len(part))
    return root


@pytest.fixture
def data(source, tmp_path):
    return shutil.copytree(source, tmp_path / "data")


@pytest.fixture
def train(data):
    return data / "train"


def counts(folder, **how):
    return read_folder(str(folder), **how).get_cls_num_list()


# ------------------------------------------------------------------------------------------------- folders


def test_folder_is_read_as_torchvision_reads_it(source):
    theirs, images = ImageFolder(str(source / "train")), read_folder(str(source / "train"))
    assert (images.samples, images.classes) == (theirs.samples, theirs.classes)
    assert images.chosen.tolist() == list(range(23))
    assert (images.num_classes, images.flip, images.image_size) == (3, True, 224)


def test_natural_imbalance_is_kept_and_another_one_made(data):
    images = read_folder(str(data / "train"))
    assert load(str(data))[0].samples == images.samples
    tailed, _ = load(str(data), "exp", 0.1, 4)
    assert tailed.chosen.tolist() == imbalance.choose(images.targets, [12, 3, 1], 4).tolist()
    assert tailed.samples == [images.samples[i] for i in tailed.chosen]
    with pytest.raises(UsageError, match="leaves 1 of 3 classes empty"):
        load(str(data), "exp", 0.01)
    with pytest.raises(UsageError, match="use --val_fraction"):
        tailed.left_out(2)


def test_links_to_images_and_to_classes_are_followed_but_none_to_a_folder_in_a_class(train, tmp_path, capsys):
    shutil.move(train / "class2", tmp_path / "elsewhere")
    (train / "class2").symlink_to(tmp_path / "elsewhere")
    assert counts(train) == list(COUNTS)
    (train / "class0" / "self").symlink_to(".")
    (train / "class0" / "out").symlink_to(tmp_path / "elsewhere")
    (train / "class0" / "a.jpg").symlink_to(tmp_path / "elsewhere" / "0.jpg")
    assert counts(train) == [COUNTS[0] + 1, *COUNTS[1:]]
    assert "links to folders: 2" in capsys.readouterr().err


def test_what_is_skipped_is_counted(train, capsys):
    folder = train / "class1"
    for hidden in (".ipynb_checkpoints", "class0/.thumbs", "class1/@eaDir/0.jpg", "class1/more/__MACOSX"):
        save(train / hidden / "deeper" / "a.jpg")
    save(folder / "._a.jpg")
    (folder / "0.gif").write_bytes(b"GIF89a")
    (folder / "1.gif").write_bytes(b"GIF89a")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.jpg").symlink_to("nowhere")
    (train / "class3").symlink_to("nowhere")
    save(train / "loose.jpg")
    assert counts(train) == list(COUNTS)
    err = capsys.readouterr().err
    for skipped in ("broken links: 1", "hidden: 5", "images in no class: 1", ".gif: 2", "not regular files: 2"):
        assert skipped in err


def test_other_endings_are_read(train, capsys):
    for old, new in (("0.jpg", "0.jfif"), ("1.jpg", "1.JPE")):
        (train / "class2" / old).rename(train / "class2" / new)
    Image.open(train / "class2" / "2.jpg").save(train / "class2" / "2.avif")
    found = read_folder(str(train))
    assert found.get_cls_num_list() == [12, 7, 5]
    assert [open_image(path).size for path in found.paths[-5:]] == [(8, 8)] * 5
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "folder .*train cannot be read: No such file"),
        (lambda train: [shutil.rmtree(train / f"class{k}") for k in range(3)], "no class folders in"),
        (
            lambda train: save(train / "caf\u00e9/0.jpg") or save(train / "cafe\u0301/0.jpg"),
            "names differ in Unicode normal form only: caf\u00e9; rename one",
        ),
    ],
    ids=["no folder", "no classes", "unicode"],
)
def test_folders_that_cannot_be_trained_on(train, change, message):
    change(train)
    with pytest.raises(DataError, match=message):
        read_folder(str(train))


def test_a_folder_that_cannot_be_read_is_named(train, monkeypatch):
    """As root every folder can be read, hence the patch."""
    scandir = os.scandir

    def refuse(path):
        if os.fspath(path).endswith("more"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"folder .*/class0/more cannot be read: Permission denied"):
        read_folder(str(train))


# ------------------------------------------------------------------------------------------------- parts


def test_load_gives_both_parts_of_the_same_classes(data, capsys):
    train, test = load(str(data), "exp", 0.1, 4, mean=(0.1, 0.2, 0.3), exif=True)
    assert (train.get_cls_num_list(), test.get_cls_num_list()) == ([12, 3, 1], [2, 2, 2])
    assert train.mean == test.mean == (0.1, 0.2, 0.3)
    assert train.subset([0]).std == test.std == (0.229, 0.224, 0.225)
    assert train.exif
    assert test.exif
    assert capsys.readouterr().err == ""
    (data / "val").rename(data / "test")
    assert load(str(data))[1].get_cls_num_list() == [2, 2, 2]
    shutil.copytree(data / "test", data / "val")
    load(str(data))
    assert f"{data}/test is not used, {data}/val is the test set" in capsys.readouterr().err
    load(str(data), test_fraction=0.3, classes=["class0", "class1", "class2"])  # of a model tested on a part
    err = capsys.readouterr().err
    assert all(
        f"{data}/{part} is not used, a part of the training images is the test set" in err for part in ("val", "test")
    )
    shutil.rmtree(data / "train")
    shutil.rmtree(data / "test")
    (data / "val").rename(data / "Val")
    load(str(data / "Val"), test_fraction=0.3)
    assert "is not used" not in capsys.readouterr().err
    shutil.copytree(data / "Val", data / "train")
    load(str(data), test_fraction=0.3)
    assert f"{data}/Val is not used" in capsys.readouterr().err
    shutil.rmtree(data / "train")
    (data / "Val").rename(data / "val")  # what is left is tested on whole
    assert load(str(data), test_fraction=0.3, classes=["class0", "class1", "class2"])[1].get_cls_num_list() == [2, 2, 2]
    assert "is not used" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "no folder .*data: --data_dir"),
        (
            lambda data: shutil.rmtree(data / "train"),
            "no folder .*/train beside val/: it must hold a folder for each class",
        ),
        (lambda data: shutil.rmtree(data / "val"), "no val/ or test/ in .*: --val_fraction F holds out two parts"),
        (lambda data: (data / "train/empty").mkdir(), "no training images of the classes empty"),
        (
            lambda data: [path.rename(path.with_suffix(".heic")) for path in [*(data / "train").rglob("*.*")]],
            "no training images in .*data .images end in .jpg",
        ),
        (lambda data: [shutil.rmtree(data / "train" / f"class{k}") for k in (0, 2)], "has one class, class1: training"),
        (lambda data: (data / "val/class2").rename(data / "val/a\n"), r"classes without training images: a\\n$"),
        (lambda data: [shutil.rmtree(path) or path.mkdir() for path in (data / "val").iterdir()], "no test images"),
    ],
    ids=["no data", "no train", "no val", "empty class", "no images", "one class", "foreign class", "no test images"],
)
def test_parts_that_do_not_fit(data, change, message):
    change(data)
    with pytest.raises((DataError, UsageError), match=message):
        load(str(data))


def test_a_class_without_test_images_is_named_and_trained(data, capsys):
    shutil.rmtree(data / "val" / "class1")
    shutil.rmtree(data / "val" / "class2")
    (data / "val" / "class2").mkdir()
    train, test = load(str(data))
    assert (train.get_cls_num_list(), test.get_cls_num_list()) == (list(COUNTS), [2, 0, 0])
    assert test.classes == train.classes
    err = capsys.readouterr().err
    assert "no test image of 2 classes" in err
    assert "class1, class2" in err


def test_test_images_that_are_training_images_are_counted(data, tmp_path, capsys):
    for name in ("train/class1/0.jpg", "val/class0/0.jpg"):  # links to one file on both sides
        (data / name).unlink()
        save(tmp_path / "pool" / "0.jpg")
        (data / name).symlink_to(tmp_path / "pool" / "0.jpg")
    load(str(data))
    assert "1 of the 6 images" in capsys.readouterr().err
    shutil.rmtree(data / "val" / "class2")
    (data / "val" / "class2").symlink_to(data / "train" / "class2")
    load(str(data))
    assert "5 of the 8 images" in capsys.readouterr().err
    shutil.rmtree(data / "val")
    (data / "val").symlink_to("train")
    load(str(data))
    assert "23 of the 23 images" in capsys.readouterr().err


def test_three_parts_of_one_folder(data):
    """--val_fraction without val/: what is tested on neither trains nor chooses the epoch."""
    shutil.rmtree(data / "val")
    share = share_to_test(str(data), val_fraction=0.25)
    assert share == 0.25
    train, test = load(str(data), test_fraction=share)
    train, val = train.hold_out(0.25)
    assert [part.get_cls_num_list() for part in (train, val, test)] == [[7, 4, 2], [2, 1, 1], [3, 2, 1]]
    assert sorted([*train.chosen, *val.chosen, *test.chosen]) == list(range(23))
    assert len({*train.paths, *val.paths, *test.paths}) == 23


def test_a_list_is_tested_on_in_the_place_of_a_held_out_part(data):
    shutil.rmtree(data / "val")
    (data / "new.csv").write_text("image,label\ntrain/class1/0.jpg,class1\n")
    _, test = load(str(data), test_fraction=0.25, val_list=str(data / "new.csv"))
    assert [os.path.relpath(path, data) for path in test.paths] == ["train/class1/0.jpg"]


def test_where_the_test_images_come_from(data):
    folder = str(data)
    assert share_to_test(folder, val_fraction=0.25) == 0  # val/
    with pytest.raises(UsageError, match=r"--test_fraction 0.2: the test images are those of .*/val"):
        share_to_test(folder, 0.1, 0.2)
    (data / "val").rename(data / "elsewhere")
    assert share_to_test(folder, 0.1, 0.2) == share_to_test(folder, 0, 0.2) == 0.2
    assert share_to_test(folder, 0.1, train_list="a.txt", val_list="b.txt") == 0
    with pytest.raises(UsageError, match=r"no val/ or test/ in .*: --val_fraction F holds out two parts"):
        share_to_test(folder)
    with pytest.raises(UsageError, match=r"no --val_list: --val_fraction F"):
        share_to_test(folder, train_list="a.txt")
    with pytest.raises(UsageError, match="--val_list needs --train_list"):
        share_to_test(folder, val_list="a.txt")
    with pytest.raises(UsageError, match="no folder nowhere: --data_dir"):
        share_to_test("nowhere", 0.1)


def test_class_folders_without_train(data, capsys):
    folder = str(data / "train")
    train, test = load(folder, test_fraction=share_to_test(folder, 0.5))
    assert (train.get_cls_num_list(), test.get_cls_num_list()) == ([6, 3, 2], [6, 4, 2])
    assert f"no train/ in {folder}" in capsys.readouterr().err


def test_classes_of_one_image_have_no_test_image_and_are_named(data, capsys):
    def keep_one(name):
        for path in sorted(path for path in (data / "train" / name).rglob("*") if path.is_file())[1:]:
            path.unlink()

    shutil.rmtree(data / "val")
    keep_one("class1")
    train, test = load(str(data), test_fraction=0.5)
    assert (train.get_cls_num_list(), test.get_cls_num_list()) == ([6, 1, 2], [6, 0, 2])
    assert "no test image of 1 classes, whose accuracy is n/a: class1\n" in capsys.readouterr().err
    keep_one("class0")
    keep_one("class2")
    with pytest.raises(UsageError, match="no class has two images"):
        load(str(data), test_fraction=0.5)


@pytest.mark.parametrize("below", ["val", "test", "."])
def test_a_test_folder_of_its_own_is_labelled_by_the_checkpoints_classes(data, below):
    """Without training images, with fewer classes, in the checkpoint's order."""
    new = data.parent / "new" / below
    shutil.copytree(data / "val", new)
    shutil.rmtree(new / "class1")
    train, test = load(str(data.parent / "new"), "exp", 0.01, classes=["class2", "class1", "class0"])
    assert train.paths == []
    assert [(pathlib.Path(path).parent.name, label) for path, label in test.samples] == [
        ("class0", 2), ("class0", 2), ("class2", 0), ("class2", 0),
    ]  # fmt: skip
    with pytest.raises(DataError, match="classes without training images: class2"):
        load(str(data.parent / "new"), classes=["class0", "class1"])


# ----------------------------------------------------------------------------------------- damaged images


def test_damaged_images_are_found_at_the_start(data, capsys):
    workers = 3
    assert len(load(str(data), check_images=True, workers=workers)[0].paths) == 23
    cut = data / "train" / "class0" / "0.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    load(str(data), workers=workers)
    with pytest.raises(DataError, match=r"^1 of 29 images are damaged \(--skip_damaged .*0\.jpg cannot be decoded"):
        load(str(data), check_images=True, workers=workers)
    train, test = load(str(data), skip_damaged=True, workers=workers)
    assert (train.get_cls_num_list(), test.get_cls_num_list()) == ([11, 7, 4], [2, 2, 2])
    assert train.chosen.tolist() == list(range(1, 23))
    assert f"warning: 1 of 29 images are damaged and left out: {cut} cannot be decoded" in capsys.readouterr().err
    (data / "val" / "class1" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"^2 of 29 images are damaged, --skip_damaged leaves out 5% at most: .*class1/0"
    ):
        load(str(data), skip_damaged=True, workers=workers)
    named = [line for line in capsys.readouterr().err.splitlines() if "cannot be decoded" in line]
    assert [f"{cut} " in named[0], "class1" in named[1]] == [True, True], "each on a line of its own"


def test_classes_that_differ_in_case_only_are_named(data, capsys):
    (data / "train.csv").write_text("image,label\nval/class0/0.jpg,Rust\nval/class1/0.jpg,rust\n")
    assert read_list(data / "train.csv", data).classes == ["Rust", "rust"]
    assert "differ in upper and lower case only: Rust, rust" in capsys.readouterr().err


def test_folders_that_differ_in_case_only_are_named_once(data, capsys):
    for part in ("train", "val"):
        save(data / part / "Class0" / "0.jpg", 7)
    load(str(data))
    assert capsys.readouterr().err.count("differ in upper and lower case only: Class0, class0") == 1


def test_other_images_are_held_out_with_another_rand_number(data):
    shutil.rmtree(data / "val")
    tested = [set(load(str(data), rand_number=n, test_fraction=0.25)[1].paths) for n in (0, 0, 1)]
    assert tested[0] == tested[1] != tested[2]


@pytest.mark.parametrize("listed", [["a.jpg", "b.jpg"], ["x/a.jpg", "y/b.jpg"], ["train/x/a.jpg", "val/x/b.jpg"]])
def test_the_hash_of_images_follows_a_folder_that_is_moved(listed, tmp_path, monkeypatch):
    for name in listed:
        path = tmp_path / "one" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())

    def of(folder):
        return files_sha256([(os.path.join(folder, name), 0) for name in listed])

    before = of(tmp_path / "one")
    monkeypatch.chdir(tmp_path / "one")
    assert of(".") == before
    (tmp_path / "one").rename(tmp_path / "two")
    assert of(tmp_path / "two") == before
    (tmp_path / "two" / listed[0]).write_bytes(b"of another size")
    assert of(tmp_path / "two") != before


def test_a_class_of_damaged_images_is_an_error(data):
    for path in list((data / "train" / "class2").rglob("*.jpg"))[1:]:
        path.unlink()
    next((data / "train" / "class2").rglob("*.jpg")).write_bytes(b"no image")
    with pytest.raises(DataError, match="no training images of the classes class2"):
        load(str(data), skip_damaged=True)


# --------------------------------------------------------------------------------------------------- lists


@pytest.fixture
def listed(data):
    """The folder's images as two lists, in another order, and a path with spaces."""
    (data / "train" / "class1" / "0.jpg").rename(data / "train" / "class1" / "with two spaces.jpg")
    for part in ("train", "val"):
        samples = read_folder(str(data / part)).samples[::-1]
        rows = [(os.path.relpath(path, data), label) for path, label in samples]
        (data.parent / f"{part}.txt").write_text("".join(f"{path} {label}\n" for path, label in rows))
        lines = [f'8,"{path}",class{label}{" " * (label % 2)}' for path, label in rows]  # a blank is no part of a name
        (data.parent / f"{part}.csv").write_text("\r\n".join(["width, image,label", *lines, ""]))
    return data.parent


def of_lists(folder, ending="txt", **how):
    lists = {f"{part}_list": str(folder / f"{part}.{ending}") for part in ("train", "val")}
    return load(str(folder / "data"), **lists, **how)


@pytest.mark.parametrize(("ending", "classes"), [("txt", ["0", "1", "2"]), ("csv", ["class0", "class1", "class2"])])
def test_lists_of_files(listed, ending, classes):
    train, test = of_lists(listed, ending)
    assert train.samples == read_folder(str(listed / "data" / "train")).samples[::-1]
    assert test.samples == read_folder(str(listed / "data" / "val")).samples[::-1]
    assert train.classes == test.classes == classes
    assert of_lists(listed, ending, imb_type="exp", imb_factor=0.1)[0].get_cls_num_list() == [12, 3, 1]


def test_other_forms_of_lists(listed):
    rows = (listed / "train.txt").read_text().splitlines()
    absolute = [f"{listed}/data/{rows[0]}", f"./train/../{rows[1]}", *rows[2:]]
    text = "\r\n".join(absolute).replace(" 2", "\t2") + "\r\n\n"
    (listed / "train.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [pathlib.Path(path).exists() for path in of_lists(listed)[0].paths] == [True] * 23
    assert of_lists(listed)[0].targets == [2] * 4 + [1] * 7 + [0] * 12
    (listed / "train.csv").write_text("label,image\n1,val/class0/0.jpg\n10,val/class1/0.jpg\n")
    with pytest.raises(DataError, match=r"without gaps, none of its 2 images has 0 \(labels from 1 on: subtract 1\)"):
        read_list(listed / "train.csv", listed / "data")
    (listed / "train.csv").write_text("label,image\n01,val/class0/0.jpg\n00,val/class1/0.jpg\n")
    assert read_list(listed / "train.csv", listed / "data").classes == ["00", "01"], "padded numbers are names"
    odd = "val/class0/0\x85\u2028.jpg"  # which str.splitlines cuts
    (listed / "data/val/class0/0.jpg").rename(listed / "data" / odd)
    (listed / "train.txt").write_text(f"{odd} 0\nval/class1/0.jpg 1\n", encoding="utf-8")
    assert len(read_list(listed / "train.txt", listed / "data").paths) == 2


def test_a_part_of_the_training_list_for_testing(listed):
    train, test = load(str(listed / "data"), test_fraction=0.5, train_list=str(listed / "train.txt"))
    assert (train.get_cls_num_list(), test.get_cls_num_list()) == ([6, 3, 2], [6, 4, 2])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("train/class0/0.jpg -1", "line 24: .*is not 'path label'"),
        ("0", "line 24: .*is not 'path label'"),
        ("train/class0/none.jpg 0", "1 of 24 files are missing .*none.jpg"),
        ("train/pipe.jpg 0", "1 of 24 files are missing .*pipe.jpg"),
        ("train/class0/../class0/1.jpg 0", "duplicated files: .*train/class0/1.jpg"),
        ("val/class0/0.jpg 4", "labels must be 0 to K - 1 without gaps, none of its 24 images has 3"),
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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("val.txt", b"train/class0/0.jpg 3\n", "has labels that the training list does not have: 3"),
        ("val.txt", b"\n", "lists no images"),
        ("val.txt", None, "cannot be read: No such file"),
        ("train.txt", "train/class0/0.jpg 0\n".encode("utf-16"), "is UTF-16: save it as UTF-8"),
        ("train.csv", b"train/class0/0.jpg,0\n", "first line must be image,label, .* it is 'train/class0/0.jpg,0'"),
        ("train.csv", b"Image;Label\ntrain/class0/0.jpg;0\n", "separated by a comma: it is 'Image;Label'"),
        ("train.csv", b"image,label,label\ntrain/class0/0.jpg,0,1\n", "first line must be image,label"),
        ("train.csv", b"image,label\na.jpg,Shoes, men\n", "line 2: 3 fields, but 2 in the first line: quote"),
        ("train.csv", b"image,label\ntrain/class0/0.jpg\n", "line 2: a row needs an image and its label"),
        ("train.csv", b'image,label\nb.jpg,"cat\nc.jpg,dog"\n', "line 2: .*a quoted field must end in its line"),
        ("train.csv", b'image,label,"note\na.jpg,0,"b"\n', "line 1: .*a quoted field must end in its line"),
    ],
)
def test_lists_that_cannot_be_used(listed, name, content, message):
    (listed / name).unlink()
    if content is not None:
        (listed / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}.* {message}|{name},? {message}"):
        of_lists(listed, name[-3:])


# -------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize("name", ["deep.png", "big.tif", "deep.pgm"])
def test_16_bit_images_are_scaled(tmp_path, name):
    levels = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5\n8 8\n65535\n" + levels.astype(">u2").tobytes())
    elif name == "big.tif":
        Image.frombytes("I;16B", (8, 8), levels.astype(">u2").tobytes()).save(tmp_path / name)
    else:
        Image.fromarray(levels).save(tmp_path / name)
    found = np.asarray(open_image(tmp_path / name))
    assert found.shape == (8, 8, 3)
    assert np.array_equal(found[..., 1], levels // 256)
    assert len(np.unique(found)) == 64


LEVELS = np.random.RandomState(0).randint(0, 255, (8, 6, 4)).astype(np.uint8)
TURNED = Image.Exif()
TURNED[0x0112] = 6
#: Images that decoders differ on: file, its pixels, how it is saved.
ODD = {
    "grey.png": (LEVELS[..., 0], {}),
    "grey and alpha.png": (LEVELS[..., :2], {}),
    "alpha.webp": (LEVELS, {"lossless": True}),
    "palette and alpha.png": (Image.fromarray(LEVELS[..., :3]).quantize(9), {"transparency": bytes([0, 128, 7])}),
    "cmyk, turned.jpg": (Image.fromarray(LEVELS[..., :3]).convert("CMYK"), {"exif": TURNED}),
    "scan.tif": (LEVELS[..., 0], {"tiffinfo": {0x0112: 6}}),  # always turned, not compressed
    "animated.png": (LEVELS[..., :3], {"save_all": True, "append_images": [Image.new("RGB", (6, 8))]}),
    "animated.webp": (
        LEVELS[..., :3],
        {"save_all": True, "append_images": [Image.new("RGB", (6, 8))], "lossless": True},
    ),
}


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("name", ODD)
def test_odd_images_are_as_torchvision_makes_them(tmp_path, name):
    """Without transparency and orientation, of an animation the first frame."""
    from torchvision.datasets.folder import pil_loader

    pixels, how = ODD[name]
    (Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels).save(tmp_path / name, **how)
    found = np.asarray(open_image(tmp_path / name))
    assert np.array_equal(found, pil_loader(str(tmp_path / name)))
    assert np.array_equal(np.asarray(open_image(tmp_path / name, exif=True)), np.rot90(found, -("exif" in how)))
    if name.startswith("animated"):
        assert np.array_equal(found, pixels)


def test_images_that_cannot_be_used_are_named_once(tmp_path, monkeypatch):
    share = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(share).save(tmp_path / "share.tif")
    Image.fromarray((share * 2**30).astype(np.int32)).save(tmp_path / "wide.tif")
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    broken = mock.Mock(side_effect=RuntimeError("as AVIF's"))
    monkeypatch.setitem(Image.OPEN, "BMP", (broken, lambda prefix: prefix[:2] == b"BM"))
    (tmp_path / "odd.bmp").write_bytes(b"BM" + bytes(100))
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    reasons = {
        "share.tif": "has float pixels, whose range is unknown: convert it to 8 or 16 bits",
        "wide.tif": "has 32-bit pixels, whose range is unknown: convert it to 8 or 16 bits",
        "bad.jpg": "cannot be decoded (cannot identify image file)",
        "odd.bmp": "cannot be decoded (as AVIF's)",
        **dict.fromkeys(("pipe.jpg", "folder.jpg", "none.jpg"), "is missing or not a regular file"),
    }
    for name, reason in reasons.items():
        with pytest.raises(DataError) as error:
            open_image(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name} {reason}"
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2_000_000)
    Image.new("1", (3000, 2000)).save(tmp_path / "huge.png")
    with pytest.raises(
        DataError, match=r"huge.png has over 4 megapixels, .*: make it smaller, or leave it out with --"
    ):
        open_image(tmp_path / "huge.png")


def test_libraries_warn_of_nothing_that_is_right(tmp_path, monkeypatch):
    """Pillow of palettes and large images, torch of -j. The modules are run again, under their own warning filters."""
    Image.fromarray(LEVELS[..., :3]).quantize(9).save(tmp_path / "a.png", transparency=bytes([0, 128, 7]))
    path, root = str(tmp_path / "a.png"), pathlib.Path(__file__).parents[2]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        read = runpy.run_path(str(root / "imbalance_folder.py"))["open_image"]
        batches = runpy.run_path(str(root / "loaders" / "image_folder.py"))["ImageFileBatches"]
        read(path)
        batches(ImageSet([path], [0], ["a"]), 1, image_size=8, workers=999)
    assert [str(warning.message) for warning in seen] == []
