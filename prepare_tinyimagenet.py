"""Tiny ImageNet's archive put in order: train/<wnid>/ and val/<wnid>/, every image checked.

    python imbalance_tinyimagenet.py --data_dir data
    python imbalance_tinyimagenet.py --data_dir data --zip tiny-imagenet-200.zip

The first unpacks data/tiny-imagenet-200.zip (downloads it, 248 MB, where there is none) or takes the folder
data/tiny-imagenet-200 as it is. It can be stopped and run again, and changes nothing that is right.
tinyimage_train.py does the same by itself before it trains.
"""

import http.client
import os
import shutil
import tempfile
import zipfile
import zlib

from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.datasets.utils import check_integrity, download_url

from files import folder_lock
from imbalance_folder import open_image
from utils import DataError, HelpFormatter, Parser, command, named

FOLDER, ARCHIVE = "tiny-imagenet-200", "tiny-imagenet-200.zip"
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
#: Of the official archive, in bytes.
OFFICIAL_SIZE, OFFICIAL_MD5 = 248100043, "90528d7ca1a48142e341f4ef8d21d0de"
#: What an archive may unpack to; the official one has 0.25 GB.
MAX_BYTES = 2**30
PARTIAL = f".{FOLDER}.partial-"  # beginning of the names of folders that are being unpacked


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
            return folder, arrange_folder(folder, check_images)
        for name in os.listdir(data_dir):  # left by a process that was killed: the lock is ours
            if name.startswith(PARTIAL):
                shutil.rmtree(os.path.join(data_dir, name))
        if archive is None:
            archive = os.path.join(data_dir, ARCHIVE)
            if not os.path.isfile(archive):
                _download(archive)
        _unpack(archive, data_dir, folder)
    return folder, True


def arrange_folder(folder: str, check_images: bool = True) -> bool:
    """Arrange an unpacked folder in place. Returns whether an image was moved.

    Everything is checked first. A move is a rename, so that a stop in between loses nothing and the next call
    continues.

    Raises:
        DataError: see `arrange`; nothing was changed then.
    """
    paths = _training_images(os.path.join(folder, "train"))
    raw = os.path.join(folder, "val", "images")
    is_raw = os.path.isdir(raw)
    placed, moves = _plan_validation(os.path.join(folder, "val"), _folders(os.path.join(folder, "train")))
    for path in [*paths, *placed, *moves] if moves or check_images else ():
        open_image(path)
    for source, target in moves.items():
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(source, target)
    if is_raw:
        if os.listdir(raw):
            name = sorted(os.listdir(raw))[0]
            raise DataError(f"{os.path.join(raw, name)} is no image of the data set: move it elsewhere")
        os.rmdir(raw)
    return is_raw


def _folders(path):
    if not os.path.isdir(path):
        raise DataError(f"{path} is missing")
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())


def _images(path):
    """All images below `path` as {name: path}."""
    files = [(name, os.path.join(parent, name)) for parent, _, names in sorted(os.walk(path)) for name in sorted(names)]
    images = [(name, file) for name, file in files if name.lower().endswith(IMG_EXTENSIONS)]
    if len(dict(images)) < len(images):
        raise DataError(f"{path} has images of the same name in two folders")
    return dict(images)


def _rows(path):
    """The rows of a tab-separated list, as lists; none where there is no list."""
    try:
        with open(path, encoding="utf-8") as file:
            return [line.rstrip("\r\n").split("\t") for line in file if line.strip()]
    except FileNotFoundError:
        return []
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text") from None


def _training_images(train):
    """The images of the training part; every class has some, and all that its list of boxes names."""
    paths = []
    for name in _folders(train):
        found = _images(os.path.join(train, name))
        boxes = _rows(os.path.join(train, name, f"{name}_boxes.txt"))
        lacking = [image for image, *_ in boxes if image not in found]
        if lacking or not found:
            raise DataError(f"{os.path.join(train, name)} lacks images: {named(lacking) or 'it has none'}")
        paths += found.values()
    return paths


def _plan_validation(part, classes):
    """Check the validation part against its annotations.

    Returns:
        (paths of images that are in their place, {source: target} of those to be moved).
    """
    by_class = {name: _images(os.path.join(part, name)) for name in _folders(part)}
    raw = by_class.pop("images", {})
    placed = {(label, name): path for label, found in by_class.items() for name, path in found.items()}
    listed = os.path.join(part, "val_annotations.txt")
    rows = _rows(listed)
    if raw and not rows:
        raise DataError(f"{listed} is missing: without it no validation image has a class")
    cut = [row[0] for row in rows if len(row) < 2]
    if cut:
        raise DataError(f"{listed} has rows without a class: {named(cut)}")
    # without a list somebody else has put the images in order
    labels = {row[0]: row[1] for row in rows} or {name: label for label, name in placed}
    different = sorted(set(labels.values()) ^ set(classes))
    if different:
        raise DataError(f"train and val of {os.path.dirname(part)} have different classes: {named(different)}")
    stray = [path for (label, name), path in placed.items() if labels.get(name) != label]
    stray += [path for name, path in raw.items() if name not in labels]
    if stray:
        raise DataError(f"images are not where {listed} has them: {named(stray)}")
    lacking = [name for name, label in labels.items() if name not in raw and (label, name) not in placed]
    if lacking:
        raise DataError(f"{part} lacks images of {listed}: {named(lacking)}")
    places = {name: placed.get((labels[name], name)) or os.path.join(part, labels[name], name) for name in raw}
    moves = {raw[name]: place for name, place in places.items()}
    return [path for path in placed.values() if path not in moves.values()], moves


# ---------------------------------------------------------------------------------------------- the archive


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
            arrange_folder(whole)
        except DataError as error:
            raise DataError(f"{archive}: {str(error).replace(partial + os.sep, '')}") from None
        os.rename(whole, folder)  # an empty folder gives way


def _download(path):
    """Fetch the official archive to `path`; a part that is left by an error is removed."""
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
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


# ---------------------------------------------------------------------------------------------- the command


@command
def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, prog="imbalance_tinyimagenet.py")
    parser.add_argument("--data_dir", default="./data", help=f"holds {FOLDER}, or receives it (default: %(default)s)")
    parser.add_argument("--zip", default=None, metavar="PATH", help=f"the archive (default: DATA_DIR/{ARCHIVE})")
    options = parser.parse_args(argv)
    folder, changed = arrange(options.data_dir, options.zip, check_images=True)
    for part in ("train", "val"):
        counts = [len(_images(os.path.join(folder, part, name))) for name in _folders(os.path.join(folder, part))]
        spread = str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        print(f"{folder}/{part}: {sum(counts):,} images, {len(counts)} classes, {spread} a class")
    print("arranged" if changed else "nothing to change")


if __name__ == "__main__":
    main()
