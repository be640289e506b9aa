"""Fig. 2: the influence |p - y| * |h| of a head class's and a tail class's samples, balanced against long-tailed."""

import argparse
import json
import os

import torch

import cifar_train
from losses import influence
from training import checkpoint, plots
from utils import DataError

#: The most influential samples of a class that are shown.
MOST = 50


def draw(balanced, long_tailed, data_dir, to):
    """figure2.json and figure2.png in the folder `to`, from two checkpoints. Returns the paths.

    Raises:
        DataError: a checkpoint that cannot be read, or of another script.
    """
    found = {"balanced": of_checkpoint(balanced, data_dir), "long-tailed": of_checkpoint(long_tailed, data_dir)}
    text = json.dumps(found, indent=1) + "\n"
    path = os.path.join(to, "figure2.json")
    checkpoint.write_atomically(path, lambda file: file.write(text.encode()))
    pyplot = plots.load_pyplot()
    return [path] if pyplot is None else [path, _draw(pyplot, found, to)]


def of_checkpoint(path, data_dir):
    """The most influential training samples of the first and the last class, scaled by the largest of both.

    Returns:
        dict(classes: two names, images: training images of each, influence: two falling lists in [0, 1]).
    """
    state = checkpoint.load(path)
    settings = state.get("settings") or {}
    if settings.get("dataset") not in cifar_train.imbalance_cifar.DATASETS:
        raise DataError(f"{path} does not say on which data of cifar_train.py it was trained")
    options = argparse.Namespace(**{**settings, "data_dir": data_dir, "ib_norm": "l1"})
    train_set, _ = cifar_train.load_data(options)
    model = cifar_train.build_model(options).eval()
    checkpoint.load_weights(model, state["state_dict"], path)
    values, target = _influences(model, cifar_train.make_batches(options, train_set, None, torch.device("cpu")))
    head, tail = (values[target == label].sort(descending=True).values for label in (0, options.num_classes - 1))
    largest = max(head[0], tail[0])
    return {
        "classes": [train_set.classes[0], train_set.classes[-1]],
        "images": [len(head), len(tail)],
        "influence": [[round(v, 5) for v in (part[:MOST] / largest).tolist()] for part in (head, tail)],
    }


@torch.no_grad()
def _influences(model, batches):
    """Influence and label of every sample, in order, not augmented."""
    values, labels = [], []
    for images, target in batches.eval_epoch():
        logits, features = model(images)
        values.append(influence(logits, target, features))
        labels.append(target)
    return torch.cat(values), torch.cat(labels)


def _draw(pyplot, found, to):
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axes, (title, one) in zip(panels, found.items(), strict=True):
        for name, images, values in zip(one["classes"], one["images"], one["influence"], strict=True):
            axes.plot(range(1, len(values) + 1), values, marker=".", label=f"{name} ({images} training images)")
        axes.set(xlabel="sample, by influence", title=f"{title} training data")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    panels[0].set_ylabel("influence, scaled to [0, 1]")
    return plots.save_figure(pyplot, figure, to, "figure2.png")
