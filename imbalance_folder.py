"""Any images on disk: a folder for each class, or a list of files, with the imbalance that they have or a made one."""

import filecmp
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
from torchvision.datasets.folder import IMG_EXTENSIONS

from imbalance import LabelledImages
from utils import DataError, UsageError, named, warn

#: Of ImageNet's images, in [0, 1] units.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

#: How the names of images end, in small letters: torchvision's, and two more of JPEG.
EXTENSIONS = (*IMG_EXTENSIONS, ".jfif", ".jpe")


class ImageSet(LabelledImages):
    """Image files and their classes.

    Args:
        paths: N files. targets: N labels in [0, K). classes: K names.
    """

    mean, std, image_size = IMAGENET_MEAN, IMAGENET_STD, 224

    def __init__(self, paths: Iterable[str], targets: Iterable[int], classes: Iterable[str]) -> None:
        self.paths, self.targets, self.classes = list(paths), list(targets), list(classes)
        self.chosen = np.arange(len(self.paths))

    @property
    def samples(self) -> list[tuple[str, int]]:
        """(path, label) of each image, as ImageFolder has them."""
        return list(zip(self.paths, self.targets, strict=True))

    def long_tailed(self, imb_type: str, imb_factor: float, rand_number: int) -> "ImageSet":
        """A data set with the imbalance of `imbalance.class_counts`; 'none' keeps the one that the data have.

        Raises:
            UsageError: see `imbalance.class_counts`.
        """
        tailed = self.subset(np.arange(len(self.paths)))
        try:
            if imb_type != "none":
                tailed.make_imbalanced(imb_type, imb_factor, rand_number)
        except ValueError as error:
            raise UsageError(str(error)) from None
        return tailed

    def _keep(self, positions):
        super()._keep(positions)
        self.paths = [self.paths[i] for i in positions]


def load(
    data_dir: str, imb_type: str = "none", imb_factor: float = 0.01, rand_number: int = 0,
    test_fraction: float = 0.0, train_list: str | None = None, val_list: str | None = None,
    check_images: bool = False, workers: int = 0,
) -> tuple[ImageSet, ImageSet]:  # fmt: skip
    """(training set, test set) of data_dir/train and data_dir/val, or of two lists of files below data_dir.

    Args:
        imb_type, imb_factor, rand_number: see `ImageSet.long_tailed`.
        test_fraction: share of each class of the training images that is the test set; 0: val/ or val_list is.
        train_list, val_list: see `read_list`.
        check_images: decode every image now, with `workers` threads.

    Raises:
        UsageError: an imbalance or a test part that cannot be. DataError: missing or damaged data.
    """
    if not os.path.isdir(data_dir):
        raise DataError(
            f"no folder {data_dir}: --data_dir names the one with train/ and val/, or with the listed files"
        )
    if bool(train_list) < bool(val_list):
        raise UsageError("--val_list needs --train_list beside it")
    train = read_list(train_list, data_dir) if train_list else read_folder(os.path.join(data_dir, "train"))
    if test_fraction:
        train, test = _split(train, test_fraction)
    elif train_list:
        test = _read_test_list(val_list, data_dir, train)
    else:
        test = _read_test_folder(data_dir, train)
    train = train.long_tailed(imb_type, imb_factor, rand_number)
    if check_images:
        check_all(train, test, workers)
    return train, test


def _split(train, fraction):
    alone = train.classes_of_one_image()
    try:
        train, test = train.hold_out(fraction)
    except ValueError as error:
        raise UsageError(f"--val_fraction: {error}") from None
    if alone:
        warn(f"--val_fraction: no test image of classes that have one image: {named(alone)}")
    return train, test


def _read_test_list(val_list, data_dir, train):
    if not val_list:
        raise UsageError("--train_list needs --val_list beside it, or --val_fraction")
    test = read_list(val_list, data_dir, train.classes)
    absent = sorted(set(train.targets) - set(test.targets))
    if absent:
        raise DataError(f"{val_list} has no images of classes of the training list: {named([*map(str, absent)])}")
    warn_of_shared(train, test, val_list)
    return test


def warn_of_shared(train: ImageSet, test: ImageSet, source: str) -> None:
    """Warn of test images that are training images too; `source` says where the test images come from."""
    shared = len(set(train.paths) & set(test.paths))
    if shared:
        warn(f"{shared} of the {len(test.paths)} images of {source} are training images too")


def _read_test_folder(data_dir, train):
    folder = os.path.join(data_dir, "val")
    if not os.path.isdir(folder):
        raise UsageError(f"no val folder in {data_dir}: --val_fraction F tests on a part of train/")
    test = read_folder(folder)
    for part, one, other in (("train", train, test), ("val", test, train)):
        alone = sorted(set(one.classes) - set(other.classes))
        if alone:
            raise DataError(f"{data_dir}: classes in {part}/ only: {named(alone)}")
    _warn_of_training_images(train, test, os.path.join(data_dir, "train"), folder)
    return test


def _warn_of_training_images(train, test, train_folder, folder):
    """Warn of test images that are links into the training folder, or all copies of training images."""
    inside = os.path.join(os.path.realpath(train_folder), "")
    linked = sum(os.path.realpath(path).startswith(inside) for path in test.paths)
    if linked:
        return warn(f"{linked} of the {len(test.paths)} images of {folder} are training images too")
    known = set(train.paths)
    pairs = [(path, os.path.join(train_folder, os.path.relpath(path, folder))) for path in test.paths]
    alike = all(twin in known and os.path.getsize(path) == os.path.getsize(twin) for path, twin in pairs)
    if alike and filecmp.cmp(*pairs[0], shallow=False):
        warn(f"the images of {folder} look like training images: all have the names and sizes of images of train/")


def check_all(train: ImageSet, test: ImageSet, workers: int = 0) -> None:
    """Decode every image of both parts, with several threads. Raises DataError that names those that are damaged."""

    def problem(path: str) -> str | None:
        try:
            open_image(path)
        except DataError as error:
            return str(error)
        return None

    paths = train.paths + test.paths
    problems = [found for found in map_in_threads(problem, paths, workers) if found]
    if problems:
        raise DataError(f"{len(problems)} of {len(paths)} images are damaged: {named(problems, '; ')}")


# ------------------------------------------------------------------------------------------------- folders


def read_folder(folder: str) -> ImageSet:
    """The images of a folder with one folder for each class, in torchvision's order.

    Links to folders inside a class are not followed, nor links to images of the same tree or to an image that another
    link names, so that no image counts twice. These, links that lead nowhere, hidden folders and files (".name"), files
    that are no regular ones and those that do not end as images do are skipped with a warning.

    Raises:
        DataError: no folder, no class, or a class without images.
    """
    if not os.path.isdir(folder):
        raise DataError(f"no folder {folder}")
    tree = _Tree(folder)
    classes = tree.classes()
    if not classes:
        raise DataError(f"no class folders in {folder}")
    found = {name: list(tree.images(os.path.join(folder, name))) for name in classes}
    empty = [os.path.join(folder, name) for name in classes if not found[name]]
    tree.warn_of_skipped()
    if empty:
        raise DataError(f"class folders without images: {named(empty)} (images end in {' '.join(EXTENSIONS)})")
    paths = [path for name in classes for path in found[name]]
    return ImageSet(paths, [label for label, name in enumerate(classes) for _ in found[name]], classes)


class _Tree:
    """A walk over class folders that notes what it skips."""

    def __init__(self, folder):
        self.folder = folder
        self.roots, self.linked, self.skipped = [os.path.realpath(folder)], set(), Counter()
        self.other = []  # names of files that do not end as images do

    def classes(self) -> list[str]:
        """The names of the class folders, sorted."""
        entries = list(os.scandir(self.folder))
        self.skipped["links that lead nowhere"] += sum(e.is_symlink() and not os.path.exists(e) for e in entries)
        return sorted(self._shown([entry.name for entry in entries if entry.is_dir()]))

    def _shown(self, names):
        """The names that are not hidden."""
        shown = [name for name in names if not name.startswith(".")]
        self.skipped["hidden"] += len(names) - len(shown)
        return shown

    def _walk(self, folder):
        for parent, folders, names in os.walk(folder):
            folders[:] = self._shown(folders)  # os.walk descends into these
            yield parent, folders, self._shown(names)

    def images(self, class_folder: str) -> Iterator[str]:
        """The path of each image, sorted by folder, then by name."""
        if os.path.islink(class_folder):
            if self._is_known(class_folder):
                self.skipped["symbolic links"] += 1
                return
            self.roots.append(os.path.realpath(class_folder))
        for parent, folders, names in sorted(self._walk(class_folder)):
            self.skipped["symbolic links"] += sum(os.path.islink(os.path.join(parent, name)) for name in folders)
            for name in sorted(names):
                path = os.path.join(parent, name)
                if not name.lower().endswith(EXTENSIONS):
                    self.other.append(name)
                elif os.path.islink(path) and self._is_known(path):
                    self.skipped["symbolic links"] += 1
                elif not os.path.isfile(path):
                    self.skipped["no regular files"] += 1
                else:
                    yield path

    def _is_known(self, link):
        """Whether a link leads back into the tree, or to what another link has named."""
        real = os.path.realpath(link)
        known = real in self.linked or any(os.path.commonpath([real, root]) in (real, root) for root in self.roots)
        self.linked.add(real)
        return known

    def warn_of_skipped(self):
        texts = [f"{what}: {count}" for what, count in self.skipped.items() if count]
        if self.other:
            texts.append(f"files that do not end as images do: {len(self.other)}, as {self.other[0]}")
        if texts:
            warn(f"skipped in {self.roots[0]}: {', '.join(texts)}")


# --------------------------------------------------------------------------------------------------- lists


def read_list(path: str | os.PathLike, root: str | os.PathLike, classes: Sequence[str] | None = None) -> ImageSet:
    """The images of a list of files: lines `path label`, as the lists of ImageNet-LT and Places-LT.

    Args:
        path: the list. Paths in it are below `root` and may contain spaces; the label is the last field.
        classes: names of the classes of the training list; None: this is it, and its labels are 0, 1, ... without gaps.

    Raises:
        DataError: no list, a line of another form, a path outside `root`, a file that is missing or listed twice,
            labels with gaps or beyond the training list's.
    """
    rows = [_parse_row(path, number, line) for number, line in enumerate(_lines(path), 1) if line.strip()]
    if not rows:
        raise DataError(f"{path} lists no images")
    outside = [name for name, _ in rows if not _is_below(name, root)]
    if outside:
        raise DataError(f"{path} names files outside {root}: {named(outside)}")
    paths = [os.path.normpath(os.path.join(root, name)) for name, _ in rows]
    twice = [name for name, count in Counter(paths).items() if count > 1]
    if twice:
        raise DataError(f"{path} has duplicated files: {named(twice)}")
    missing = [name for name in paths if not os.path.isfile(name)]
    if missing:
        raise DataError(
            f"{path}: {len(missing)} of {len(paths)} files are missing (or no regular files): {named(missing)}"
        )
    targets = [label for _, label in rows]
    if classes is None:
        classes = _classes_of(path, targets)
    elif max(targets) >= len(classes):
        raise DataError(f"{path} has the label {max(targets)}, the training list has labels 0 to {len(classes) - 1}")
    return ImageSet(paths, targets, classes)


def _lines(path):
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            return file.read().splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None


def _parse_row(path, number, line):
    """(file name, label) of a line."""
    fields = line.rsplit(None, 1)
    if len(fields) < 2 or not (fields[1].isascii() and fields[1].isdigit() and len(fields[1]) < 10):
        raise DataError(f"{path}, line {number}: {line[:80]!r} is not 'path label' with a label from 0")
    return fields[0], int(fields[1])


def _is_below(name, root):
    root = os.path.abspath(root)
    return "\0" not in name and os.path.abspath(os.path.join(root, name)).startswith(os.path.join(root, ""))


def _classes_of(path, targets):
    """The names 0 to K - 1 of labels without gaps."""
    labels = set(targets)
    gap = next((k for k in range(len(labels)) if k not in labels), None)
    if gap is not None:
        raise DataError(f"{path}: labels must be 0 to K - 1 without gaps, none of its {len(targets)} images has {gap}")
    return [str(k) for k in range(len(labels))]


# -------------------------------------------------------------------------------------------------- images


def open_image(path: str | os.PathLike) -> Any:
    """An image file, decoded, as an RGB PIL image; 16-bit grey levels are scaled to 8 bits.

    Raises:
        DataError: it is no regular file, cannot be decoded, or has pixels whose range is unknown (32-bit, float).
    """
    from PIL import Image

    if not os.path.isfile(path):  # opening a named pipe would wait forever
        raise DataError(f"{path} is missing or no regular file")
    try:
        with Image.open(path) as image:
            # a PNG or PGM of mode I is what older versions of Pillow make of 16 bits
            if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode not in ("I", "F"):
                return image.convert("RGB")
            kind = "float" if image.mode == "F" else "32-bit"
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        reason = str(error).replace(f" {os.fspath(path)!r}", "").rstrip(":")  # the line begins with the name
        raise DataError(f"{path} cannot be decoded ({reason})") from None
    raise DataError(f"{path} has {kind} pixels, whose range is unknown: convert it to 8 or 16 bits")


def read_image(path: str | os.PathLike) -> npt.NDArray[np.uint8]:
    """An image as (H, W, 3) uint8; grey ones become RGB. Raises DataError, see `open_image`."""
    return np.asarray(open_image(path))


def map_in_threads(function: Callable, items: Sequence, workers: int) -> Iterator:
    """`function` of each item, in order, by `workers` threads."""
    with ThreadPoolExecutor(max(1, workers)) as pool:  # Pillow decodes without holding the interpreter's lock
        for start in range(0, len(items), 4096):  # in parts, so that an error ends it soon
            yield from pool.map(function, items[start : start + 4096])
