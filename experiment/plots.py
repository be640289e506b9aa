"""Figures of a run, with matplotlib; without it, none. Epochs count from 1."""

import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any

from files import write_atomically
from utils import one_line, warn

FIGURES = ("class_accuracy.png", "curves.png")  # of every run; confusion.png where there are not too many classes
#: A confusion matrix and its classes' names are drawn up to this many classes.
MOST_NAMED, MOST_ANNOTATED = 200, 12


def available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def load_pyplot() -> Any:
    """matplotlib.pyplot for files, or None, with a warning."""
    if not available():
        warn("matplotlib is not installed: no figures")
        return None
    os.environ["MPLBACKEND"] = "Agg"  # a Jupyter cell exports a backend that cannot be imported here
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def of_evaluation(
    result: dict, names: Sequence[str], class_counts: Sequence[int], folder: str, title: str = ""
) -> list[str]:
    """confusion.png and class_accuracy.png from what `loop.evaluate` returns. Returns the paths."""
    pyplot = load_pyplot()
    if pyplot is None:
        return []
    written = [_class_accuracy(pyplot, result["per_class"], names, class_counts, folder, title)]
    if result["confusion"] is not None:
        written.append(_confusion(pyplot, result["confusion"], names, folder, title))
    return written


def of_history(history: Sequence[dict], start_ib_epoch: int, folder: str, title: str = "") -> list[str]:
    """curves.png from a run's records. Returns the paths."""
    pyplot = load_pyplot()
    return [] if pyplot is None else [_curves(pyplot, history, start_ib_epoch, folder, title)]


def of_calibration(rows: Sequence[dict], folder: str, title: str = "") -> list[str]:
    """calibration.png: accuracy over confidence, from `evaluation.reliability`. Returns the paths."""
    pyplot = load_pyplot()
    if pyplot is None:
        return []
    figure, axes = pyplot.subplots(figsize=(4.8, 4.4), layout="constrained")
    seen = [row for row in rows if row["images"]]
    axes.plot([0, 100], [0, 100], color="grey", linestyle="--", linewidth=1, label="calibrated")
    axes.plot([row["confidence"] for row in seen], [row["accuracy"] for row in seen], marker="o", label="this model")
    axes.set(xlabel="confidence [%]", ylabel="test accuracy [%]", xlim=(0, 101), ylim=(0, 101))
    axes.set_title(_titled("Calibration", title), fontsize=9)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return [save_figure(pyplot, figure, folder, "calibration.png")]


def save_figure(pyplot: Any, figure: Any, folder: str | os.PathLike, name: str) -> str:
    """Write a figure to folder/name and close it. Returns the path."""
    path = os.path.join(folder, name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # names in scripts that the font lacks
        write_atomically(path, lambda file: figure.savefig(file, dpi=110, format="png"))
    pyplot.close(figure)
    return path


def label(name: str) -> str:
    """A name as matplotlib shows it: on one line, in Unicode, and a $ is a $, not a formula."""
    return one_line(name).encode(errors="replace").decode().replace("$", r"\$")


def _titled(what, run):
    return f"{what}\n{label(run)}" if run else what


def _confusion(pyplot, confusion, names, folder, title):
    """Rows are true classes, in percent of the class."""
    size = min(max(4.5, 0.45 * len(names)), 14)
    figure, axes = pyplot.subplots(figsize=(size + 1, size), layout="constrained")
    percent = [[100 * cell / max(sum(row), 1) for cell in row] for row in confusion]
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(image, label="percent of the true class")
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(_titled("Confusion matrix", title), fontsize=9)
    if len(names) <= MOST_NAMED:
        labels, font = [label(name) for name in names], 9 if len(names) <= 30 else 4
        axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=font)
        axes.set_yticks(range(len(names)), labels, fontsize=font)
    if len(names) <= MOST_ANNOTATED:
        for i, row in enumerate(percent):
            for j, value in enumerate(row):
                color = "white" if value > 50 else "black"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    return save_figure(pyplot, figure, folder, "confusion.png")


def _class_accuracy(pyplot, per_class, names, class_counts, folder, title):
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    seen = [(n, a, name) for n, a, name in zip(class_counts, per_class, names, strict=True) if a is not None]
    axes.scatter([n for n, _, _ in seen], [a for _, a, _ in seen], s=24)
    if len(names) <= MOST_ANNOTATED:
        for n, accuracy, name in seen:
            axes.annotate(label(name), (n, accuracy), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", ylim=(-2, 105), xlabel="training images of the class", ylabel="test accuracy [%]")
    _plain_log_ticks(axes.xaxis)
    axes.set_title(_titled("Accuracy of each class over its training images", title), fontsize=9)
    axes.grid(alpha=0.3)
    return save_figure(pyplot, figure, folder, "class_accuracy.png")


def _plain_log_ticks(axis):
    """Numbers instead of powers of ten, on few ticks."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _curves(pyplot, history, start_ib_epoch, folder, title):
    epochs = [record["epoch"] + 1 for record in history]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    left.plot(epochs, [record["test"]["loss"] for record in history], label="test (CE)")
    left.plot(epochs, [record["train"]["loss"] for record in history], label="training (its own criterion)")
    left.set(xlabel="epoch", ylabel="loss", yscale="log", title="Loss")
    _plain_log_ticks(left.yaxis)
    # balanced test data give top-1 and class mean the same line: a dashed one above a wide one shows both
    styles: dict[str, dict] = {"acc1": {"linewidth": 3, "alpha": 0.5}, "class_mean": {"linestyle": "--"}}
    for name in ("acc1", "class_mean", "many", "medium", "few"):
        values = [record["test"][name] for record in history]
        if None not in values:
            named = {"acc1": "top-1", "class_mean": "class mean"}.get(name, name)
            right.plot(epochs, values, label=named, **styles.get(name, {}))
    right.set(xlabel="epoch", ylabel="test accuracy [%]", ylim=(0, 102), title="Accuracy")
    if any(record["stage"]["loss"].startswith("IB") for record in history):
        for axes in (left, right):
            axes.axvline(start_ib_epoch + 0.5, color="black", linestyle="--", label="IB starts")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(label(title), fontsize=9)
    return save_figure(pyplot, figure, folder, "curves.png")
