"""iNaturalist 2018 in its official layout: a natural long tail of 8,142 classes.

    data/train_val2018/<kingdom>/<class>/<image>.jpg
    data/train2018.json, data/val2018.json

The annotation files are checked against the images that are there before anything is trained.
"""

import json
import os
import posixpath
from collections import Counter

from imbalance_folder import ImageSet, check_all, warn_of_shared, warn_of_untested
from utils import DataError, named, warn

CLASSES = 8142
IMAGES, ANNOTATIONS = "train_val2018", {"train": "train2018.json", "val": "val2018.json"}


def load(
    data_dir: str, imb_type: str = "none", imb_factor: float = 0.01, rand_number: int = 0,
    check_images: bool = False, workers: int = 0, skip_damaged: bool = False,
) -> tuple[ImageSet, ImageSet]:  # fmt: skip
    """(training set, validation set); classes in the order of their ids.

    Args:
        imb_type, imb_factor, rand_number: 'none' is the natural tail, see `ImageSet.long_tailed`.
        check_images, skip_damaged: see `imbalance_folder.check_all`; `workers` threads decode.

    Raises:
        UsageError: an imbalance that cannot be.
        DataError: annotations that are missing or malformed, see `read_annotations`, images that are missing, a class
            without training images, damaged images that were looked for.
    """
    annotated = {part: read_annotations(os.path.join(data_dir, name)) for part, name in ANNOTATIONS.items()}
    _check_files(data_dir, {name for images, _ in annotated.values() for name, _ in images})
    names = {}
    for images, categories in annotated.values():
        names |= {number: str(number) for _, number in images} | categories
    if len(names) != CLASSES:
        warn(f"{data_dir} has {len(names)} classes, iNaturalist 2018 has {CLASSES}")
    label = {number: k for k, number in enumerate(sorted(names))}
    classes = [names[number] for number in label]
    train, val = (
        ImageSet([os.path.join(data_dir, name) for name, _ in images], [label[n] for _, n in images], classes)
        for images, _ in annotated.values()
    )
    empty = sorted(set(label.values()) - set(train.targets))
    if empty:
        raise DataError(f"{data_dir}: classes without training images: {named([classes[k] for k in empty])}")
    warn_of_shared(train, val, os.path.join(data_dir, ANNOTATIONS["val"]))
    train = train.long_tailed(imb_type, imb_factor, rand_number)
    if check_images or skip_damaged:
        train, val = check_all(train, val, workers, skip_damaged)
    warn_of_untested(train, val)
    return train, val


def read_annotations(path: str) -> tuple[list[tuple[str, int]], dict[int, str]]:
    """One annotation file: a list of (path below the root, class id), and {class id: name}.

    Raises:
        DataError: no file or none of this form, no images, a path outside IMAGES, an image that is listed twice or not
            in one class, a class that is not a number or not among the categories.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        files = [(image["id"], posixpath.normpath(image["file_name"])) for image in content["images"]]
        rows = Counter((row["image_id"], row["category_id"]) for row in content["annotations"])
        categories = {row["id"]: str(row["name"]) for row in content.get("categories", [])}
    except FileNotFoundError:
        raise DataError(f"no {path}: it belongs to the official data of iNaturalist 2018") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DataError(f"{path} is no annotation file of iNaturalist ({type(error).__name__}: {error})") from None
    if not files:
        raise DataError(f"{path} lists no images")
    classes = dict(rows.keys())
    known, names = {key for key, _ in files}, Counter(name for _, name in files)
    wrong = {
        f"images outside {IMAGES}": [name for name in names if "\\" in name or not name.startswith(f"{IMAGES}/")],
        "files that are listed twice": [name for name, count in names.items() if count > 1],
        "ids of two images": [key for key, count in Counter(key for key, _ in files).items() if count > 1],
        "images in no class": [name for key, name in files if key not in classes],
        "images in two classes": [key for key, number in rows if classes[key] != number],
        "annotations of images that it does not list": [key for key in classes if key not in known],
        "classes that its categories do not list": [n for n in classes.values() if categories and n not in categories],
        "classes that are not numbers": [n for n in classes.values() if type(n) is not int],
    }
    for what, found in wrong.items():
        if found:
            raise DataError(f"{path} has {what}: {named([*dict.fromkeys(map(str, found))])}")
    return [(name, classes[key]) for key, name in files], categories


def _check_files(root, wanted):
    """One walk over the folders instead of a look at each of half a million files."""
    found = set()
    for folder, _, files in os.walk(os.path.join(root, IMAGES)):
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        found |= {f"{below}/{name}" for name in files}
    missing, extra = sorted(wanted - found), sorted(found - wanted)
    if missing:
        raise DataError(f"{root}: {len(missing)} of {len(wanted)} images are missing: {named(missing)}")
    if extra:
        warn(f"{root}: {len(extra)} images that no annotation names are left out: {named(extra)}")
