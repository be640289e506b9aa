"""iNaturalist 2018 in its official layout: a natural long tail of 8,142 classes.

    data/train_val2018/<kingdom>/<class>/<image>.jpg
    data/train2018.json, data/val2018.json

The annotation files are checked against the images that are there before anything is trained.
"""

import json
import os
import posixpath
from collections import Counter

from imbalance_folder import ImageSet, check_all, warn_of_shared
from utils import DataError, named, warn

CLASSES = 8142
IMAGES, ANNOTATIONS = "train_val2018", {"train": "train2018.json", "val": "val2018.json"}


def load(
    data_dir: str, imb_type: str = "none", imb_factor: float = 0.01, rand_number: int = 0,
    check_images: bool = False, workers: int = 0,
) -> tuple[ImageSet, ImageSet]:  # fmt: skip
    """(training set, validation set); classes in the order of their ids.

    Args:
        imb_type, imb_factor, rand_number: 'none' is the natural tail, see `ImageSet.long_tailed`.
        check_images: decode every image now, with `workers` threads.

    Raises:
        UsageError: an imbalance that cannot be.
        DataError: missing or malformed annotations, a part without images, a path outside IMAGES, an image that is
            missing, listed twice or not in one class, a class without images in a part; with `check_images`, a damaged
            image.
    """
    annotated = {part: read_annotations(os.path.join(data_dir, name)) for part, name in ANNOTATIONS.items()}
    _check_images(data_dir, annotated)
    names = {}
    for images, categories in annotated.values():
        names |= {number: str(number) for _, number in images} | categories
    numbers = sorted(names)
    if len(numbers) != CLASSES:
        warn(f"{data_dir} has {len(numbers)} classes, iNaturalist 2018 has {CLASSES}")
    label = {number: k for k, number in enumerate(numbers)}
    classes = [names[number] for number in numbers]
    train, val = (
        ImageSet([os.path.join(data_dir, name) for name, _ in images], [label[n] for _, n in images], classes)
        for images, _ in annotated.values()
    )
    for part, dataset in (("training", train), ("validation", val)):
        empty = sorted(set(range(len(numbers))) - set(dataset.targets))
        if empty:
            raise DataError(f"{data_dir}: classes without {part} images: {named([classes[k] for k in empty])}")
    warn_of_shared(train, val, os.path.join(data_dir, ANNOTATIONS["val"]))
    if check_images:
        check_all(train, val, workers)
    return train.long_tailed(imb_type, imb_factor, rand_number), val


def read_annotations(path: str) -> tuple[list[tuple[str, int]], dict[int, str]]:
    """One annotation file: a list of (path below the root, class id), and {class id: name}.

    Raises:
        DataError: see `load`.
    """
    try:
        with open(path) as file:
            content = json.load(file)
        images = [(image["id"], image["file_name"]) for image in content["images"]]
        rows = [(row["image_id"], row["category_id"]) for row in content["annotations"]]
        files, classes = dict(images), dict(rows)
        categories = {row["id"]: str(row["name"]) for row in content.get("categories", [])}
    except FileNotFoundError:
        raise DataError(f"no {path}: it belongs to the official data of iNaturalist 2018") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no annotation file of iNaturalist ({type(error).__name__}: {error})") from None
    _check_rows(path, files, [name for _, name in images], classes, categories)
    _check_repeated(path, images, rows)
    if not files:
        raise DataError(f"{path} lists no images")
    return [(name, classes[key]) for key, name in files.items()], categories


def _check_rows(path, files, names, classes, categories):
    outside = [str(name) for name in names if not _is_inside(name)]
    if outside:
        raise DataError(f"{path} names images outside {IMAGES}: {named(outside)}")
    in_no_class = [name for key, name in files.items() if key not in classes]
    if in_no_class:
        raise DataError(f"{path}: {len(in_no_class)} images in no class: {named(in_no_class)}")
    nameless = [str(key) for key in classes if key not in files]
    if nameless:
        raise DataError(f"{path}: {len(nameless)} annotations of images that it does not list: {named(nameless)}")
    unknown = [n for n in classes.values() if type(n) is not int or (categories and n not in categories)]
    if unknown:  # true and false are int too, hence `type`
        found = named([*dict.fromkeys(map(json.dumps, unknown))])
        raise DataError(f"{path} has classes that are no numbers or that its categories do not list: {found}")


def _check_repeated(path, images, rows):
    """Refuse files, ids and classes that contradict each other; one that only repeats itself is a warning."""
    files, classes = dict(images), dict(rows)
    twice = [name for name, count in Counter(posixpath.normpath(name) for _, name in images).items() if count > 1]
    if twice:
        raise DataError(f"{path} has duplicated files: {named(twice)}")
    shared = [name for key, name in images if files[key] != name]
    if shared:
        raise DataError(f"{path} has images whose id another image has: {named(shared)}")
    ambiguous = [files[key] for key, number in rows if classes[key] != number]
    if ambiguous:
        raise DataError(f"{path} has images in two classes: {named(ambiguous)}")
    if len(rows) > len(classes):
        again = [files[key] for key, count in Counter(key for key, _ in rows).items() if count > 1]
        warn(f"{path} has {len(again)} images with the same annotation twice: {named(again)}")


def _is_inside(name):
    return isinstance(name, str) and "\\" not in name and posixpath.normpath(name).startswith(IMAGES + "/")


def _check_images(root, annotated):
    """One walk over the folders instead of a look at each of half a million files."""
    found = set()
    for folder, _, files in os.walk(os.path.join(root, IMAGES)):
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        found |= {f"{below}/{name}" for name in files}
    wanted = {posixpath.normpath(name) for images, _ in annotated.values() for name, _ in images}
    missing = sorted(wanted - found)
    if missing:
        raise DataError(f"{root}: {len(missing)} of {len(wanted)} images are missing: {named(missing)}")
    if found - wanted:
        extra = sorted(found - wanted)
        warn(f"{root}: {len(extra)} images that no annotation names are left out: {named(extra)}")
