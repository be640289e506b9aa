"""iNaturalist 2018 in its official layout: a natural long tail of 8,142 classes.

data/train_val2018/<kingdom>/<class>/<image>.jpg
data/train2018.json, data/val2018.json
"""

import json
import os

from imbalance_folder import ImageSet, listed_files, ready
from utils import DataError, named, warn

CLASSES = 8142


def load(
    data_dir: str, imb_type: str = "none", imb_factor: float = 0.01, rand_number: int = 0,
    check_images: bool = False, workers: int = 0, skip_damaged: bool = False,
) -> tuple[ImageSet, ImageSet]:  # fmt: skip
    """(training set, validation set); classes in the order of their ids. Arguments: see `imbalance_folder.load`.

    Raises:
        UsageError: see `imbalance.class_counts`.
        DataError: annotations that are missing or malformed, images that are missing, duplicated or not in one class,
            a class without training images, damaged images if they are checked.
    """
    paths = [os.path.join(data_dir, name) for name in ("train2018.json", "val2018.json")]
    annotated = [read_annotations(path) for path in paths]
    names = {}
    for images, categories in annotated:
        names = {number: str(number) for _, number in images} | names | categories
    if len(names) != CLASSES:
        warn(f"{data_dir} has {len(names)} classes, iNaturalist 2018 has {CLASSES}")
    label = {number: k for k, number in enumerate(sorted(names))}
    classes = [names[number] for number in label]
    train, val = (
        ImageSet(listed_files(path, data_dir, [name for name, _ in images]), [label[n] for _, n in images], classes)
        for path, (images, _) in zip(paths, annotated, strict=True)
    )
    return ready(train, val, paths[1], imb_type, imb_factor, rand_number, check_images, workers, skip_damaged)


def read_annotations(path: str) -> tuple[list[tuple[str, int]], dict[int, str]]:
    """One annotation file: a list of (path below the root, class id), and {class id: name}.

    Raises:
        DataError: no file or none of this form, no images, an image that is not in one class.
    """
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        rows = [(row["image_id"], int(row["category_id"])) for row in content["annotations"]]
        categories = {int(row["id"]): str(row["name"]) for row in content.get("categories", [])}
        files = [(image["id"], image["file_name"]) for image in content["images"]]
        class_of = dict(rows)
    except FileNotFoundError:
        raise DataError(f"no {path}: it belongs to the official data of iNaturalist 2018") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not an annotation file of iNaturalist ({type(error).__name__}: {error})") from None
    if not files:
        raise DataError(f"{path} lists no images")
    wrong = {
        "images in no class": [name for key, name in files if key not in class_of],
        "images in two classes": [str(key) for key, number in rows if class_of[key] != number],
    }
    for what, found in wrong.items():
        if found:
            raise DataError(f"{path} has {what}: {named(found)}")
    return [(name, class_of[key]) for key, name in files], categories
