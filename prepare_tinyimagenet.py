"""Tiny ImageNet's archive put in order: train/<wnid>/ and val/<wnid>/, every image checked.

    python imbalance_tinyimagenet.py --data_dir data
    python imbalance_tinyimagenet.py --data_dir data --zip tiny-imagenet-200.zip

The first unpacks data/tiny-imagenet-200.zip (downloads it, 248 MB, where there is none) or takes the folder
data/tiny-imagenet-200 as it is. It can be stopped and run again, and changes nothing that is right.
tinyimage_train.py does the same by itself before it trains.
"""

import contextlib
import filecmp
import hashlib
import http.client
import os
import shutil
import stat
import struct
import tempfile
import urllib.request
import zipfile
import zlib
from collections.abc import Collection

from torchvision.datasets.folder import IMG_EXTENSIONS

from files import folder_lock
from imbalance_folder import open_image
from utils import DataError, HelpFormatter, Parser, command

FOLDER, ARCHIVE = "tiny-imagenet-200", "tiny-imagenet-200.zip"
URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
#: Of the official archive, in bytes.
OFFICIAL_SIZE, OFFICIAL_MD5 = 248100043, "90528d7ca1a48142e341f4ef8d21d0de"

#: What an archive may unpack to. The official one: 120,609 members, 0.25 GB, the largest 2.7 MB.
MAX_MEMBERS, MAX_MEMBER_BYTES, MAX_TOTAL_BYTES = 200_000, 2**25, 2**30
PARTIAL = f".{FOLDER}.partial-"  # beginning of the names of folders that are being unpacked


def arrange(
    data_dir: str | os.PathLike, archive: str | os.PathLike | None = None, check_images: bool = False
) -> tuple[str, bool]:
    """Leave data_dir/tiny-imagenet-200 with train/<wnid>/ and val/<wnid>/, whatever it was before.

    A folder that is there is taken as it is, raw or arranged or half-arranged, and the archive is not read.
    Everything is checked before the first file is moved; an archive is unpacked and arranged beside its place,
    and moved there when it is whole.

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
                download(archive)
        _unpack(archive, data_dir, folder)
    return folder, True


def arrange_folder(folder: str, check_images: bool = True) -> bool:
    """Arrange an unpacked folder in place. Returns whether an image was moved.

    The moves are renames, one for each image, so that a stop in between loses nothing and the next call continues.

    Raises:
        DataError: see `arrange`; nothing was changed then.
    """
    classes = read_classes(folder)
    train = _check_train(folder, classes)
    placed, moves = _plan_validation(folder, classes)
    if moves or check_images:
        for path in [*train, *placed, *(source for source, _ in moves)]:
            open_image(path)
    for source, target in moves:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if os.path.exists(target):
            os.unlink(source)  # the same image, see _plan_validation
        else:
            os.rename(source, target)
    raw = os.path.join(folder, "val", "images")
    emptied = os.path.isdir(raw)
    if emptied:
        try:
            os.rmdir(raw)
        except OSError:
            name = sorted(os.listdir(raw))[0]
            raise DataError(f"{os.path.join(raw, name)} is no image of the data set: move it elsewhere") from None
    return bool(moves) or emptied


def read_classes(folder: str) -> list[str]:
    """The class names (wnids) of a folder, sorted: from wnids.txt, or, without it, train/'s folders."""
    try:
        with open(os.path.join(folder, "wnids.txt"), encoding="utf-8") as file:
            classes = file.read().split()
    except UnicodeDecodeError:
        raise DataError(f"{folder}/wnids.txt is no text") from None
    except FileNotFoundError:
        classes = _folders(os.path.join(folder, "train"))
    for name in classes:
        if not _is_plain(name):
            raise DataError(f"{folder}/wnids.txt names the class {name!r}, which cannot be a folder")
    if not classes:
        raise DataError(f"{folder} names no classes: no wnids.txt and no folders in train")
    return sorted(set(classes))


def _is_plain(name):
    """Whether a name from an annotation file is that of something in the folder itself."""
    return name.isprintable() and name not in ("", ".", "..", "images") and not set(name) & set("/\\:")


def _folders(path):
    if not os.path.isdir(path):
        raise DataError(f"{path} is missing")
    return sorted(entry.name for entry in os.scandir(path) if entry.is_dir())


def _images(path):
    """All images below `path` as {name: path}, sorted."""
    found = {}
    for parent, _, names in sorted(os.walk(path)):
        for name in sorted(names):
            if name.lower().endswith(IMG_EXTENSIONS):
                if name in found:
                    raise DataError(f"{found[name]} and {os.path.join(parent, name)} have the same name")
                found[name] = os.path.join(parent, name)
    return found


def _check_classes(part, found, classes):
    missing, foreign = sorted(set(classes) - set(found)), sorted(set(found) - set(classes))
    if missing:
        raise DataError(f"{part} lacks the class {missing[0]}{_and_more(missing)}")
    if foreign:
        raise DataError(f"{part} has a folder {foreign[0]}{_and_more(foreign)} that is no class of wnids.txt")


def _and_more(names):
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_train(folder, classes):
    """The images of the training part; every class has some, and all that its list of boxes names."""
    train = os.path.join(folder, "train")
    _check_classes(train, _folders(train), classes)
    paths = []
    for name in classes:
        found = _images(os.path.join(train, name))
        if not found:
            raise DataError(f"{train} has no images of the class {name}")
        boxes = os.path.join(train, name, f"{name}_boxes.txt")
        if os.path.isfile(boxes):
            for image, *_ in _rows(boxes):
                if image not in found:
                    raise DataError(f"{os.path.join(train, name)} lacks the image {image} of {boxes}")
        paths += found.values()
    return paths


def _rows(path):
    """The rows of a tab-separated text file, as lists."""
    try:
        with open(path, encoding="utf-8") as file:
            return [line.rstrip("\r\n").split("\t") for line in file if line.strip()]
    except UnicodeDecodeError:
        raise DataError(f"{path} is no text") from None


def read_annotations(path: str, classes: Collection[str]) -> dict[str, str]:
    """val_annotations.txt as {image: class}.

    Raises:
        DataError: no file, a row that is cut, an unknown class, an image named twice or with a path.
    """
    if not os.path.isfile(path):
        raise DataError(f"{path} is missing: without it no validation image has a class")
    known, annotations = set(classes), {}
    for number, row in enumerate(_rows(path), 1):
        if len(row) < 2 or not _is_plain(row[0]):
            raise DataError(f"{path}, line {number}: {row[0]!r} is no image with its class")
        if row[1] not in known:
            raise DataError(f"{path}, line {number}: {row[0]} has the class {row[1]!r}, which wnids.txt lacks")
        if annotations.setdefault(row[0], row[1]) != row[1]:
            raise DataError(f"{path}, line {number}: {row[0]} has two classes, {annotations[row[0]]} and {row[1]}")
    return annotations


def _plan_validation(folder, classes):
    """Check the validation part against its annotations.

    Returns:
        (paths of images that are in their place, list of (source, target) of those to be moved).
    """
    part = os.path.join(folder, "val")
    folders = [name for name in _folders(part) if name != "images"]
    by_class = {name: _images(os.path.join(part, name)) for name in folders}
    raw = _images(os.path.join(part, "images"))
    listed = os.path.join(part, "val_annotations.txt")
    if not raw and not os.path.isfile(listed):  # arranged by somebody who deleted the file
        _check_classes(part, [name for name in folders if by_class[name]], classes)
        return [path for found in by_class.values() for path in found.values()], []
    annotations = read_annotations(listed, classes)
    for name in raw:
        if name not in annotations:
            raise DataError(f"{listed} lacks {name}, which is in {part}/images")
    placed, moves = [], []
    for label, found in by_class.items():
        for name in found:
            if annotations.get(name) != label:
                right = f"has the class {annotations[name]}" if name in annotations else "is not there"
                raise DataError(f"{found[name]} contradicts {listed}, where it {right}")
    for name, label in annotations.items():
        there = by_class.get(label, {}).get(name)
        if there is None and name not in raw:
            raise DataError(f"{part} lacks the image {name} of {listed}")
        if there is not None and name in raw and not filecmp.cmp(there, raw[name], shallow=False):
            raise DataError(f"{raw[name]} and {there} are different images of one name")
        if there is not None:
            placed.append(there)
        if name in raw:
            moves.append((raw[name], there or os.path.join(part, label, name)))
    _check_classes(part, set(annotations.values()) | set(folders), classes)
    return placed, moves


# ---------------------------------------------------------------------------------------------- the archive


def _unpack(archive, data_dir, folder):
    """Unpack, arrange and check beside `folder`, then rename; whatever goes wrong leaves nothing."""
    check_official(archive)
    print(f"unpacking {archive}", flush=True)
    with contextlib.ExitStack() as stack:
        with _reading(archive):
            opened = stack.enter_context(zipfile.ZipFile(archive))
        members = safe_members(opened, archive)
        partial = tempfile.mkdtemp(prefix=PARTIAL, dir=data_dir)
        stack.callback(shutil.rmtree, partial, ignore_errors=True)
        for member in members:
            _extract(opened, member, partial, archive)
        whole = os.path.join(partial, FOLDER)
        try:
            arrange_folder(whole)
        except DataError as error:
            raise DataError(f"{archive}: {str(error).replace(partial + os.sep, '')}") from None
        os.rename(whole, folder)  # an empty folder gives way


#: What zipfile raises on damaged input.
_DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, struct.error, ValueError)


@contextlib.contextmanager
def _reading(archive, member=None):
    try:
        yield
    except _DAMAGE as error:
        where = f"{archive}, member {member}," if member else archive
        raise DataError(f"{where} is truncated or damaged, or no zip archive ({error})") from None


def check_official(archive: str | os.PathLike, always: bool = False) -> None:
    """md5 of an archive that has the official one's size; `always`: whatever its size.

    Raises:
        DataError: it is another one.
    """
    size = os.path.getsize(archive)
    if size != OFFICIAL_SIZE and not always:
        return
    digest = hashlib.md5(usedforsecurity=False)
    with open(archive, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    if digest.hexdigest() != OFFICIAL_MD5:
        raise DataError(
            f"{archive} is damaged: {size} bytes with md5 {digest.hexdigest()}, "
            f"the official one has {OFFICIAL_SIZE} with {OFFICIAL_MD5}"
        )


def safe_members(opened: zipfile.ZipFile, archive: str | os.PathLike) -> list[zipfile.ZipInfo]:
    """The members below tiny-imagenet-200/, after every member of the archive has been looked at.

    Raises:
        DataError: a path that leaves the folder or is absolute, a link or another special file, a duplicated name,
            an encrypted or oddly packed member, more than a Tiny ImageNet can be.
    """
    found, seen, total = opened.infolist(), set(), 0
    if len(found) > MAX_MEMBERS:
        raise DataError(f"{archive} is refused: {len(found)} members, over {MAX_MEMBERS}")
    for member in found:
        name = member.orig_filename
        total += member.file_size
        wrong = _objection(member, name in seen, total)
        if wrong:
            raise DataError(f"{archive} is refused, nothing was unpacked: member {name} {wrong}")
        seen.add(name)
    members = [member for member in found if member.filename.startswith(f"{FOLDER}/") and not member.is_dir()]
    if not members:
        raise DataError(f"{archive} holds no {FOLDER}/: it is not Tiny ImageNet")
    return members


def _objection(member, is_duplicate, total):
    """What is wrong with a member, or None; `total` are the bytes of all members up to it."""
    name, kind = member.orig_filename, stat.S_IFMT(member.external_attr >> 16)
    is_readable = not member.flag_bits & 1 and member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    is_too_large = member.file_size > MAX_MEMBER_BYTES or total > MAX_TOTAL_BYTES
    objections = (
        (name.startswith("/") or name[1:2] == ":", "is an absolute path"),
        (".." in name.replace("\\", "/").split("/"), "leaves the folder"),
        (kind == stat.S_IFLNK, "is a link"),
        (kind not in (0, stat.S_IFREG, stat.S_IFDIR), "is no regular file"),
        (not name.isprintable() or "\\" in name or member.filename != name, "has a name that cannot be a file's"),
        (is_duplicate, "is duplicated"),
        (not is_readable, "is encrypted or packed in a way that is not read here"),
        (is_too_large, f"unpacks to {member.file_size} bytes, {total} with those before: too many for this data set"),
    )
    return next((text for is_wrong, text in objections if is_wrong), None)


def _extract(opened, member, folder, archive):
    """Write one member below `folder`; its size and CRC are checked."""
    with _reading(archive, member.filename), opened.open(member) as source:
        content = source.read()
        if len(content) != member.file_size:
            raise EOFError(f"{len(content)} of {member.file_size} bytes")
    path = os.path.join(folder, member.filename)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "xb") as file:
            file.write(content)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise DataError(f"{archive} is refused: member {member.filename} is a file and a folder at once") from None


def download(path: str, timeout: float = 30) -> None:
    """Fetch the official archive to `path`, checked by size and md5; nothing is left of a part.

    Raises:
        DataError: no network, or another file than the official one.
    """
    print(f"downloading {URL} to {path} ({OFFICIAL_SIZE / 1e6:.0f} MB)", flush=True)
    temporary = f"{path}.partial"
    try:
        with urllib.request.urlopen(URL, timeout=timeout) as source, open(temporary, "wb") as file:
            written = 0
            while block := source.read(2**20):
                written += file.write(block)
                if written > OFFICIAL_SIZE:
                    break
        check_official(temporary, always=True)
        os.replace(temporary, path)
    except (OSError, ValueError, http.client.HTTPException, DataError) as error:
        raise DataError(
            f"no Tiny ImageNet in {os.path.dirname(path) or '.'}, and it cannot be downloaded ({error}): "
            f"fetch {URL} elsewhere and put it at {path}, or name it with "
            "python imbalance_tinyimagenet.py --zip PATH"
        ) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


# ---------------------------------------------------------------------------------------------- the command


def build_parser():
    """The two flags of the command."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, prog="imbalance_tinyimagenet.py")
    parser.add_argument("--data_dir", default="./data", help=f"holds {FOLDER}, or receives it (default: %(default)s)")
    parser.add_argument("--zip", default=None, metavar="PATH", help=f"the archive (default: DATA_DIR/{ARCHIVE})")
    return parser


@command
def main(argv=None):
    options = build_parser().parse_args(argv)
    folder, changed = arrange(options.data_dir, options.zip, check_images=True)
    for part in ("train", "val"):
        counts = [len(_images(os.path.join(folder, part, name))) for name in _folders(os.path.join(folder, part))]
        spread = str(counts[0]) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
        print(f"{folder}/{part}: {sum(counts):,} images, {len(counts)} classes, {spread} a class")
    print("arranged" if changed else "nothing to change")


if __name__ == "__main__":
    main()
