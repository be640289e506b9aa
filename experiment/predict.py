"""--predict: the classes of unlabelled images, from a checkpoint alone."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torchvision.transforms.v2 import functional

import imbalance_cifar
import models
from experiment.data import preprocessing
from experiment.evaluation import correct_head, output_folder
from experiment.records import csv_text
from experiment.run import Run
from files import write_text
from imbalance_folder import ImageSet, list_images, open_image
from loaders.augment import centre
from loaders.transforms import normalise
from training import distributed
from training.ema import Ema
from training.precision import Precision
from utils import DataError, UsageError, warn

PREDICTIONS = "predict"


@torch.no_grad()
def predict(run: Run) -> None:
    """Write the likeliest classes of the images in --predict DIR to log/<name>/predict/<DIR>.csv.

    Rows are file, class, probability, the likeliest class of an image first. Images that cannot be decoded are named in
    warnings and left out.

    Raises:
        DataError: no images, or a checkpoint without class names. UsageError: a correction that needs more data.
    """
    if not distributed.is_main():
        return
    settings, state = run.settings, run.start.checkpoint
    path, paths = str(settings.predict), list_images(str(settings.predict))
    classes = state.get("class_names") or state.get("classes") or list(map(str, range(settings.num_classes or 0)))
    if not classes:
        raise DataError(f"{run.start.path} records no classes: it is not of this repository")
    run.class_counts = state.get("class_counts") or []
    if settings.posthoc_la and not run.class_counts:
        raise UsageError(f"--posthoc_la: {run.start.path} records no class counts")
    model, precision = _restored(run, len(classes)).eval(), Precision(settings.amp, run.device.type)
    correction = correct_head(run, model, None, precision)
    how = state.get("preprocessing")
    if how is None:  # an older checkpoint
        how = preprocessing(settings, imbalance_cifar.DATASETS.get(settings.dataset, ImageSet))
    read = functools.partial(_read, transform=centre(how["resize"], how["crop"]), exif=how["exif"])
    mean, std = (torch.tensor(how[name], device=run.device).repeat(how["crop"]) for name in ("mean", "std"))
    base = os.path.dirname(path) if os.path.isfile(path) else path
    rows, shown = [], 0
    for start in range(0, len(paths), settings.batch_size):
        part = paths[start : start + settings.batch_size]
        with ThreadPoolExecutor(max(1, settings.workers)) as pool:
            found = list(zip(part, pool.map(read, part), strict=True))
        for _, image in found:
            if isinstance(image, DataError):
                warn(f"left out: {image}")
        whole = [(file, image) for file, image in found if not isinstance(image, DataError)]
        shown += len(whole)
        if whole:
            images = torch.stack([image for _, image in whole]).to(run.device)
            with precision.autocast():
                logits, _ = model(normalise(images, mean, std))
            best = logits.float().softmax(1).cpu().topk(min(settings.top, len(classes)))
            for (file, _), values, labels in zip(whole, best.values.tolist(), best.indices.tolist(), strict=True):
                file = os.path.relpath(file, base)
                rows += [(file, classes[k], f"{value:.6f}") for k, value in zip(labels, values, strict=True)]
    name = os.path.basename(os.path.abspath(path))
    out = os.path.join(output_folder(run, PREDICTIONS, correction), f"{name}.csv")
    write_text(out, csv_text([("file", "class", "probability"), *rows]))
    print(f"{shown} images, {len(paths) - shown} left out; written: {out}")


def _restored(run, num_classes):
    """The model with the checkpoint's weights, the averaged ones where there are any."""
    settings = run.settings
    build: Any = models.CIFAR_MODELS.get(settings.arch) or functools.partial(models.torchvision_model, settings.arch)
    model = build(num_classes, use_norm=settings.use_norm, feature_norm=settings.feature_norm)
    model = model.to(run.device).to(memory_format=torch.channels_last)
    ema = Ema(model, settings.ema) if settings.ema else None
    run.restore(model=model, ema=ema)
    return ema.module if ema else model


def _read(path, transform, exif):
    """The image as the model sees it, (size, size, 3) uint8, or the DataError that it raises."""
    try:
        image = functional.pil_to_tensor(open_image(path, exif))
    except DataError as error:
        return error
    return transform(image).permute(1, 2, 0)
