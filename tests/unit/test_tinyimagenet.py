"""Tiny ImageNet's archive put in order, and the data set made from it."""

import functools
import hashlib
import http.server
import os
import re
import runpy
import shutil
import sys
import threading
import zipfile
from unittest import mock

import pytest
from script_runner import fails, refused, run_script, snapshot
from tinyimagenet_maker import FOLDER, make_layout, pack
from torchvision.datasets import ImageFolder

import imbalance
import imbalance_tinyimagenet as tiny
from utils import DataError, UsageError


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder that holds tiny-imagenet-200 in the official layout: 3 classes, 4 and 2 images each."""
    root = tmp_path_factory.mktemp("source")
    make_layout(root)
    return root


@pytest.fixture(scope="module")
def archive(source, tmp_path_factory):
    return pack(source, tmp_path_factory.mktemp("archive") / "tiny.zip")


@pytest.fixture
def data_dir(tmp_path):
    return tmp_path / "data"


@pytest.fixture
def raw(source, data_dir):
    """An unpacked folder, not arranged."""
    shutil.copytree(source / FOLDER, data_dir / FOLDER)
    return data_dir / FOLDER


def annotated(folder):
    rows = (folder / "val" / "val_annotations.txt").read_text().splitlines()
    return {row.split("\t")[0]: row.split("\t")[1] for row in rows}


def assert_arranged(folder, source):
    """Every image of the source is in its place, with its content; nothing else is in train and val."""
    labels = annotated(source)
    expected = {f"val/{label}/{name}": (source / "val/images" / name).read_bytes() for name, label in labels.items()}
    for path in source.glob("train/*/images/*"):
        expected[str(path.relative_to(source))] = path.read_bytes()
    images = {path.relative_to(folder): path for path in folder.rglob("*.JPEG")}
    found = {str(name): path.read_bytes() for name, path in images.items() if "test" not in name.parts}
    assert found == expected
    assert not (folder / "val" / "images").exists()
    validation = ImageFolder(str(folder / "val"))
    for path, label in validation.samples:
        assert validation.classes[label] == labels[os.path.basename(path)]


run = functools.partial(run_script, tiny)


# --------------------------------------------------------------------------------------------- what is right


def test_command_arranges_an_archive_and_then_changes_nothing(archive, source, data_dir):
    status, out, err = run(["--data_dir", data_dir, "--zip", archive], data_dir.parent)
    assert (status, err) == (0, "")
    assert "train: 12 images, 3 classes" in out
    assert "val: 6 images, 3 classes" in out
    assert out.endswith("arranged\n")
    assert_arranged(data_dir / FOLDER, source / FOLDER)
    assert os.listdir(data_dir) == [FOLDER]
    before = snapshot(data_dir)
    for again in ([], ["--zip", archive]):
        status, out, err = run(["--data_dir", data_dir, *again], data_dir)
        assert (status, err) == (0, "")
        assert out.endswith("nothing to change\n")
        assert snapshot(data_dir) == before


def test_the_file_is_the_command(archive, data_dir, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["imbalance_tinyimagenet.py", "--data_dir", str(data_dir), "--zip", str(archive)])
    runpy.run_path(tiny.__file__, run_name="__main__")
    assert capsys.readouterr().out.endswith("val: 6 images, 3 classes\narranged\n")


def test_unpacked_folder(raw, source):
    assert tiny.arrange(raw.parent) == (str(raw), True)
    assert_arranged(raw, source / FOLDER)
    assert tiny.arrange(raw.parent) == (str(raw), False)


def test_a_folder_without_a_part_is_refused(raw):
    shutil.rmtree(raw / "val")
    with pytest.raises(DataError, match=f"{FOLDER} has no val: delete it"):
        tiny.arrange(raw.parent)


def test_a_foreign_file_among_the_validation_images_is_kept(raw):
    (raw / "val/images/notes.txt").write_text("mine")
    before = snapshot(raw)
    with pytest.raises(DataError, match=r"val/images has files that .*val_annotations.txt does not list: notes.txt"):
        tiny.arrange(raw.parent)
    assert snapshot(raw) == before
    (raw / "val/images/notes.txt").unlink()
    assert tiny.arrange(raw.parent) == (str(raw), True)


def test_folder_arranged_earlier_by_others(raw):
    """val/<wnid>/images/, the annotation file deleted, no wnids.txt: right as it is."""
    for name, label in annotated(raw).items():
        (raw / "val" / label / "images").mkdir(parents=True, exist_ok=True)
        shutil.move(raw / "val/images" / name, raw / "val" / label / "images" / name)
    (raw / "val/images").rmdir()
    before = snapshot(raw)
    assert tiny.arrange(raw.parent, check_images=True) == (str(raw), False)
    (raw / "val/val_annotations.txt").unlink()
    (raw / "wnids.txt").unlink()
    assert tiny.arrange(raw.parent, check_images=True) == (str(raw), False)
    assert {k: v for k, v in before.items() if k in snapshot(raw)} == snapshot(raw)


def test_folder_arranged_by_copying(raw, source):
    """The raw images are still there: they take the place of their copies."""
    for name, label in annotated(raw).items():
        (raw / "val" / label).mkdir(exist_ok=True)
        shutil.copy(raw / "val/images" / name, raw / "val" / label / name)
    assert tiny.arrange(raw.parent) == (str(raw), True)
    assert_arranged(raw, source / FOLDER)


def test_stopped_between_two_moves(raw, source):
    replace, calls = os.replace, []

    def stop_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        replace(*args)

    with mock.patch("os.replace", stop_at_the_third), pytest.raises(KeyboardInterrupt):
        tiny.arrange(raw.parent)
    assert len(list((raw / "val/images").iterdir())) == 4
    with pytest.raises(DataError, match="not arranged by class"):
        tiny.TINYIMAGENET(raw / "val")
    tiny.arrange(raw.parent)
    assert_arranged(raw, source / FOLDER)


def test_killed_while_unpacking(archive, source, data_dir):
    """A process that dies leaves its partial folder, which is never taken for the data and goes with the next run."""
    child = os.fork()
    if child == 0:
        tiny.open_image = lambda path: os._exit(9)
        tiny.arrange(data_dir, archive)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [name for name in os.listdir(data_dir) if name.startswith(tiny.PARTIAL)]
    tiny.arrange(data_dir, archive)
    assert os.listdir(data_dir) == [FOLDER]
    assert_arranged(data_dir / FOLDER, source / FOLDER)


def test_ctrl_c_while_unpacking_leaves_nothing(archive, data_dir):
    with mock.patch.object(tiny, "open_image", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        tiny.arrange(data_dir, archive)
    assert os.listdir(data_dir) == []


@pytest.fixture
def url(archive, monkeypatch):
    """The archive on a server of this machine, which no proxy is asked for."""
    monkeypatch.setenv("no_proxy", "localhost")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=archive.parent)
    silent = mock.patch.object(http.server.SimpleHTTPRequestHandler, "log_message")
    with silent, http.server.ThreadingHTTPServer(("localhost", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        yield f"http://localhost:{server.server_port}/{archive.name}"
        server.shutdown()


def test_download(archive, source, data_dir, url):
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    with mock.patch.multiple(tiny, URL=url, MD5=md5):
        assert run(["--data_dir", data_dir], data_dir.parent)[0] == 0
    assert_arranged(data_dir / FOLDER, source / FOLDER)
    assert sorted(os.listdir(data_dir)) == [FOLDER, tiny.ARCHIVE]


@pytest.mark.parametrize("wrong", ["md5", "no server"])
def test_download_that_fails(data_dir, url, wrong):
    wrong_url = {"md5": url, "no server": "http://localhost:9/tiny.zip"}[wrong]
    with mock.patch.multiple(tiny, URL=wrong_url):
        status, _, err = run(["--data_dir", data_dir], data_dir.parent)
    assert status == 1
    assert "cannot be downloaded" in err.splitlines()[-1]
    assert "--zip PATH" in err.splitlines()[-1]
    assert not (data_dir / tiny.ARCHIVE).exists()


# ---------------------------------------------------------------------------------------------- bad archives


def refused_archive(data_dir, archive, *named):
    """One line with all of `named`; no more than an empty data folder is left."""
    fails(["--data_dir", data_dir, "--zip", archive], archive.parent, str(archive), *named, status=1, run=run)
    assert not data_dir.exists() or os.listdir(data_dir) == []
    assert {path.name for path in data_dir.parent.iterdir()} <= {"data", "bad.zip"}


@pytest.mark.parametrize("kind", ["empty", "cut short", "a flipped bit", "another archive", "encrypted"])
def test_archives_that_cannot_be_used(archive, data_dir, kind):
    bad, content = data_dir.parent / "bad.zip", bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        member = next(m for m in file.infolist() if m.filename.endswith("_2.JPEG"))
    if kind == "encrypted":
        for magic, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
            for found in re.finditer(re.escape(magic), bytes(content)):
                content[found.start() + flags] |= 1
    else:
        content[member.header_offset + 30 + len(member.filename) + member.compress_size // 2] ^= 0x10
    bad.write_bytes({"empty": b"", "cut short": content[: len(content) // 2]}.get(kind, content))
    if kind == "another archive":
        with zipfile.ZipFile(bad, "w") as file:
            file.writestr("something/else.txt", "x")
    refused_archive(data_dir, bad, "not Tiny ImageNet" if kind == "another archive" else "is damaged")


def test_no_archive_at_the_place_that_is_named(data_dir):
    refused(["--data_dir", data_dir, "--zip", "none.zip"], data_dir.parent, "no archive at", status=1, run=run)


ANNOTATIONS, NAME = f"{FOLDER}/val/val_annotations.txt", "n00001001"


def edited(text):
    """A change of the annotation file: its first row becomes `text`."""
    return lambda name, content: text + content[content.index(b"\n") + 1 :] if name == ANNOTATIONS else content


def without(part):
    return lambda name, content: None if part in name else content


CONTENTS = {
    "annotation": (edited(b""), ["val/images has files that", "does not list: val_0.JPEG"]),
    "annotation_file": (without("annotations"), ["val_annotations.txt is missing"]),
    "cut_row": (edited(b"val_0.JPEG\n"), ["val_annotations.txt is damaged: a row has one column"]),
    "foreign_class": (edited(b"val_0.JPEG\tn99999999\t0\n"), ["different classes: n99999999"]),
    "val_image": (without("val/images/val_3.JPEG"), ["val_3.JPEG"]),
    "train_class": (without(f"train/{NAME}/"), [f"different classes: {NAME}"]),
    "train_image": (without(f"{NAME}_1.JPEG"), [f"{NAME}_1.JPEG"]),
    "train_images": (lambda n, c: None if f"train/{NAME}/" in n and "boxes" not in n else c, [NAME]),
    "broken_val_image": (lambda n, c: b"no JPEG" if n.endswith("val_5.JPEG") else c, ["val_5.JPEG", "decoded"]),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_incomplete_contents(source, raw, data_dir, case):
    """Refused in an archive, of which nothing is left, and in an unpacked folder, which loses no file."""
    change, named = CONTENTS[case]
    bad = pack(source, data_dir / "bad.zip", change)
    refused_archive(data_dir.parent / "new" / "data", bad, *named)
    shutil.rmtree(raw)
    with zipfile.ZipFile(bad) as file:
        file.extractall(data_dir)
    names = sorted(path.name for path in raw.rglob("*.*"))
    for _ in range(2):
        fails(["--data_dir", data_dir], data_dir, *named, status=1, run=run)
    assert sorted(path.name for path in raw.rglob("*.*")) == names


def test_image_in_the_wrong_class(raw):
    tiny.arrange(raw.parent)
    name, label = next(iter(annotated(raw).items()))
    other = next(k for k in sorted(os.listdir(raw / "train")) if k != label)
    shutil.move(raw / "val" / label / name, raw / "val" / other / name)
    with pytest.raises(DataError, match=f"not where its lists have them: .*{name}"):
        tiny.arrange(raw.parent)


# --------------------------------------------------------------------------------------------- the data set


def test_dataset_agrees_with_imbalance(source):
    whole = ImageFolder(str(source / FOLDER / "train"))
    for root in (source / FOLDER / "train", source / FOLDER):
        for rand_number in (0, 1):
            data = tiny.IMBALANETINYIMGNET(root, "exp", 0.25, rand_number)
            counts = imbalance.class_counts([4, 4, 4], "exp", 0.25)
            assert data.get_cls_num_list() == counts == [4, 2, 1]
            assert data.cls_num == 3
            assert data.chosen.tolist() == imbalance.choose(whole.targets, counts, rand_number).tolist()
            assert data.samples == data.imgs == [whole.samples[i] for i in data.chosen]
            assert data.targets == [label for _, label in data.samples]
            assert len(data) == 7
            assert data[0][1] == 0
            assert data[0][0].mode == "RGB"
    assert isinstance(data, ImageFolder)
    with pytest.raises(ValueError, match="leaves"):
        tiny.IMBALANETINYIMGNET(root, "exp", 0.01)


def test_left_out_images_are_not_trained_on(source):
    root = source / FOLDER / "train"
    train, whole = tiny.IMBALANETINYIMGNET(root, "exp", 0.25, 1), tiny.TINYIMAGENET(root)
    part = train.left_out(2)
    assert part.samples == part.imgs == [whole.samples[i] for i in part.chosen]
    assert part.targets == [1, 1, 2, 2]
    assert not set(part.imgs) & set(train.imgs)


def test_classes_have_names_for_people(raw):
    assert tiny.TINYIMAGENET(raw / "train").class_names == [f"digit (n0000100{k})" for k in range(3)]
    (raw / "words.txt").write_text("n00001001\tgoldfish, Carassius auratus\nn00001000\tcrane\n")
    dataset = tiny.TINYIMAGENET(raw / "train")
    assert dataset.class_names == ["crane", "goldfish", "n00001002"]
    assert dataset.classes == ["n00001000", "n00001001", "n00001002"]
    (raw / "words.txt").unlink()
    assert dataset.class_names == dataset.classes


def test_load_arranges_and_refuses_what_cannot_be(archive, source, data_dir):
    data_dir.mkdir()
    shutil.copy(archive, data_dir / tiny.ARCHIVE)
    (data_dir / FOLDER).mkdir()  # empty: nothing that could be lost
    with mock.patch.object(tiny, "CLASSES", 3):
        train, test = tiny.load(str(data_dir), "exp", 0.25, 1)
        with pytest.raises(UsageError, match="leaves"):
            tiny.load(str(data_dir), "exp", 0.01)
    assert train.samples == tiny.IMBALANETINYIMGNET(data_dir / FOLDER, "exp", 0.25, 1).samples
    assert (len(test), test.num_classes) == (6, 3)
    assert_arranged(data_dir / FOLDER, source / FOLDER)
    with pytest.raises(DataError, match="has 3 classes, Tiny ImageNet has 200"):
        tiny.load(str(data_dir), "exp", 0.25)
