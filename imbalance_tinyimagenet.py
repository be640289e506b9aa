"""Tiny ImageNet with a long-tailed training part. As a command it arranges the archive by class and checks all images:

    python imbalance_tinyimagenet.py --data_dir data
    python imbalance_tinyimagenet.py --data_dir data --zip tiny-imagenet-200.zip

The first unpacks data/tiny-imagenet-200.zip (downloads it, 248 MB, where there is none) or takes the folder
data/tiny-imagenet-200 as it is. It can be stopped and run again, and changes nothing that is right.
tinyimage_train.py does the same by itself before it trains.
"""

import collections
import contextlib
import http.client
import os
import shutil
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
from torchvision.datasets import ImageFolder
from torchvision.datasets.utils import download_url

from files import errors_name, folder_lock
from imbalance import LabelledImages
from imbalance_folder import IMAGENET_MEAN, IMAGENET_STD, open_image
from utils import DataError, HelpFormatter, Parser, command, named, network_timeout
from utils import path as file_path

CLASSES = 200
FOLDER, ARCHIVE = "tiny-imagenet-200", "tiny-imagenet-200.zip"
URL, MD5 = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"
PARTIAL = f".{FOLDER}.partial"  # the folder that is being unpacked to


# ------------------------------------------------------------------------------------------- the data set


class TINYIMAGENET(LabelledImages, ImageFolder):
    """One whole part of Tiny ImageNet: `root` holds a folder for each class.

    `.samples`, `.imgs` and `.targets` agree; `.chosen` are indices into all that ImageFolder found; `.cls_num` is the
    number of classes; `.class_names` are words.txt's, where it is there.

    Raises:
        DataError: a part that is not arranged by class. FileNotFoundError: no folder, or a class without images.
    """

    mean, std, image_size = IMAGENET_MEAN, IMAGENET_STD, 64

    def __init__(
        self, root: str | os.PathLike, transform: Callable | None = None, target_transform: Callable | None = None
    ) -> None:
        if os.path.isdir(os.path.join(root, "images")):
            raise DataError(
                f"{root} is not arranged by class: run python imbalance_tinyimagenet.py "
                f"--data_dir {os.path.dirname(os.path.dirname(os.path.abspath(root)))} once"
            )
        super().__init__(root, transform, target_transform)
        self.cls_num = len(self.classes)
        self.chosen = np.arange(len(self.samples))

    @property
    def class_names(self) -> list[str]:
        """The first name of each class in words.txt beside the part, with the wnid where two share it; or the wnids."""
        words = os.path.join(os.path.dirname(os.path.abspath(self.root)), "words.txt")
        names = dict(_rows(words))
        found = [names.get(wnid, wnid).split(",")[0] for wnid in self.classes]
        many = {name for name, count in collections.Counter(found).items() if count > 1}
        return [f"{name} ({wnid})" if name in many else name for wnid, name in zip(self.classes, found, strict=True)]

    def _keep(self, positions):
        super()._keep(positions)
        self.samples = self.imgs = [self.samples[i] for i in positions]


class IMBALANETINYIMGNET(TINYIMAGENET):  # the published spelling
    """The training part of Tiny ImageNet, long-tailed.

    Args:
        root: .../tiny-imagenet-200/train, or the folder above it.
        imb_type, imb_factor, rand_number: see `imbalance.class_counts` and `imbalance.choose`.
        transform, target_transform: as torchvision's ImageFolder.

    Raises:
        UsageError: see `imbalance.class_counts`. The rest: see TINYIMAGENET.
    """

    def __init__(
        self, root: str | os.PathLike, imb_type: str = "exp", imb_factor: float = 0.01, rand_number: int = 0,
        transform: Callable | None = None, target_transform: Callable | None = None,
    ) -> None:  # fmt: skip
        train = os.path.join(root, "train")
        super().__init__(train if os.path.isdir(train) else root, transform, target_transform)
        self.make_imbalanced(imb_type, imb_factor, rand_number)


def load(
    data_dir: str, imb_type: str = "exp", imb_factor: float = 0.01, rand_number: int = 0
) -> tuple[TINYIMAGENET, TINYIMAGENET]:
    """(training set, test set), as file names; the archive is downloaded and put in order where it is not yet.

    Raises:
        UsageError: see `imbalance.class_counts`. DataError, FileNotFoundError: see `arrange`.
    """
    folder, _ = arrange(data_dir)
    train = IMBALANETINYIMGNET(os.path.join(folder, "train"), imb_type, imb_factor, rand_number)
    if train.num_classes != CLASSES:
        raise DataError(f"{folder} has {train.num_classes} classes, Tiny ImageNet has {CLASSES}")
    return train, TINYIMAGENET(os.path.join(folder, "val"))


# ------------------------------------------------------------------------------------- the archive in order


def arrange(
    data_dir: str | os.PathLike, archive: str | os.PathLike | None = None, check_images: bool = False
) -> tuple[str, bool]:
    """Arrange data_dir/tiny-imagenet-200 by class: train/<wnid>/ and val/<wnid>/.

    An existing folder is used, arranged or not, and the archive is not read. An archive is unpacked and arranged in a
    temporary folder, which is renamed when it is complete.

    Args:
        data_dir: holds the folder, or receives it.
        archive: a zip; None: data_dir/tiny-imagenet-200.zip, downloaded if there is none.
        check_images: decode every image, also of a folder that needs no change.

    Returns:
        (path of the folder, whether anything was changed).

    Raises:
        DataError: the archive or the folder is damaged or incomplete; the message names the first file.
        FileNotFoundError: a folder with a class without images.
    """
    folder = os.path.join(data_dir, FOLDER)
    if archive is not None and not os.path.isfile(archive):
        raise DataError(f"no archive at {archive}")
    os.makedirs(data_dir, exist_ok=True)
    with folder_lock(data_dir):
        if os.path.isdir(folder) and os.listdir(folder):
            missing = [part for part in ("train", "val") if not os.path.isdir(os.path.join(folder, part))]
            if missing:
                raise DataError(f"{folder} has no {named(missing)}: delete it, and the archive is unpacked again")
            changed = _order_by_class(os.path.join(folder, "val"))
            _check(folder, check_images or changed)
            return folder, changed
        if archive is None:
            archive = os.path.join(data_dir, ARCHIVE)
            if not os.path.isfile(archive):
                _download(archive)
        partial = os.path.join(data_dir, PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed: the lock is ours
        try:
            _unpack(archive, partial)
            with contextlib.suppress(OSError):
                os.rmdir(folder)  # an empty one
            os.rename(os.path.join(partial, FOLDER), folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder, True


def _order_by_class(val):
    """Move val's images from val/images to val/<wnid>, by its list. Returns whether there were any to move.

    A move is a rename, so that a stop in between loses nothing and the next call continues.
    """
    raw, annotations = os.path.join(val, "images"), os.path.join(val, "val_annotations.txt")
    if not os.path.isdir(raw):
        return False
    label = dict(_rows(annotations))
    if not label:
        raise DataError(f"{annotations} is missing: without it no validation image has a class")
    names = sorted(os.listdir(raw))
    foreign = [name for name in names if name not in label]
    if foreign:
        raise DataError(f"{raw} has files that {annotations} does not list: {named(foreign)}")
    for name in names:
        os.makedirs(os.path.join(val, label[name]), exist_ok=True)
        os.replace(os.path.join(raw, name), os.path.join(val, label[name], name))
    os.rmdir(raw)
    return bool(names)


def _check(folder, decode):
    """Refuse parts whose classes differ, and a part that is not what its lists name, where it still has lists.

    decode: open every image too.
    """
    train, val = (TINYIMAGENET(os.path.join(folder, part)) for part in ("train", "val"))
    different = sorted(set(train.classes) ^ set(val.classes))
    if different:
        raise DataError(f"train and val of {folder} have different classes: {named(different)}")
    boxes = {wnid: _rows(os.path.join(train.root, wnid, f"{wnid}_boxes.txt")) for wnid in train.classes}
    listed_in_train = {(wnid, image) for wnid, rows in boxes.items() for image, _ in rows}
    listed_in_val = {(wnid, image) for image, wnid in _rows(os.path.join(val.root, "val_annotations.txt"))}
    for part, listed in ((train, listed_in_train), (val, listed_in_val)):
        found = {(part.classes[label], os.path.basename(path)) for path, label in part.samples}
        different = sorted("/".join(key) for key in found ^ listed) if listed else []
        if different:
            raise DataError(f"images of {part.root} are missing, or not where its lists have them: {named(different)}")
        for path, _ in part.samples if decode else ():
            open_image(path)


def _rows(path):
    """The first two columns of a tab-separated list, image and class in val; none where there is no list."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        rows = [line.rstrip("\r\n").split("\t")[:2] for line in file if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise DataError(f"{path} is damaged: a row has one column")
    return rows


def _unpack(archive, to):
    """Unpack, put in order and check. zipfile writes nothing outside of `to`, and checks each file's size and CRC."""
    print(f"unpacking {archive}", flush=True)
    try:
        with zipfile.ZipFile(archive) as opened:
            if not any(name.startswith(f"{FOLDER}/") for name in opened.namelist()):
                raise DataError(f"{archive} holds no {FOLDER}/: it is not Tiny ImageNet")
            with errors_name(os.path.dirname(to)):
                opened.extractall(to)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:  # also encrypted, or of an unknown method
        raise DataError(f"{archive} is damaged, or not a zip archive ({error})") from None
    whole = os.path.join(to, FOLDER)
    try:
        _order_by_class(os.path.join(whole, "val"))
        _check(whole, decode=True)
    except (DataError, FileNotFoundError) as error:
        raise DataError(f"{archive}: {str(error).replace(to + os.sep, '')}") from None


def _download(path):
    """Fetch the official archive to `path`, whole or not at all."""
    print(f"downloading {URL} to {path} (248 MB)", flush=True)
    temporary = f"{path}.partial"
    try:
        with network_timeout():
            download_url(URL, os.path.dirname(path), os.path.basename(temporary), MD5)
        os.replace(temporary, path)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise DataError(
            f"no Tiny ImageNet in {os.path.dirname(path) or '.'}, and it cannot be downloaded ({error}): fetch {URL} "
            f"elsewhere and put it at {path}, or name it with python imbalance_tinyimagenet.py --zip PATH"
        ) from None


@command
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, prog="imbalance_tinyimagenet.py")
    holds = f"holds {FOLDER}, or receives it (default: %(default)s)"
    parser.add_argument("--data_dir", type=file_path, default="./data", help=holds)
    parser.add_argument("--zip", default=None, metavar="PATH", help=f"the archive (default: DATA_DIR/{ARCHIVE})")
    options = parser.parse_args(argv)
    folder, changed = arrange(options.data_dir, options.zip, check_images=True)
    for part in ("train", "val"):
        dataset = TINYIMAGENET(os.path.join(folder, part))
        print(f"{folder}/{part}: {len(dataset):,} images, {dataset.num_classes} classes")
    print("arranged" if changed else "nothing to change")


if __name__ == "__main__":
    main()
