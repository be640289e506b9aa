"""Tiny ImageNet's archive put in order, and the data set made from it."""

import collections
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import zipfile
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from script_runner import snapshot
from tinyimagenet_maker import FOLDER, SUBSET, make_layout, pack
from torchvision.datasets import ImageFolder

import imbalance
import imbalance_tinyimagenet as tiny
import prepare_tinyimagenet as prepare
from imbalance_folder import read_image
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
    found = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.JPEG") if "test" not in p.parts}
    assert found == expected
    assert not (folder / "val" / "images").exists()
    validation = ImageFolder(str(folder / "val"))
    for path, label in validation.samples:
        assert validation.classes[label] == labels[os.path.basename(path)]


def run(capsys, *args):
    """imbalance_tinyimagenet.main: (status, out, err)."""
    capsys.readouterr()
    status = 0
    try:
        prepare.main([str(arg) for arg in args])
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


# --------------------------------------------------------------------------------------------- what is right


def test_command_arranges_an_archive_and_then_changes_nothing(archive, source, data_dir, capsys):
    status, out, err = run(capsys, "--data_dir", data_dir, "--zip", archive)
    assert (status, err) == (0, "")
    assert "train: 12 images, 3 classes, 4 a class" in out
    assert "val: 6 images, 3 classes, 2 a class" in out
    assert out.endswith("arranged\n")
    assert_arranged(data_dir / FOLDER, source / FOLDER)
    assert os.listdir(data_dir) == [FOLDER]
    before = snapshot(data_dir)
    for again in ([], ["--zip", archive]):
        status, out, err = run(capsys, "--data_dir", data_dir, *again)
        assert (status, err) == (0, "")
        assert out.endswith("nothing to change\n")
        assert snapshot(data_dir) == before


def test_both_files_are_the_command(archive, data_dir, capsys):
    assert run(capsys, "--data_dir", data_dir, "--zip", archive)[0] == 0
    for script in (prepare, tiny):
        done = subprocess.run([sys.executable, script.__file__, "--data_dir", data_dir], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith("val: 6 images, 3 classes, 2 a class\nnothing to change\n")


def test_archive_in_the_data_folder(archive, source, data_dir):
    data_dir.mkdir()
    shutil.copy(archive, data_dir / prepare.ARCHIVE)
    (data_dir / FOLDER).mkdir()  # empty: nothing that could be lost
    folder, changed = prepare.arrange(data_dir)
    assert (folder, changed) == (str(data_dir / FOLDER), True)
    assert_arranged(data_dir / FOLDER, source / FOLDER)
    assert sorted(os.listdir(data_dir)) == [FOLDER, prepare.ARCHIVE]


def test_unpacked_folder(raw, source):
    assert prepare.arrange(raw.parent) == (str(raw), True)
    assert_arranged(raw, source / FOLDER)
    assert prepare.arrange(raw.parent) == (str(raw), False)


def test_a_foreign_file_among_the_validation_images_is_named_and_kept(raw):
    (raw / "val/images/notes.txt").write_text("mine")
    for _ in range(2):  # the second time no image is left to move
        with pytest.raises(DataError, match=r"val/images/notes\.txt is no image of the data set: move it elsewhere"):
            prepare.arrange(raw.parent)
    assert (raw / "val/images/notes.txt").read_text() == "mine"
    (raw / "val/images/notes.txt").unlink()
    prepare.arrange(raw.parent)
    assert prepare.arrange(raw.parent) == (str(raw), False)


def test_folder_arranged_earlier_by_others(raw):
    """val/<wnid>/images/, the annotation file deleted, no wnids.txt: right as it is."""
    for name, label in annotated(raw).items():
        (raw / "val" / label / "images").mkdir(parents=True, exist_ok=True)
        shutil.move(raw / "val/images" / name, raw / "val" / label / "images" / name)
    (raw / "val/images").rmdir()
    before = snapshot(raw)
    assert prepare.arrange(raw.parent, check_images=True) == (str(raw), False)
    (raw / "val/val_annotations.txt").unlink()
    (raw / "wnids.txt").unlink()
    assert prepare.arrange(raw.parent, check_images=True) == (str(raw), False)
    assert {k: v for k, v in before.items() if k in snapshot(raw)} == snapshot(raw)


def test_folder_arranged_by_copying(raw, source):
    """The raw images are still there: they go, as the copies are the same; a different one is not lost."""
    for name, label in annotated(raw).items():
        (raw / "val" / label).mkdir(exist_ok=True)
        shutil.copy(raw / "val/images" / name, raw / "val" / label / name)
    name, label = next(iter(annotated(raw).items()))
    other = raw / "val" / label / name
    content = other.read_bytes()
    other.write_bytes(content + b"x")
    before = snapshot(raw)
    with pytest.raises(DataError, match="different images"):
        prepare.arrange(raw.parent)
    assert snapshot(raw) == before
    other.write_bytes(content)
    assert prepare.arrange(raw.parent) == (str(raw), True)
    assert_arranged(raw, source / FOLDER)


def test_stopped_between_two_moves(raw, source):
    rename, calls = os.rename, []

    def stop_at_the_third(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        rename(*args)

    with mock.patch("os.rename", stop_at_the_third), pytest.raises(KeyboardInterrupt):
        prepare.arrange(raw.parent)
    assert len(list((raw / "val/images").iterdir())) == 4
    with pytest.raises(DataError, match="not by class"):
        tiny.TINYIMAGENET(raw / "val")
    prepare.arrange(raw.parent)
    assert_arranged(raw, source / FOLDER)


def test_killed_while_unpacking(archive, source, data_dir):
    """A process that dies leaves its partial folder, which is never taken for the data and goes with the next run."""
    extract, calls = prepare._extract, []

    def die_at_the_fifth(*args):
        calls.append(args)
        if len(calls) == 5:
            os._exit(9)
        extract(*args)

    child = os.fork()
    if child == 0:
        prepare._extract = die_at_the_fifth
        prepare.arrange(data_dir, archive)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    (left,) = os.listdir(data_dir)
    assert left.startswith(prepare.PARTIAL)
    prepare.arrange(data_dir, archive)
    assert os.listdir(data_dir) == [FOLDER]
    assert_arranged(data_dir / FOLDER, source / FOLDER)


def test_ctrl_c_while_unpacking_leaves_nothing(archive, data_dir):
    with mock.patch.object(prepare, "open_image", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        prepare.arrange(data_dir, archive)
    assert os.listdir(data_dir) == []


def test_download(archive, source, data_dir, capsys):
    size, md5 = archive.stat().st_size, hashlib.md5(archive.read_bytes()).hexdigest()
    official = {"URL": archive.as_uri(), "OFFICIAL_SIZE": size, "OFFICIAL_MD5": md5}
    with mock.patch.multiple(prepare, **official):
        assert run(capsys, "--data_dir", data_dir)[0] == 0
    assert_arranged(data_dir / FOLDER, source / FOLDER)
    assert sorted(os.listdir(data_dir)) == [FOLDER, prepare.ARCHIVE]


@pytest.mark.parametrize("wrong", [{"OFFICIAL_MD5": "0" * 32}, {"OFFICIAL_SIZE": 10}, {"URL": "file:///nowhere.zip"}])
def test_download_that_fails(archive, data_dir, capsys, wrong):
    official = {"URL": archive.as_uri(), "OFFICIAL_SIZE": archive.stat().st_size, **wrong}
    with mock.patch.multiple(prepare, **official):
        status, _, err = run(capsys, "--data_dir", data_dir)
    assert status == 1
    assert err.count("\n") == 1
    assert "--zip PATH" in err
    assert os.listdir(data_dir) == []


# ---------------------------------------------------------------------------------------------- bad archives


def with_member(archive, path, name, content=b"x", mode=stat.S_IFREG | 0o644, **fields):
    """A copy of the archive with one more member."""
    shutil.copy(archive, path)
    with zipfile.ZipFile(path, "a") as file:
        member = zipfile.ZipInfo(name)
        member.external_attr = mode << 16
        for field, value in fields.items():
            setattr(member, field, value)
        file.writestr(member, content)
    return path


def refused(capsys, data_dir, archive, *named):
    """The command ends with status 1 and one line with all of `named`; nothing is left in the data folder."""
    status, _, err = run(capsys, "--data_dir", data_dir, "--zip", archive)
    assert status == 1
    assert err.count("\n") == 1, err
    for text in (str(archive), *named):
        assert text in err
    assert not data_dir.exists() or os.listdir(data_dir) == []
    assert {path.name for path in data_dir.parent.iterdir()} <= {"data", "bad.zip"}


@pytest.mark.parametrize(
    ("name", "why"),
    [
        (f"{FOLDER}/../../evil.txt", "leaves the folder"),
        ("../evil.txt", "leaves the folder"),
        ("/evil.txt", "absolute"),
        ("C:/evil.txt", "absolute"),
        (f"{FOLDER}\\..\\evil.txt", "leaves the folder"),
        (f"{FOLDER}\\evil.txt", "name"),
        (f"{FOLDER}/\x1b[2Jevil.txt", "name"),
        (f"{FOLDER}/wnids.txt", "duplicated"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_refuses_a_path(archive, data_dir, capsys, name, why):
    with mock.patch.object(prepare, "_extract", side_effect=AssertionError("written before all was looked at")):
        refused(capsys, data_dir, with_member(archive, data_dir.parent / "bad.zip", name), why)


@pytest.mark.parametrize(("mode", "why"), [(stat.S_IFLNK | 0o777, "link"), (stat.S_IFIFO | 0o644, "no regular file")])
def test_refuses_links_and_special_files(archive, data_dir, capsys, mode, why):
    bad = with_member(archive, data_dir.parent / "bad.zip", f"{FOLDER}/train/link", b"/etc/passwd", mode)
    refused(capsys, data_dir, bad, f"{FOLDER}/train/link", why)


def test_refuses_bombs(archive, data_dir, capsys):
    zeros, deflated = b"\0" * (prepare.MAX_MEMBER_BYTES + 1), zipfile.ZIP_DEFLATED
    bad = with_member(archive, data_dir.parent / "bad.zip", f"{FOLDER}/bomb", zeros, compress_type=deflated)
    assert bad.stat().st_size < 100_000
    refused(capsys, data_dir, bad, f"{FOLDER}/bomb", "too many")
    with mock.patch.object(prepare, "MAX_TOTAL_BYTES", 10_000):
        refused(capsys, data_dir, archive, "too many")
    with mock.patch.object(prepare, "MAX_MEMBERS", 10):
        refused(capsys, data_dir, archive, "members")


def test_refuses_a_file_that_is_a_folder_too(archive, data_dir, capsys):
    bad = with_member(archive, data_dir.parent / "bad.zip", f"{FOLDER}/wnids.txt/x")
    refused(capsys, data_dir, bad, "wnids.txt/x")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_archive(archive, data_dir, capsys, share):
    bad, content = data_dir.parent / "bad.zip", archive.read_bytes()
    bad.write_bytes(content[: int(len(content) * share)])
    refused(capsys, data_dir, bad, "truncated or damaged")


def test_corrupt_member(archive, data_dir, capsys):
    bad, content = data_dir.parent / "bad.zip", bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        member = next(m for m in file.infolist() if m.filename.endswith("_2.JPEG"))
    start = member.header_offset + 30 + len(member.filename)
    content[start + member.compress_size // 2] ^= 0x10
    bad.write_bytes(content)
    refused(capsys, data_dir, bad, member.filename)


def test_encrypted_member(archive, data_dir, capsys):
    bad, content = data_dir.parent / "bad.zip", bytearray(archive.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 8] |= 1
    bad.write_bytes(content)
    refused(capsys, data_dir, bad, "encrypted")


def test_another_archive(data_dir, capsys):
    bad = data_dir.parent / "bad.zip"
    with zipfile.ZipFile(bad, "w") as file:
        file.writestr("something/else.txt", "x")
    refused(capsys, data_dir, bad, "not Tiny ImageNet")
    missing = run(capsys, "--data_dir", data_dir, "--zip", data_dir / "none.zip")
    assert missing[0] == 1
    assert "no archive at" in missing[2]


def test_official_size_with_another_md5(archive, data_dir, capsys):
    with mock.patch.object(prepare, "OFFICIAL_SIZE", archive.stat().st_size):
        refused(capsys, data_dir, archive, "md5", prepare.OFFICIAL_MD5)


ANNOTATIONS, NAME = f"{FOLDER}/val/val_annotations.txt", "n00001001"


def edited(text):
    """A change of the annotation file: its first row becomes `text`."""
    return lambda name, content: text + content[content.index(b"\n") + 1 :] if name == ANNOTATIONS else content


def without(part):
    return lambda name, content: None if part in name else content


CONTENTS = {
    "annotation": (edited(b""), ["val_annotations.txt", "val_0.JPEG"]),
    "annotation_file": (without("annotations"), ["val_annotations.txt is missing"]),
    "cut_row": (edited(b"val_0.JPEG\n"), ["line 1", "val_0.JPEG"]),
    "foreign_class": (edited(b"val_0.JPEG\tn99999999\t0\n"), ["line 1", "n99999999"]),
    "two_classes": (edited(b"val_0.JPEG\tn00001000\nval_0.JPEG\tn00001001\n"), ["val_0.JPEG", "two classes"]),
    "outside": (edited(b"../../x.JPEG\tn00001000\n"), ["line 1", "../../x.JPEG"]),
    "val_image": (without("val/images/val_3.JPEG"), ["val_3.JPEG"]),
    "train_class": (without(f"train/{NAME}/"), [NAME]),
    "train_images": (without(f"train/{NAME}/images"), [NAME]),
    "train_image": (without(f"{NAME}_1.JPEG"), [f"{NAME}_1.JPEG"]),
    "class_list_too_short": (lambda n, c: c[: c.index(b"\n")] if n.endswith("wnids.txt") else c, ["n0000100"]),
    "class_with_a_path": (lambda n, c: b"../evil\n" + c if n.endswith("wnids.txt") else c, ["../evil"]),
    "broken_train_image": (lambda n, c: c[:300] if n.endswith(f"{NAME}_0.JPEG") else c, [f"{NAME}_0.JPEG"]),
    "broken_val_image": (lambda n, c: b"no JPEG" if n.endswith("val_5.JPEG") else c, ["val_5.JPEG", "decoded"]),
    "binary_annotations": (lambda n, c: b"\xff\xfe\xff" if n == ANNOTATIONS else c, ["val_annotations.txt"]),
}


@pytest.mark.parametrize("case", CONTENTS)
def test_incomplete_contents(source, raw, data_dir, capsys, case):
    """In an archive: refused, nothing left. In an unpacked folder: refused, nothing changed."""
    change, named = CONTENTS[case]
    refused(capsys, data_dir.parent / "new" / "data", pack(source, raw.parent / "bad.zip", change), *named)
    shutil.rmtree(raw)
    with zipfile.ZipFile(raw.parent / "bad.zip") as file:
        file.extractall(raw.parent)
    before = snapshot(raw)
    status, _, err = run(capsys, "--data_dir", raw.parent)
    assert status == 1
    assert err.count("\n") == 1
    assert all(text in err for text in named)
    assert snapshot(raw) == before


def test_class_without_validation_images(source, data_dir, capsys):
    def change(name, content):
        rows = content.splitlines(keepends=True)
        return b"".join(row for row in rows if NAME.encode() not in row) if name == ANNOTATIONS else content

    gone = {name for name, label in annotated(source / FOLDER).items() if label == NAME}
    bad = pack(
        source, data_dir.parent / "bad.zip",
        lambda name, content: None if os.path.basename(name) in gone else change(name, content),
    )  # fmt: skip
    refused(capsys, data_dir, bad, f"val lacks the class {NAME}")


def test_image_in_the_wrong_class(raw):
    prepare.arrange(raw.parent)
    name, label = next(iter(annotated(raw).items()))
    other = next(k for k in sorted(os.listdir(raw / "train")) if k != label)
    shutil.move(raw / "val" / label / name, raw / "val" / other / name)
    with pytest.raises(DataError, match=name):
        prepare.arrange(raw.parent)


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
    assert tiny.IMBALANCETINYIMAGENET is tiny.IMBALANETINYIMGNET
    with pytest.raises(ValueError, match="leaves"):
        tiny.IMBALANETINYIMGNET(root, "exp", 0.01)


def test_dataset_leaves_the_global_generator(source):
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    tiny.IMBALANETINYIMGNET(source / FOLDER, "exp", 0.25, 5)
    assert np.array_equal(np.random.get_state()[1], before)


TOTALS = {
    "exp": {200: 18836, 100: 21549, 50: 25082, 20: 31711, 10: 39072},
    "step": {200: 50200, 100: 50500, 50: 51000, 20: 52500, 10: 55000},
}


@pytest.mark.parametrize("ratio", [200, 100, 50, 20, 10])
@pytest.mark.parametrize("imb_type", ["exp", "step"])
def test_totals_of_the_full_data_set(imb_type, ratio):
    """From targets alone: 200 classes of 500 images that are not there."""

    def init(self, root, transform, target_transform):
        self.root, self.classes = root, [f"n{k:08d}" for k in range(200)]
        self.samples = self.imgs = [(f"{label}_{i}.JPEG", label) for label in range(200) for i in range(500)]
        self.targets = [label for _, label in self.samples]

    with mock.patch.object(ImageFolder, "__init__", init):
        data = tiny.IMBALANETINYIMGNET("nowhere", imb_type, 1 / ratio)
    assert len(data) == len(data.targets) == sum(data.get_cls_num_list()) == TOTALS[imb_type][ratio]


def test_raw_validation_folder_is_refused(source):
    """The official code reads it as one class of 50 images, without a word."""
    with pytest.raises(DataError, match=r"imbalance_tinyimagenet\.py"):
        tiny.TINYIMAGENET(source / FOLDER / "val")


def test_read_image(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert np.array_equal(read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, 2))
    (tmp_path / "bad.JPEG").write_bytes(b"\xff\xd8\xff\xe0nothing")
    for name in ("bad.JPEG", "none.JPEG"):
        with pytest.raises(DataError, match=name):
            read_image(tmp_path / name)


def test_subset_keeps_its_place_in_the_whole(source):
    train = tiny.IMBALANETINYIMGNET(source / FOLDER, "exp", 0.25)
    part = train.subset([6, 0])
    assert part.samples == part.imgs == [train.samples[6], train.samples[0]]
    assert part.samples == [part.available[i] for i in part.chosen]
    assert part.targets == [2, 0]
    assert (len(part), len(train), part.num_classes) == (2, 7, 3)
    assert (part.flip, part.image_size) == (True, 64)


def test_classes_have_names_for_people(raw):
    assert tiny.TINYIMAGENET(raw / "train").class_names == [f"digit (n0000100{k})" for k in range(3)]
    (raw / "words.txt").write_text("n00001001\tgoldfish, Carassius auratus\nn00001000\tcrane\nno tab\n")
    dataset = tiny.TINYIMAGENET(raw / "train")
    assert dataset.class_names == ["crane", "goldfish", "n00001002"]
    assert dataset.classes == ["n00001000", "n00001001", "n00001002"]
    (raw / "words.txt").unlink()
    assert dataset.class_names == dataset.classes


def test_load_arranges_and_refuses_what_cannot_be(archive, source, data_dir):
    data_dir.mkdir()
    shutil.copy(archive, data_dir / prepare.ARCHIVE)
    with mock.patch.object(tiny, "CLASSES", 3):
        train, test = tiny.load(str(data_dir), "exp", 0.25, 1)
        with pytest.raises(UsageError, match="leaves"):
            tiny.load(str(data_dir), "exp", 0.01)
    assert train.samples == tiny.IMBALANETINYIMGNET(data_dir / FOLDER, "exp", 0.25, 1).samples
    assert (len(test), test.num_classes) == (6, 3)
    assert_arranged(data_dir / FOLDER, source / FOLDER)
    with pytest.raises(DataError, match="has 3 classes, Tiny ImageNet has 200"):
        tiny.load(str(data_dir), "exp", 0.25)


# ------------------------------------------------------------------------------------------ the real subset


@pytest.mark.skipif(not SUBSET.exists(), reason=f"no {SUBSET.name} in ../shared/data")
def test_real_subset(tmp_path, capsys):
    status, out, err = run(capsys, "--data_dir", tmp_path, "--zip", SUBSET)
    assert (status, err) == (0, "")
    assert "train: 2,000 images, 200 classes, 10 a class" in out
    folder = tmp_path / FOLDER
    with zipfile.ZipFile(SUBSET) as file:
        rows = file.read(ANNOTATIONS).decode().splitlines()
    labels = {row.split("\t")[0]: row.split("\t")[1] for row in rows}
    for rand_number in (0, 7):
        validation = tiny.TINYIMAGENET(folder / "val")
        assert len(validation) == len(labels) == 600
        for path, label in validation.samples:
            assert validation.classes[label] == labels[os.path.basename(path)]
        train = tiny.IMBALANETINYIMGNET(folder / "train", "exp", 0.1, rand_number)
        whole = ImageFolder(str(folder / "train"))
        counts = imbalance.class_counts([10] * 200, "exp", 0.1)
        assert train.get_cls_num_list() == counts
        assert train.chosen.tolist() == imbalance.choose(whole.targets, counts, rand_number).tolist()
        assert train.samples == train.imgs == [whole.samples[i] for i in train.chosen]
    assert collections.Counter(validation.targets) == dict.fromkeys(range(200), 3)
