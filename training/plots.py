"""Figures of a run, with matplotlib; without it, none."""

import importlib.util
import os

from training.checkpoint import write_atomically
from utils import one_line, warn

FIGURES = ("class_accuracy.png", "curves.png")  # of every run; confusion.png where there are not too many classes


def available():
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def load_pyplot():
    """matplotlib.pyplot for files, or None, with a warning."""
    if not available():
        warn("matplotlib is not installed: no figures")
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def of_evaluation(result, names, class_counts, folder):
    """confusion.png and class_accuracy.png from what `loop.evaluate` returns. Returns the paths."""
    pyplot = load_pyplot()
    if pyplot is None:
        return []
    written = [_class_accuracy(pyplot, result["per_class"], names, class_counts, folder)]
    if result["confusion"] is not None:
        written.append(_confusion(pyplot, result["confusion"], names, folder))
    return written


def of_history(history, settings, folder):
    """curves.png from a run's records. Returns the paths."""
    pyplot = load_pyplot()
    return [] if pyplot is None else [_curves(pyplot, history, settings, folder)]


def save_figure(pyplot, figure, folder, name):
    """Write a figure to folder/name and close it. Returns the path."""
    path = os.path.join(folder, name)
    write_atomically(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    pyplot.close(figure)
    return path


def _label(name):
    """A class's name as matplotlib shows it: on one line, and a $ is a $, no formula."""
    return one_line(name).replace("$", r"\$")


def _confusion(pyplot, confusion, names, folder):
    """Rows are true classes, in percent of the class."""
    size = min(max(4.5, 0.45 * len(names)), 14)
    figure, axes = pyplot.subplots(figsize=(size + 1, size), layout="constrained")
    percent = [[100 * cell / max(sum(row), 1) for cell in row] for row in confusion]
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="percent of the true class")
    axes.set(xlabel="predicted", ylabel="true", title="Confusion matrix")
    if len(names) <= 30:
        labels = [_label(name) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=90)
        axes.set_yticks(range(len(names)), labels)
    if len(names) <= 12:
        for i, row in enumerate(percent):
            for j, value in enumerate(row):
                color = "white" if value > 50 else "black"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    return save_figure(pyplot, figure, folder, "confusion.png")


def _class_accuracy(pyplot, per_class, names, class_counts, folder):
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    seen = [(n, a, name) for n, a, name in zip(class_counts, per_class, names, strict=True) if a is not None]
    axes.scatter([n for n, _, _ in seen], [a for _, a, _ in seen], s=24)
    if len(names) <= 12:
        for n, accuracy, name in seen:
            axes.annotate(_label(name), (n, accuracy), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", ylim=(-2, 105), xlabel="training images of the class", ylabel="test accuracy [%]")
    axes.set_title("Accuracy of each class over its training images")
    axes.grid(alpha=0.3)
    return save_figure(pyplot, figure, folder, "class_accuracy.png")


def _curves(pyplot, history, settings, folder):
    epochs = [record["epoch"] + 1 for record in history]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.plot(epochs, [record["test"]["loss"] for record in history], label="test (CE)")
    left.plot(epochs, [record["train"]["loss"] for record in history], label="training (its own criterion)")
    left.set(xlabel="epoch", ylabel="loss", yscale="log", title="Loss")
    for name in ("acc1", "class_mean", "many", "medium", "few"):
        values = [record["test"][name] for record in history]
        if None not in values:
            right.plot(epochs, values, label={"acc1": "top-1", "class_mean": "class mean"}.get(name, name))
    right.set(xlabel="epoch", ylabel="test accuracy [%]", ylim=(0, 102), title="Accuracy")
    if any(record["stage"]["loss"].startswith("IB") for record in history):
        for axes in (left, right):
            axes.axvline(settings["start_ib_epoch"] + 0.5, color="black", linestyle="--", label="IB starts")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return save_figure(pyplot, figure, folder, "curves.png")
