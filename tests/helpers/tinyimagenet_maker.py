"""Small real images in Tiny ImageNet's official layout, from scikit-learn's digits."""

import functools
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = "tiny-imagenet-200"


@functools.cache
def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    return [np.round(data.images[data.target == label] * (255 / 16)).astype(np.uint8) for label in range(10)]


def image_of(label, number):
    """A digit of 64 x 64 in the colour of its class; every seventh is a greyscale image."""
    grey = Image.fromarray(digits()[label % 10][number]).resize((64, 64), Image.Resampling.BILINEAR)
    if number % 7 == 3:
        return grey
    share = np.array([1, (label * 37 % 100) / 99, (label * 71 % 100) / 99])
    return Image.fromarray((np.asarray(grey)[..., None] * share).astype(np.uint8))


def make_layout(root, classes=3, train=4, val=2):
    """root/tiny-imagenet-200 as the official archive has it. Returns the sorted class names."""
    folder = Path(root) / FOLDER
    names = [f"n{1000 + k:08d}" for k in range(classes)]
    rows = []
    for label, name in enumerate(names):
        images = folder / "train" / name / "images"
        images.mkdir(parents=True)
        for number in range(train):
            image_of(label, number).save(images / f"{name}_{number}.JPEG", quality=95)
        boxes = "".join(f"{name}_{number}.JPEG\t0\t0\t63\t63\n" for number in range(train))
        (folder / "train" / name / f"{name}_boxes.txt").write_text(boxes)
        # numbered across the classes, as in the official archive
        rows += [(f"val_{number * classes + label}.JPEG", name, label, train + number) for number in range(val)]
    images = folder / "val" / "images"
    images.mkdir(parents=True)
    for file, _, label, number in rows:
        image_of(label, number).save(images / file, quality=95)
    rows.sort()
    (folder / "val" / "val_annotations.txt").write_text("".join(f"{r[0]}\t{r[1]}\t0\t0\t63\t63\n" for r in rows))
    (folder / "wnids.txt").write_text("".join(f"{name}\n" for name in reversed(names)))
    (folder / "words.txt").write_text("".join(f"{name}\tdigit\n" for name in names))
    return names


def pack(root, archive, change=None):
    """Zip root/tiny-imagenet-200; `change(name, content)` may return other bytes, or None to leave a file out."""
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        for path in sorted((Path(root) / FOLDER).rglob("*")):
            if path.is_file():
                name, content = path.relative_to(root).as_posix(), path.read_bytes()
                content = change(name, content) if change else content
                if content is not None:
                    file.writestr(name, content)
    return archive
