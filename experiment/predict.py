"""--predict: the classes of unlabelled images, from a checkpoint alone."""

import functools
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

import imbalance_cifar
import models
from experiment.data import preprocessing
from experiment.evaluation import check_finite, correct_head, output_folder, path_name
from experiment.records import csv_text
from experiment.run import Run
from files import write_text
from imbalance_folder import ImageSet, list_images
from loaders import normalise
from loaders.augment import centre
from loaders.image_folder import Crops
from training import distributed
from training.ema import Ema
from training.precision import Precision, on_device
from utils import DataError, UsageError, warn


@torch.no_grad()
def predict(run: Run) -> None:
    """Write the likeliest classes of the images in --predict DIR, see `output_folder` and `path_name`.

    Rows are file, class, probability, the likeliest class of an image first. Images that cannot be decoded are named in
    warnings and left out.

    Raises:
        DataError: no images, none that can be decoded, or a checkpoint without class names.
        UsageError: a correction that needs more data.
    """
    if not distributed.is_main():
        return
    settings, state = run.settings, run.start.checkpoint
    path, paths = str(settings.predict), list_images(str(settings.predict))
    classes = state.get("class_names") or state.get("classes") or list(map(str, range(settings.num_classes or 0)))
    if not classes:
        raise DataError(f"{run.start.path} records no classes: this repository did not write it")
    run.class_counts = state.get("class_counts") or []
    if settings.posthoc_la and not run.class_counts:
        raise UsageError(f"--posthoc_la: {run.start.path} records no class counts")
    model, precision = _restored(run, len(classes)).eval(), Precision(settings.amp, run.device.type)
    correction = correct_head(run, model, None, precision)
    how = state.get("preprocessing")
    if how is None:  # an older checkpoint
        how = preprocessing(settings, imbalance_cifar.DATASETS.get(settings.dataset, ImageSet))
    transform = centre(how["resize"], how["crop"])
    crops = Crops(paths, how["exif"], transform, transform, how["crop"])
    mean, std = (torch.tensor(how[name], device=run.device).repeat(how["crop"]) for name in ("mean", "std"))
    base = os.path.dirname(path) if os.path.isfile(path) else path
    rows, shown = [], 0
    for start in range(0, len(paths), settings.batch_size):
        part = range(start, min(start + settings.batch_size, len(paths)))
        with ThreadPoolExecutor(max(1, settings.workers)) as pool:
            found = dict(zip(part, pool.map(lambda k: crops[k, None], part), strict=True))
        for image in found.values():
            if isinstance(image, DataError):
                warn(f"left out: {image}")
        whole = {k: image for k, image in found.items() if not isinstance(image, DataError)}
        shown += len(whole)
        if whole:
            with precision.autocast():
                logits, _ = model(normalise(torch.stack(list(whole.values())).to(run.device), mean, std))
            check_finite(run, logits)
            best = (settings.logit_scale * logits.float()).softmax(1).cpu().topk(min(settings.top, len(classes)))
            for k, values, labels in zip(whole, best.values.tolist(), best.indices.tolist(), strict=True):
                file = os.path.relpath(paths[k], base)
                rows += [(file, classes[n], f"{value:.6f}") for n, value in zip(labels, values, strict=True)]
    if not shown:
        raise DataError(f"none of the {len(paths)} images in {path} can be decoded")
    out = os.path.join(output_folder(run, "predict", correction), f"{path_name(path)}.csv")
    write_text(out, csv_text([("file", "class", "probability"), *rows]))
    print(f"{shown} images, {len(paths) - shown} left out; written: {out}")


def _restored(run, num_classes):
    """The model with the checkpoint's weights, the averaged ones where there are any."""
    settings = run.settings
    build: Any = functools.partial(models.torchvision_model, settings.arch)
    if settings.script == "cifar_train.py":
        build = models.CIFAR_MODELS[settings.arch]
    model = build(num_classes, use_norm=settings.use_norm, feature_norm=settings.feature_norm)
    model = on_device(model, run.device, settings.batch_norm)
    ema = Ema(model, settings.ema) if settings.ema else None
    run.restore(model=model, ema=ema)
    return ema.module if ema else model
