"""Any images on disk: a folder for each class, or a list of files, with the imbalance that they have or a made one.

DIR/train/<class>/*    training images, or DIR/<class>/* where there is no train/
DIR/val/<class>/*      test images, or DIR/test/<class>/*; without them a part of the training images is tested on
"""

import csv
import functools
import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS

from imbalance import LabelledImages
from utils import DataError, UsageError, named, warn

#: Of ImageNet's images, in [0, 1] units.
IMAGENET_MEAN: tuple[float, ...] = (0.485, 0.456, 0.406)
IMAGENET_STD: tuple[float, ...] = (0.229, 0.224, 0.225)

#: File name extensions of images, in lower case: torchvision's, two more of JPEG, and AVIF.
EXTENSIONS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".avif")
#: Folders of thumbnails and of deleted files. They are skipped, as are names that begin with a dot.
HIDDEN = ("@eaDir", "#recycle", "$RECYCLE.BIN", "__MACOSX")
#: Folders that are parts of a data set, so that none of them is a class.
PARTS = ("train", "training", "val", "valid", "validation", "test", "testing", "images")
#: Largest share of damaged images that `skip_damaged` leaves out; more are an error.
MAX_DAMAGED = 0.05

# Pillow warns of large images, palettes and odd EXIF data without the file's name, and decodes them anyway
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageSet(LabelledImages):
    """Image files and their classes.

    Args:
        paths: N files. targets: N labels in [0, K). classes: K names.

    Attributes:
        exif: turn images as their EXIF orientation says, see `open_image`.
    """

    mean, std, image_size = IMAGENET_MEAN, IMAGENET_STD, 224
    exif = False

    def __init__(self, paths: Iterable[str], targets: Iterable[int], classes: Iterable[str]) -> None:
        self.paths, self.targets, self.classes = list(paths), list(targets), list(classes)
        self.chosen = np.arange(len(self.paths))

    @property
    def samples(self) -> list[tuple[str, int]]:
        """(path, label) of each image, as ImageFolder has them."""
        return list(zip(self.paths, self.targets, strict=True))

    def left_out(self, limit: int) -> "ImageSet":
        """Not here. Raises UsageError."""
        raise UsageError("left-out images are for CIFAR, the digits and Tiny ImageNet: use --val_fraction")

    def _keep(self, positions):
        super()._keep(positions)
        self.paths = [self.paths[i] for i in positions]


def share_to_test(
    data_dir: str, val_fraction: float = 0.0, test_fraction: float = 0.0,
    train_list: str | None = None, val_list: str | None = None,
) -> float:  # fmt: skip
    """The share of each class of the training images that is tested on, `load`'s `test_fraction`.

    It is 0 where there are test images of their own: `val_list`, val/ or test/. Without them it is `test_fraction`, and
    where that is not given `val_fraction`. The validation part, which picks the best epoch, is `val_fraction` of what
    is left, so that --val_fraction alone makes three parts of one folder.

    Raises:
        UsageError: no folder, no test images at all, a `val_list` without a `train_list`, or a `test_fraction`
            although the data have test images of their own.
    """
    if val_list and not train_list:
        raise UsageError("--val_list needs --train_list")
    share = test_fraction or val_fraction
    own = _test_source(data_dir, train_list, val_list, share)
    if own and test_fraction:
        raise UsageError(f"--test_fraction {test_fraction:g}: the test images are those of {own}")
    return 0.0 if own else share


def load(
    data_dir: str, imb_type: str = "none", imb_factor: float = 0.01, rand_number: int = 0, test_fraction: float = 0.0,
    train_list: str | None = None, val_list: str | None = None, check_images: bool = False, workers: int = 0,
    skip_damaged: bool = False, exif: bool = False, mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None, classes: Sequence[str] | None = None,
) -> tuple[ImageSet, ImageSet]:  # fmt: skip
    """(training set, test set) of the folders below data_dir, or of two lists of files below it.

    Args:
        imb_type, imb_factor, rand_number: see `imbalance.class_counts`; 'none' keeps the imbalance that the data have.
        test_fraction: share of each class of the training images that is the test set, see `share_to_test`.
        train_list, val_list: see `read_list`.
        check_images, skip_damaged: decode every image now, with `workers` threads, see `check_all`.
        exif: see `open_image`.
        mean, std: of the three channels, in [0, 1] units; None: ImageNet's.
        classes: for an evaluation, the checkpoint's classes. Without train/ and `train_list`, or with a `val_list`
            alone, the training set is empty, and the images of the list, val/, test/ or data_dir itself are tested.

    Raises:
        UsageError: see `imbalance.class_counts` and `imbalance.hold_out`; no folder or no test images.
        DataError: missing or damaged data.
    """
    has_train = train_list or (not val_list and os.path.isdir(os.path.join(data_dir, "train")))
    test_only = classes is not None and not has_train
    own = _test_source(data_dir, train_list, val_list, test_fraction or test_only)
    holds_out = test_fraction and not (test_only and own)
    if not (train_list or val_list):
        _warn_of_unused(data_dir, None if holds_out else own)
    if test_only and not holds_out:
        test = read_list(val_list, data_dir, classes) if val_list else read_folder(own or data_dir, classes)
        train = test.subset([])
    else:
        train = read_list(train_list, data_dir) if train_list else read_folder(_training_folder(data_dir))
        if train.num_classes < 2:
            raise DataError(f"{train_list or data_dir} has one class, {named(train.classes)}: training needs two")
        if not train.targets:
            raise DataError(f"no training images in {data_dir} (images end in {' '.join(EXTENSIONS)})")
        if test_fraction and not val_list:
            own, (train, test) = None, train.hold_out(test_fraction, rand_number)
        else:
            test = read_list(val_list, data_dir, train.classes) if val_list else read_folder(own, train.classes)
    for part in (train, test):
        part.exif, part.mean, part.std = exif, tuple(mean or part.mean), tuple(std or part.std)
    return ready(train, test, own, imb_type, imb_factor, rand_number, check_images, workers, skip_damaged)


def ready(
    train: ImageSet, test: ImageSet, source: str | None, imb_type: str, imb_factor: float, rand_number: int,
    check_images: bool, workers: int, skip_damaged: bool,
) -> tuple[ImageSet, ImageSet]:  # fmt: skip
    """Make the imbalance and check both parts; decode every image if `check_images` or `skip_damaged` is set.

    Warns of test images that are training images too, and of classes without test images.

    Args:
        source: the folder or list of the test images, for the warning; None: they are held out of the training images.
        The others, and the errors: see `load`.
    """
    real = functools.cache(os.path.realpath)  # of folders: resolving each part of each path would take minutes

    def resolved(path):
        path = os.path.join(real(os.path.dirname(path)), os.path.basename(path))
        return os.path.realpath(path) if os.path.islink(path) else path

    known = {*map(resolved, train.paths)}
    shared = sum(resolved(path) in known for path in test.paths) if source else 0
    if shared:
        warn(f"{shared} of the {len(test.paths)} images of {source} are training images too")
    if train.targets:
        _check_no_class_is_empty(train)
        if imb_type != "none":
            train.make_imbalanced(imb_type, imb_factor, rand_number)
    if check_images or skip_damaged:
        train, test = check_all(train, test, workers, skip_damaged)
    if not test.targets:
        raise DataError("no test images")
    untested = sorted(set(train.targets) - set(test.targets))
    if untested:
        names = [test.classes[label] for label in untested]
        warn(f"no test image of {len(untested)} classes, whose accuracy is n/a: {named(names)}")
    return train, test


def _check_no_class_is_empty(train):
    empty = [name for name, count in zip(train.classes, train.get_cls_num_list(), strict=True) if not count]
    if empty:
        raise DataError(f"no training images of the classes {named(empty)}")


def _test_source(data_dir, train_list, val_list, has_other):
    """The list, or the folder, of the test images; None: there is none, which is an error unless `has_other`."""
    if not os.path.isdir(data_dir):
        raise UsageError(f"no folder {data_dir}: --data_dir names the one with train/ and val/, or the listed files")
    if val_list:
        return val_list
    folders = [] if train_list else [os.path.join(data_dir, name) for name in ("val", "test")]
    found = next(filter(os.path.isdir, folders), None)
    if not found and not has_other:
        wanted = "--val_list" if train_list else f"val/ or test/ in {data_dir}"
        raise UsageError(
            f"no {wanted}: --val_fraction F holds out two parts of the training images, one to choose the best epoch, "
            "one to test on"
        )
    return found


def _warn_of_unused(data_dir, tested):
    """Name the folders that look like parts of the data and are not read, as test/ beside val/ is not."""
    _, folders, _ = next(os.walk(data_dir), ("", [], []))
    for name in sorted(folders):
        folder = os.path.join(data_dir, name)
        if name.lower() in PARTS and name not in ("train", "images") and folder != tested:
            how = "evaluate on it with" if tested else "to evaluate on it, move it to NEW/val/ and run"
            test_set = tested or "a part of the training images"
            warn(f"{folder} is not used, {test_set} is the test set: {how} -e --data_dir {folder if tested else 'NEW'}")


def _training_folder(data_dir):
    """train/, or the folder itself where it holds the classes."""
    folder = os.path.join(data_dir, "train")
    if os.path.isdir(folder):
        return folder
    _, names, _ = next(os.walk(data_dir, onerror=_unreadable))
    parts = [name for name in names if name.lower() in PARTS]
    if parts or not names:
        beside = f" beside {named(parts)}/" if parts else ""
        raise DataError(f"no folder {folder}{beside}: it must hold a folder for each class")
    warn(f"no train/ in {data_dir}: its folders are the classes")
    return data_dir


def check_all(train: ImageSet, test: ImageSet, workers: int, skip_damaged: bool) -> tuple[ImageSet, ImageSet]:
    """Decode every image of both parts, with several threads. `skip_damaged`: the parts without those that are damaged.

    Raises:
        DataError: damaged images; with `skip_damaged`, more than a share of MAX_DAMAGED, or all of a class.
    """

    def problem(path: str) -> str | None:
        try:
            open_image(path, train.exif)
        except DataError as error:
            return str(error)
        return None

    paths = train.paths + test.paths
    with ThreadPoolExecutor(max(1, workers)) as pool:  # Pillow decodes without holding the interpreter's lock
        problems = {k: text for k, text in enumerate(pool.map(problem, paths)) if text}
    if not problems:
        return train, test
    damaged, which = f"{len(problems)} of {len(paths)} images are damaged", named([*problems.values()], "; ")
    is_error = not skip_damaged or len(problems) > MAX_DAMAGED * len(paths)
    for text in problems.values() if is_error else ():
        warn(text)
    if not skip_damaged:
        raise DataError(f"{damaged} (--skip_damaged leaves them out): {which}")
    if is_error:
        raise DataError(f"{damaged}, --skip_damaged leaves out {MAX_DAMAGED:.0%} at most: {which}")
    warn(f"{damaged} and left out: {which}")
    n = len(train.paths)
    train = train.subset([k for k in range(n) if k not in problems])
    test = test.subset([k for k in range(len(test.paths)) if n + k not in problems])
    if train.targets:
        _check_no_class_is_empty(train)
    return train, test


# ------------------------------------------------------------------------------------------------- folders


def read_folder(folder: str, classes: Sequence[str] | None = None) -> ImageSet:
    """The images of a folder with one folder for each class, in torchvision's order.

    Links to folders inside a class, hidden files and folders (".name" and HIDDEN), what is not a regular file and what
    does not end as images do are skipped with a warning.

    Args:
        classes: the classes of the training images, which decide the labels; None: the names of the folders.

    Raises:
        DataError: no folder, one that cannot be read, no class, or one that is not in `classes`.
    """
    _, found, others = next(os.walk(folder, onerror=_unreadable))
    folders = sorted(name for name in found if not _is_hidden(name))
    if not folders:
        raise DataError(f"no class folders in {folder}")
    loose = [name for name in others if not _is_hidden(name) and name.lower().endswith(EXTENSIONS)]
    skipped = Counter({"hidden": len(found) - len(folders), "images in no class": len(loose)})
    skipped["broken links"] = sum(not os.path.exists(os.path.join(folder, name)) for name in others)
    samples = [(name, path) for name in folders for path in _walk(os.path.join(folder, name), skipped)]
    _warn_of_skipped(folder, skipped)
    _check_names(folder, [*folders, *(classes or ())], known=classes or ())
    label = {name: k for k, name in enumerate(folders if classes is None else classes)}
    foreign = sorted({name for name, _ in samples} - set(label))
    if foreign:
        raise DataError(f"{folder} has classes without training images: {named(foreign)}")
    return ImageSet([path for _, path in samples], [label[name] for name, _ in samples], label)


def list_images(path: str) -> list[str]:
    """The images in a folder and in the folders below it, in order; or the one image that `path` is.

    Raises:
        DataError: no image, or a folder that cannot be read.
    """
    skipped: Counter = Counter()
    paths = [path] if os.path.isfile(path) else list(_walk(path, skipped))
    _warn_of_skipped(path, skipped)
    if not paths:
        raise DataError(f"no images in {path} (images end in {' '.join(EXTENSIONS)})")
    return paths


def _warn_of_skipped(folder, skipped):
    reasons = [f"{what}: {count}" for what, count in skipped.items() if count]
    if reasons:
        warn(f"skipped in {folder}: {', '.join(reasons)}")


def _unreadable(error):
    raise DataError(f"folder {error.filename} cannot be read: {error.strerror}") from None


def _is_hidden(name):
    return name.startswith(".") or name in HIDDEN


def _walk(class_folder, skipped):
    """The images of a class, sorted by folder, then by name; `skipped` counts the other files."""
    files = []
    for parent, folders, names in os.walk(class_folder, onerror=_unreadable):
        shown = [name for name in folders if not _is_hidden(name)]
        skipped["hidden"] += len(folders) - len(shown) + sum(map(_is_hidden, names))
        skipped["links to folders"] += sum(os.path.islink(os.path.join(parent, name)) for name in shown)
        folders[:] = shown  # os.walk descends into these
        files += [(parent, name) for name in names if not _is_hidden(name)]
    for parent, name in sorted(files):
        path = os.path.join(parent, name)
        if not name.lower().endswith(EXTENSIONS):
            skipped[f"files that end in {os.path.splitext(name)[1] or 'nothing'}"] += 1
        elif not os.path.isfile(path):
            skipped["not regular files"] += 1
        else:
            yield path


def _check_names(folder, names, known=()):
    """Refuse names that look the same: a class that is called by both would be two. `known` ones were checked."""
    looks = Counter(unicodedata.normalize("NFC", name) for name in set(names))
    alike = [look for look, count in looks.items() if count > 1]
    if alike:
        raise DataError(f"{folder}: classes whose names differ in Unicode normal form only: {named(alike)}; rename one")
    cases = Counter(name.casefold() for name in set(names))
    differ = sorted(name for name in set(names) if cases[name.casefold()] > 1)
    if not set(differ) <= set(known):
        warn(f"{folder}: two classes whose names differ in upper and lower case only: {named(differ)}")


# --------------------------------------------------------------------------------------------------- lists


def read_list(path: str | os.PathLike, root: str | os.PathLike, classes: Sequence[str] | None = None) -> ImageSet:
    """The images of a list of files, which are relative to `root`.

    Lines `path label`, as the lists of ImageNet-LT and Places-LT: paths may contain spaces, labels are numbers. A list
    whose name ends in .csv has the columns `image` and `label`, and its labels may be names.

    Args:
        path: the list, in UTF-8.
        classes: names of the classes of the training list; None: this is it. Its labels are 0, 1, ... without gaps, or
            names, which are sorted.

    Raises:
        DataError: no list, a line of another form, a file that is missing or listed twice, labels with gaps or that
            the training list does not have.
    """
    rows = _csv_rows(path) if os.fspath(path).lower().endswith(".csv") else _text_rows(path)
    if not rows:
        raise DataError(f"{path} lists no images")
    paths = listed_files(path, root, [name for name, _ in rows])
    labels = [label for _, label in rows]
    classes = _classes_of(path, labels) if classes is None else classes
    number = {name: k for k, name in enumerate(classes)}
    foreign = sorted(set(labels) - set(classes))
    if foreign:
        raise DataError(f"{path} has labels that the training list does not have: {named(foreign)}")
    return ImageSet(paths, [number[label] for label in labels], classes)


def listed_files(source: str | os.PathLike, root: str | os.PathLike, names: Iterable[str]) -> list[str]:
    """Paths of the files that `source` names, relative to `root`. Raises DataError: one is missing or duplicated."""
    paths = [os.path.normpath(os.path.join(root, name)) for name in names]
    twice = [path for path, count in Counter(paths).items() if count > 1]
    if twice:
        raise DataError(f"{source} has duplicated files: {named(twice)}")
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(f"{source}: {len(missing)} of {len(paths)} files are missing or not regular: {named(missing)}")
    return paths


def _lines(path):
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            content = file.read()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if content[:2] in ("\udcff\udcfe", "\udcfe\udcff"):
        raise DataError(f"{path} is UTF-16: save it as UTF-8")
    return content.split("\n")  # not splitlines, which splits at \f, \v and U+2028 too


def _text_rows(path):
    rows = []
    for number, line in enumerate(_lines(path), 1):
        fields = line.rsplit(None, 1)
        if fields and not (len(fields) == 2 and _is_number(fields[1])):
            raise DataError(f"{path}, line {number}: {line[:80]!r} is not 'path label' with a label from 0")
        rows += [(fields[0], str(int(fields[1])))] if fields else []
    return rows


def _csv_rows(path):
    def fields(number, line):  # of this line alone: a quote that is left open would swallow the next ones
        try:
            return next(csv.reader([line.strip()], skipinitialspace=True, strict=True))
        except csv.Error as error:
            raise DataError(f"{path}, line {number}: {error} (a quoted field must end in its line)") from None

    header, *lines = (fields(number, line) for number, line in enumerate(_lines(path), 1))
    if any(header.count(name) != 1 for name in ("image", "label")):
        text = ",".join(header)[:80]
        raise DataError(f"{path}: the first line must be image,label, separated by a comma: it is {text!r}")
    rows = []
    for number, line in enumerate(lines, 2):
        if any(line[len(header) :]):
            text = f"{len(line)} fields, but {len(header)} in the first line: quote a field that has a comma"
            raise DataError(f"{path}, line {number}: {text}")
        row = dict(zip(header, line, strict=False))
        rows += [(row.get("image"), row.get("label", "").strip())] if row else []
        if row and not all(rows[-1]):
            raise DataError(f"{path}, line {number}: a row needs an image and its label")
    return rows


def _is_number(text):
    return text.isascii() and text.isdigit() and len(text) < 10


def _classes_of(path, labels):
    """The names of the classes: 0 to K - 1 of labels without gaps, or the names that are used, sorted."""
    names = set(labels)
    if not all(_is_number(name) and name == str(int(name)) for name in names):  # 007 is a name
        _check_names(path, names)
        return sorted(names)
    gap = next((k for k in range(len(names)) if str(k) not in names), None)
    if gap is not None:
        way = " (labels from 1 on: subtract 1)" if gap == 0 else ""
        raise DataError(
            f"{path}: labels must be 0 to K - 1 without gaps, none of its {len(labels)} images has {gap}{way}"
        )
    return [str(k) for k in range(len(names))]


# -------------------------------------------------------------------------------------------------- images


def open_image(path: str | os.PathLike, exif: bool = False) -> Any:
    """An image file, decoded, as an RGB PIL image; 16-bit grey levels are scaled to 8 bits.

    As torchvision's ImageFolder, it drops an alpha channel, and the orientation in EXIF data.

    Args:
        exif: turn the image as its EXIF orientation says.

    Raises:
        DataError: it is not a regular file, cannot be decoded, or has pixels whose range is unknown (32-bit, float).
    """
    if not os.path.isfile(path):  # opening a named pipe would wait forever
        raise DataError(f"{path} is missing or not a regular file")
    try:
        with Image.open(path) as opened:
            opened.filename = ""  # else Pillow maps an uncompressed TIFF of another orientation into scrambled pixels
            image = ImageOps.exif_transpose(opened) if exif else opened
            # a PNG or PGM of mode I is what older versions of Pillow make of 16 bits
            if image.mode.startswith("I;16") or (image.mode == "I" and opened.format in ("PNG", "PPM")):
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode not in ("I", "F"):
                return image.convert("RGB")
            kind = "float" if image.mode == "F" else "32-bit"
    except Image.DecompressionBombError:
        raise DataError(
            f"{path} has over {2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels, which Pillow does not decode: "
            "make it smaller, or leave it out with --skip_damaged"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes Pillow raise nearly anything
        reason = str(error).replace(f" {os.fspath(path)!r}", "").rstrip(":")  # the line begins with the name
        raise DataError(f"{path} cannot be decoded ({reason})") from None
    raise DataError(f"{path} has {kind} pixels, whose range is unknown: convert it to 8 or 16 bits")
