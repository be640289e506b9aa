"""Tiny ImageNet with a long-tailed training part. As a command it puts the archive in order, every image checked:

    python imbalance_tinyimagenet.py --data_dir data
    python imbalance_tinyimagenet.py --data_dir data --zip tiny-imagenet-200.zip

The first unpacks data/tiny-imagenet-200.zip (downloads it, 248 MB, where there is none) or takes the folder
data/tiny-imagenet-200 as it is. It can be stopped and run again, and changes nothing that is right.
tinyimage_train.py does the same by itself before it trains.
"""

import collections
import http.client
import os
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Callable

import numpy as np
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, download_url

from files import folder_lock
from imbalance import LabelledImages
from imbalance_folder import IMAGENET_MEAN, IMAGENET_STD, open_image
from utils import DataError, HelpFormatter, Parser, UsageError, command, named

CLASSES = 200
FOLDER, ARCHIVE = "tiny-imagenet-200", "tiny-imagenet-200.zip"
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
#: Of the official archive, in bytes.
OFFICIAL_SIZE, OFFICIAL_MD5 = 248100043, "90528d7ca1a48142e341f4ef8d21d0de"
#: What an archive may unpack to; the official one has 0.25 GB.
MAX_BYTES = 2**30
PARTIAL = f".{FOLDER}.partial-"  # beginning of the names of folders that are being unpacked


# ------------------------------------------------------------------------------------------- the data set


class TINYIMAGENET(LabelledImages, ImageFolder):
    """One whole part of Tiny ImageNet: `root` holds a folder for each class.

    `.samples`, `.imgs` and `.targets` agree; `.chosen` are indices into `.available`, all that ImageFolder found;
    `.cls_num` is the number of classes; `.class_names` are words.txt's, where it is there.

    Raises:
        DataError: a part that is not arranged by class. FileNotFoundError: no folder, or a class without images.
    """

    mean, std, image_size = IMAGENET_MEAN, IMAGENET_STD, 64
    cls_num = CLASSES

    def __init__(
        self, root: str | os.PathLike, transform: Callable | None = None, target_transform: Callable | None = None
    ) -> None:
        if os.path.isdir(os.path.join(root, "images")):
            raise DataError(
                f"{root} is as the archive has it, not by class: run python imbalance_tinyimagenet.py "
                f"--data_dir {os.path.dirname(os.path.dirname(os.path.abspath(root)))} once"
            )
        super().__init__(root, transform, target_transform)
        self.cls_num = len(self.classes)
        self.available = self.samples
        self.chosen = np.arange(len(self.samples))

    @property
    def class_names(self) -> list[str]:
        """The first name of each class in words.txt beside the part, with the wnid where two share it; or the wnids."""
        words = os.path.join(os.path.dirname(os.path.abspath(self.root)), "words.txt")
        try:
            with open(words, encoding="utf-8", errors="replace") as file:
                names = dict(line.rstrip("\n").split("\t", 1) for line in file if "\t" in line)
        except OSError:
            names = {}
        found = [names.get(wnid, wnid).split(",")[0] for wnid in self.classes]
        many = {name for name, count in collections.Counter(found).items() if count > 1}
        return [f"{name} ({wnid})" if name in many else name for wnid, name in zip(self.classes, found, strict=True)]

    def _keep(self, positions):
        super()._keep(positions)
        self.samples = self.imgs = [self.available[i] for i in self.chosen]


class IMBALANETINYIMGNET(TINYIMAGENET):  # the published spelling
    """The training part of Tiny ImageNet, long-tailed.

    Args:
        root: .../tiny-imagenet-200/train, or the folder above it.
        imb_type, imb_factor, rand_number: see `imbalance.class_counts` and `imbalance.choose`.
        transform, target_transform: as torchvision's ImageFolder.

    Raises:
        ValueError: see `imbalance.class_counts`. The rest: see TINYIMAGENET.
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
        UsageError: an imbalance that cannot be, see `imbalance.class_counts`. DataError: missing or damaged data.
    """
    folder, _ = arrange(data_dir)
    try:
        train = IMBALANETINYIMGNET(os.path.join(folder, "train"), imb_type, imb_factor, rand_number)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if train.num_classes != CLASSES:
        raise DataError(f"{folder} has {train.num_classes} classes, Tiny ImageNet has {CLASSES}")
    return train, TINYIMAGENET(os.path.join(folder, "val"))


# ------------------------------------------------------------------------------------- the archive in order


def arrange(
    data_dir: str | os.PathLike, archive: str | os.PathLike | None = None, check_images: bool = False
) -> tuple[str, bool]:
    """Leave data_dir/tiny-imagenet-200 with train/<wnid>/ and val/<wnid>/, whatever it was before.

    A folder that is there is taken as it is, raw or arranged or half-arranged, and the archive is not read.
    An archive is unpacked and arranged beside its place, and moved there when it is whole.

    Args:
        data_dir: holds the folder, or receives it.
        archive: a zip; None: data_dir/tiny-imagenet-200.zip, downloaded if there is none.
        check_images: decode every image, also of a folder that needs no change.

    Returns:
        (path of the folder, whether anything was changed).

    Raises:
        DataError: the archive or the folder is damaged or incomplete; the message names the first file.
    """
    folder = os.path.join(data_dir, FOLDER)
    if archive is not None and not os.path.isfile(archive):
        raise DataError(f"no archive at {archive}")
    os.makedirs(data_dir, exist_ok=True)
    with folder_lock(data_dir):
        if os.path.isdir(folder) and os.listdir(folder):
            return folder, _arrange_folder(folder, check_images)
        for name in os.listdir(data_dir):  # left by a process that was killed: the lock is ours
            if name.startswith(PARTIAL):
                shutil.rmtree(os.path.join(data_dir, name))
        if archive is None:
            archive = os.path.join(data_dir, ARCHIVE)
            if not os.path.isfile(archive):
                _download(archive)
        _unpack(archive, data_dir, folder)
    return folder, True


def _arrange_folder(folder, check_images):
    """Move the validation images to folders of their classes. Returns whether there were any to move.

    Everything is checked first. A move is a rename, so that a stop in between loses nothing and the next call
    continues.
    """
    train, val = os.path.join(folder, "train"), os.path.join(folder, "val")
    raw_folder, annotations = os.path.join(val, "images"), os.path.join(val, "val_annotations.txt")
    train_images, val_images = _images(train), _images(val)
    label = dict(_rows(annotations))  # {image: wnid}; empty where somebody else has put the images in order
    placed = {key: path for key, path in val_images.items() if key[0] != "images"}
    raw = {(label.get(key[1], "images"), key[1]): path for key, path in val_images.items() if key[0] == "images"}
    if raw and not label:
        raise DataError(f"{annotations} is missing: without it no validation image has a class")
    boxes = {wnid: _rows(os.path.join(train, wnid, f"{wnid}_boxes.txt")) for wnid in _folders(train)}
    _check_complete(train, train_images, [(wnid, image) for wnid, rows in boxes.items() for image, _ in rows])
    _check_complete(val, [*placed, *raw], [(wnid, image) for image, wnid in label.items()])
    different = sorted({wnid for wnid, _ in train_images} ^ {wnid for wnid, _ in (*placed, *raw)})
    if different:
        raise DataError(f"train and val of {folder} have different classes: {named(different)}")
    moves = {path: placed.pop(key, os.path.join(val, *key)) for key, path in raw.items()}
    for path in [*train_images.values(), *placed.values(), *moves] if moves or check_images else ():
        open_image(path)
    for source, target in moves.items():
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(source, target)
    if os.path.isdir(raw_folder):
        os.rmdir(raw_folder)
    return bool(moves)


def _folders(path):
    if not os.path.isdir(path):
        raise DataError(f"{path} is missing")
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())


def _images(part):
    """All images of a part as {(folder, name): path}."""
    images = {}
    for folder in _folders(part):
        for parent, _, names in os.walk(os.path.join(part, folder)):
            for name in names:
                if name.lower().endswith(IMG_EXTENSIONS):
                    path = os.path.join(parent, name)
                    if images.setdefault((folder, name), path) != path:
                        raise DataError(f"{path} and {images[folder, name]} have the same name: remove one")
    return images


def _rows(path):
    """The first two columns of a tab-separated list, image and class in val; none where there is no list."""
    if not os.path.isfile(path):
        return []
    with open(path, encoding="utf-8", errors="replace") as file:
        rows = [line.rstrip("\r\n").split("\t")[:2] for line in file if line.strip()]
    if any(len(row) < 2 for row in rows):
        raise DataError(f"{path} is damaged: a row has one column")
    return rows


def _check_complete(part, found, listed):
    """Refuse a part that is not what its lists name, where it has lists."""
    different = sorted("/".join(key) for key in set(found) ^ set(listed)) if listed else []
    if different:
        raise DataError(f"images of {part} are missing, or not where its lists have them: {named(different)}")


def _unpack(archive, data_dir, folder):
    """Unpack, arrange and check beside `folder`, then rename; whatever goes wrong leaves nothing.

    zipfile writes nothing outside its folder, makes no links, and checks each file's size and CRC.
    """
    if os.path.getsize(archive) == OFFICIAL_SIZE and not check_integrity(archive, OFFICIAL_MD5):
        raise DataError(f"{archive} is damaged: it has the official archive's size and another md5 than {OFFICIAL_MD5}")
    print(f"unpacking {archive}", flush=True)
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=data_dir) as partial:
        try:
            with zipfile.ZipFile(archive) as opened:
                size = sum(member.file_size for member in opened.infolist())
                if size > MAX_BYTES:
                    raise DataError(f"{archive} unpacks to {size:,} bytes: too many for Tiny ImageNet")
                opened.extractall(partial)
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
            raise DataError(f"{archive} is damaged, or no zip archive ({error})") from None
        whole = os.path.join(partial, FOLDER)
        if not os.path.isdir(whole):
            raise DataError(f"{archive} holds no {FOLDER}/: it is not Tiny ImageNet")
        try:
            _arrange_folder(whole, check_images=True)
        except DataError as error:
            raise DataError(f"{archive}: {str(error).replace(partial + os.sep, '')}") from None
        os.rename(whole, folder)  # an empty folder gives way


def _download(path):
    """Fetch the official archive to `path`, whole or not at all."""
    print(f"downloading {URL} to {path} ({OFFICIAL_SIZE / 1e6:.0f} MB)", flush=True)
    temporary = f"{path}.partial"
    try:
        download_url(URL, os.path.dirname(path), os.path.basename(temporary), OFFICIAL_MD5)
        os.replace(temporary, path)
    except (OSError, RuntimeError, ValueError, http.client.HTTPException) as error:
        raise DataError(
            f"no Tiny ImageNet in {os.path.dirname(path) or '.'}, and it cannot be downloaded ({error}): fetch {URL} "
            f"elsewhere and put it at {path}, or name it with python imbalance_tinyimagenet.py --zip PATH"
        ) from None


@command
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, prog="imbalance_tinyimagenet.py")
    parser.add_argument("--data_dir", default="./data", help=f"holds {FOLDER}, or receives it (default: %(default)s)")
    parser.add_argument("--zip", default=None, metavar="PATH", help=f"the archive (default: DATA_DIR/{ARCHIVE})")
    options = parser.parse_args(argv)
    folder, changed = arrange(options.data_dir, options.zip, check_images=True)
    for part in ("train", "val"):
        dataset = TINYIMAGENET(os.path.join(folder, part))
        print(f"{folder}/{part}: {len(dataset):,} images, {dataset.num_classes} classes")
    print("arranged" if changed else "nothing to change")


if __name__ == "__main__":
    main()
