"""Small folders of image files as folder_train.py and inat_train.py read them, and runs of these scripts."""

import functools
import json
from pathlib import Path

from script_runner import run_script
from tinyimagenet_maker import image_of

import folder_train

#: Training images of each class of `make_folder`.
COUNTS = (20, 10, 4)
#: Three epochs, the last two with an IB loss where one is asked for.
RUN = [
    "-a", "mobilenet_v3_small", "--image_size", "32", "--batch-size", "8", "--epochs", "3", "--milestones", "2",
    "--seed", "0", "--threads", "1", "-j", "0", "--start_ib_epoch", "1", "--lr", "0.02",
]  # fmt: skip
IB = ["--loss_type", "IB", "--train_rule", "IBReweight"]
#: iNaturalist: training images of each class, a natural long tail; the ids of the classes have gaps, as in parts of the
#: real data.
TAIL, IDS = (24, 11, 5, 2), (3, 10, 4000, 8141)


def make_folder(root, counts=COUNTS, names=None):
    """root/train and root/val with a folder for each class; the images have different sizes."""
    names = names or [f"class{k}" for k in range(len(counts))]
    for part, sizes, first in (("train", counts, 0), ("val", [3] * len(counts), 30)):
        for label, (name, size) in enumerate(zip(names, sizes, strict=True)):
            folder = Path(root) / part / name
            folder.mkdir(parents=True)
            for number in range(size):
                image = image_of(label, first + number)
                image.resize((64 + 8 * (number % 3), 64)).save(folder / f"{number}.jpg", quality=95)
    return Path(root)


def make_inat(root):
    """The official layout below `root`: images, train2018.json, val2018.json."""
    root = Path(root)
    for part, counts, first in (("train", TAIL, 0), ("val", (2,) * len(TAIL), 40)):
        images, annotations = [], []
        for label, (number_of_class, count) in enumerate(zip(IDS, counts, strict=True)):
            for number in range(count):
                key = len(images) + (0 if part == "train" else 1000)
                name = f"train_val2018/Plantae/{number_of_class}/{part}{number}.jpg"
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                image_of(label, first + number).save(root / name, quality=95)
                images.append({"id": key, "file_name": name, "width": 64, "height": 64})
                annotations.append({"id": key, "image_id": key, "category_id": number_of_class})
        categories = [{"id": k, "name": f"species {k}", "supercategory": "Plantae"} for k in IDS]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / f"{part}2018.json").write_text(json.dumps(content))
    return root


#: Of folder_train.py: run_folder(args, cwd) -> (status, out, err).
run_folder = functools.partial(run_script, folder_train)


def run_in(cwd, *args, script=folder_train):
    """The output of a command that must succeed."""
    status, out, err = run_script(script, args, cwd)
    assert status == 0, err
    return out
