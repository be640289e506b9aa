"""The data of a run: what it is, the part that is held out, and whether it is what a checkpoint was trained on."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from experiment.compare import refuse_or_force
from experiment.resume import Start
from experiment.settings import Settings
from files import files_sha256
from imbalance import split_sha256
from loaders.augment import shorter_side
from utils import DataError, UsageError, named, warn


@dataclasses.dataclass(frozen=True)
class Data:
    """Facts about the data of a run.

    Attributes:
        classes: K names, as in the data set. class_names: K names, as printed.
        class_counts: training images of each class, without the held-out part.
        indices: indices of the training images in the whole data set.
        split_sha256: of the indices before a part is held out, see `imbalance.split_sha256`.
        files_sha256: of the image files, see `files.files_sha256`; None for images in memory.
        test_files: paths of the test images, or their indices as text for images in memory.
        mean, std: of the channels, in [0, 1] units. image_size: the data set's, in pixels.
    """

    classes: list[str]
    class_names: list[str]
    class_counts: list[int]
    indices: Sequence[int]
    split_sha256: str
    files_sha256: str | None
    test_files: list[str]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int


def split_validation(train_set: Any, settings: Settings) -> tuple[Any, Any]:
    """(training set, validation set or None): --val_fraction of the training images, or images that the tail left out.

    Raises:
        UsageError: there are no such images.
    """
    # -e may have test images only: nothing is held out of them
    if not (settings.val_fraction or settings.val_left_out) or not len(train_set.targets):
        return train_set, None
    try:
        if settings.val_left_out:
            val_set = train_set.left_out(settings.val_left_out)
        else:
            train_set, val_set = train_set.hold_out(settings.val_fraction, settings.rand_number)
    except ValueError as error:
        flag = "--val_left_out" if settings.val_left_out else "--val_fraction"
        raise UsageError(f"{flag}: {error}") from None
    without = [name for name, n in zip(val_set.class_names, val_set.get_cls_num_list(), strict=True) if n == 0]
    if without:
        warn(f"the validation set has no image of {named(without)}: its class mean is over the other classes")
    return train_set, val_set


def describe(chosen: Any, train_set: Any, test_set: Any) -> Data:
    """What the data are. `chosen`: the training images before a validation part is held out."""
    images, tested = (list(getattr(part, "samples", ())) for part in (chosen, test_set))
    return Data(
        classes=list(train_set.classes),
        class_names=list(train_set.class_names),
        class_counts=train_set.get_cls_num_list(),
        indices=train_set.chosen,
        split_sha256=split_sha256(chosen.chosen),
        files_sha256=files_sha256(images + tested) if images or tested else None,
        test_files=[path for path, _ in tested] or [str(index) for index in test_set.chosen],
        mean=test_set.mean,
        std=test_set.std,
        image_size=test_set.image_size,
    )


def preprocessing(settings: Settings, data_set: Any) -> dict[str, Any]:
    """What is done to an image that is tested, in torchvision's terms; checkpoints hold it.

    Args:
        data_set: says mean, std and image_size.

    Returns:
        dict(resize, crop, mean, std, exif): the shorter side that images are resized to, the side of the central crop,
        mean and std of the channels in [0, 1] units, whether images are turned as EXIF data say.
    """
    size = settings.image_size or data_set.image_size
    resize = shorter_side(size) if settings.image_size and settings.crop != "padded" else size
    mean, std = ([float(value) for value in values] for values in (data_set.mean, data_set.std))
    return {"resize": resize, "crop": size, "mean": mean, "std": std, "exif": settings.exif}


def check_data(data: Data, start: Start, settings: Settings) -> list[str]:
    """Compare the data with those that the checkpoint was trained on. Returns what --force has passed over.

    An evaluation may test on other images; its classes must be the checkpoint's, or the last layer would be misread.

    Raises:
        UsageError: --num_classes contradicts the data. DataError: other classes, images or files than the checkpoint's.
    """
    known, state = len(data.classes), start.checkpoint
    if settings.num_classes not in (None, known):
        raise UsageError(f"--num_classes {settings.num_classes}: {settings.dataset} has {known} classes")
    where = f"in {settings.data_dir}"
    compared = {"other classes": ("classes", f"has other classes than those {where}")}
    for name in ("mean", "std"):
        compared[f"another {name}"] = name, f"was trained on images with another {name} than those {where}"
    state, mine = {**(state.get("preprocessing") or {}), **state}, {**vars(data), **preprocessing(settings, data)}
    # several values are compared on a held-out part of these images
    chooses = any(len(taus) > 1 for taus in (settings.posthoc_la, settings.tau_norm, settings.tau_norm_bias))
    # else the images that are tested may be the ones that were trained on
    if not settings.evaluate or ((settings.test_fraction or chooses) and any(data.class_counts)):
        counts = f"{sum(state.get('class_counts') or ())} there, {sum(data.class_counts)} here"
        files = f"was trained on other image files than those {where}: names, classes or sizes differ"
        compared |= {
            "other images": ("split_sha256", f"was trained on other images than {where}"),
            "changed image files": ("files_sha256", files),
            "another part of the images": ("class_counts", f"was trained on another part of the images ({counts})"),
        }
    forced = []
    for kind, (name, what) in compared.items():
        there, here = state.get(name), mine[name]
        if there in (None, here):
            continue
        if name == "classes":
            what += f": {named(sorted({*there} ^ {*here})) or 'in another order'}"
        if start.is_finished or not settings.force:
            way = "--overwrite trains it again" if start.is_finished else "use --force to continue anyway"
            if settings.evaluate and settings.test_fraction:  # --force would test a part of these images
                way = "to test on new images put their class folders into NEW/val/, and give --data_dir NEW"
            raise DataError(f"{start.path} {what} ({way})")
        warn(f"{start.path} {what}; continuing because of --force")
        forced.append(kind)
    if chooses and state.get("split_sha256") is None:
        what = f"{start.path} does not record its training images: it may have been trained on those held out"
        refuse_or_force(settings, what)
        forced.append("unknown images")
    return forced
