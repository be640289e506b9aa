"""Fig. 2: the influence |p - y| * |h| of a head class's and a tail class's images, balanced against long-tailed."""

import json
import os
from collections.abc import Iterable
from typing import Any

import torch

import imbalance_cifar
import models
from experiment import checkpoint
from experiment.compare import settings_of_checkpoint
from experiment.settings import Settings
from files import write_text
from loaders.in_memory import InMemoryBatches
from losses import influence
from utils import DataError

#: The most influential images of a class that are shown.
MOST = 50


def write(balanced: str, long_tailed: str, data_dir: str, to: str | os.PathLike) -> str:
    """figure2.json, which the report draws, in the folder `to`, from two checkpoints. Returns its path.

    Raises:
        DataError: a checkpoint that cannot be read, or of another script.
    """
    found = {"balanced": of_checkpoint(balanced, data_dir), "long-tailed": of_checkpoint(long_tailed, data_dir)}
    path = os.path.join(to, "figure2.json")
    write_text(path, json.dumps(found, indent=1) + "\n")
    return path


def of_checkpoint(path: str, data_dir: str) -> dict[str, Any]:
    """The most influential training images of the first and the last class, scaled by the largest of both.

    Returns:
        dict(classes: two names, images: training images of each, influence: two falling lists in [0, 1]).
    """
    *_, model, train_set = trained(path, data_dir)
    values, target = influences(model, InMemoryBatches(train_set, 128).eval_epoch())
    parts = [values[target == label].sort(descending=True).values for label in (0, train_set.num_classes - 1)]
    largest = max(part[0] for part in parts)
    return {
        "classes": [train_set.classes[0], train_set.classes[-1]],
        "images": [len(part) for part in parts],
        "influence": [[round(value, 5) for value in (part[:MOST] / largest).tolist()] for part in parts],
    }


def trained(path: str, data_dir: str) -> tuple[dict[str, Any], Settings, torch.nn.Module, Any]:
    """(checkpoint, its settings, model in evaluation mode, training set) of a run of cifar_train.py.

    As the script builds them, with the L1 norm for the features whatever the loss wanted.
    """
    state = checkpoint.load(path)
    settings = settings_of_checkpoint(state, path)
    if settings is None or settings.dataset not in imbalance_cifar.DATASETS:
        raise DataError(f"{path} does not say on which data of cifar_train.py it was trained")
    train_set, _ = imbalance_cifar.load(
        settings.dataset, data_dir, settings.imb_type, settings.imb_factor, settings.rand_number
    )
    model = models.CIFAR_MODELS[settings.arch](train_set.num_classes, use_norm=settings.use_norm, feature_norm="l1")
    checkpoint.load_weights(model, checkpoint.load_foreign(path), path)  # with --ema the average
    return state, settings, model.eval(), train_set


@torch.no_grad()
def influences(
    model: torch.nn.Module, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Influence and label of every image, (N,) each, in the order of the batches."""
    values, labels = [], []
    for images, target in batches:
        logits, features = model(images)
        values.append(influence(logits, target, features))
        labels.append(target)
    return torch.cat(values), torch.cat(labels)
