"""iNaturalist 2018 in its official layout: a natural long tail of 8,142 classes.

    data/train_val2018/<kingdom>/<class>/<picture>.jpg
    data/train2018.json, data/val2018.json

The annotation files are checked against the pictures that are there before anything is trained.
"""

import json
import os
import posixpath

from imbalance_folder import PictureSet, named
from utils import DataError, warn

CLASSES = 8142
PICTURES, ANNOTATIONS = "train_val2018", {"train": "train2018.json", "val": "val2018.json"}


def load(root):
    """(training PictureSet, validation PictureSet); classes in the order of their ids.

    Raises:
        DataError: missing or malformed annotations, a path outside PICTURES, a picture that is not there or in no
            class, a class without training pictures.
    """
    annotated = {part: read_annotations(os.path.join(root, name)) for part, name in ANNOTATIONS.items()}
    _check_pictures(root, annotated)
    names = {}
    for pictures, categories in annotated.values():
        names |= {number: str(number) for _, number in pictures} | categories
    numbers = sorted(names)
    if len(numbers) != CLASSES:
        warn(f"{root} has {len(numbers)} classes, iNaturalist 2018 has {CLASSES}")
    label = {number: k for k, number in enumerate(numbers)}
    sets = []
    for pictures, _ in annotated.values():
        paths = [os.path.join(root, name) for name, _ in pictures]
        targets = [label[number] for _, number in pictures]
        sets.append(PictureSet.whole(paths, targets, [names[number] for number in numbers]))
    empty = sorted(set(range(len(numbers))) - set(sets[0].targets))
    if empty:
        raise DataError(f"{root}: classes without training pictures: {named([sets[0].classes[k] for k in empty])}")
    return tuple(sets)


def read_annotations(path):
    """One annotation file: a list of (path below the root, class id), and {class id: name}.

    Raises:
        DataError: see `load`.
    """
    try:
        with open(path) as file:
            content = json.load(file)
        files = {image["id"]: image["file_name"] for image in content["images"]}
        classes = {row["image_id"]: row["category_id"] for row in content["annotations"]}
        categories = {row["id"]: str(row["name"]) for row in content.get("categories", [])}
    except FileNotFoundError:
        raise DataError(f"no {path}: it belongs to the official data of iNaturalist 2018") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no annotation file of iNaturalist ({type(error).__name__}: {error})") from None
    _check_rows(path, files, classes, categories)
    return [(name, classes[key]) for key, name in files.items()], categories


def _check_rows(path, files, classes, categories):
    outside = [str(name) for name in files.values() if not _is_inside(name)]
    if outside:
        raise DataError(f"{path} names pictures outside {PICTURES}: {named(outside)}")
    in_no_class = [name for key, name in files.items() if key not in classes]
    if in_no_class:
        raise DataError(f"{path}: {len(in_no_class)} pictures in no class: {named(in_no_class)}")
    nameless = [str(key) for key in classes if key not in files]
    if nameless:
        raise DataError(f"{path}: {len(nameless)} annotations of pictures that it does not list: {named(nameless)}")
    known = all(isinstance(number, int) and (not categories or number in categories) for number in classes.values())
    if not known:
        raise DataError(f"{path} has classes that its categories do not list")


def _is_inside(name):
    return isinstance(name, str) and "\\" not in name and posixpath.normpath(name).startswith(PICTURES + "/")


def _check_pictures(root, annotated):
    """One walk over the folders instead of a look at each of half a million files."""
    found = set()
    for folder, _, files in os.walk(os.path.join(root, PICTURES)):
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        found |= {f"{below}/{name}" for name in files}
    wanted = {posixpath.normpath(name) for pictures, _ in annotated.values() for name, _ in pictures}
    missing = sorted(wanted - found)
    if missing:
        raise DataError(f"{root}: {len(missing)} of {len(wanted)} pictures are not there: {named(missing)}")
    if found - wanted:
        extra = sorted(found - wanted)
        warn(f"{root}: {len(extra)} pictures that no annotation names are left out: {named(extra)}")
