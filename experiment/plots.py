"""Figures of a run, with matplotlib; without it, none. Epochs count from 1, as in the text."""

import importlib.util
import os
import warnings
from collections.abc import Sequence
from typing import Any

from files import write_atomically
from training.registry import LOSSES
from utils import one_line, warn

FIGURES = ("class_accuracy.png", "curves.png")  # of every run; confusion.png where there are not too many classes
#: Most classes whose names, and whose numbers, a confusion matrix shows.
MOST_NAMED, MOST_ANNOTATED = 200, 12
#: Width of a figure in inches: a column of a paper.
WIDTH = 3.3
STYLE: dict[str, Any] = {
    "font.size": 8, "axes.titlesize": 8, "axes.labelsize": 8, "legend.fontsize": 7, "xtick.labelsize": 7,
    "ytick.labelsize": 7, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6,
    "lines.linewidth": 1.1, "lines.markersize": 3.5, "grid.alpha": 0.3, "grid.linewidth": 0.5, "axes.grid": True,
    "axes.axisbelow": True, "legend.frameon": False, "savefig.dpi": 300, "pdf.fonttype": 42,
    "figure.constrained_layout.use": True,
}  # fmt: skip


def available() -> bool:
    """Whether matplotlib is installed; a warning where it is not."""
    if importlib.util.find_spec("matplotlib") is None:
        warn("matplotlib is not installed: no figures")
        return False
    return True


def subplots(rows: int = 1, columns: int = 1, width: float = WIDTH, height: float = 2.4, **how: Any) -> Any:
    """(figure, axes) in the style of a paper's column; sizes in inches. pyplot is not used: it may have no backend."""
    os.environ["MPLBACKEND"] = "Agg"  # a Jupyter cell exports a backend that is not installed here
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(STYLE)  # type: ignore[arg-type]
    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, **how)


def save(figure: Any, folder: str | os.PathLike, name: str) -> str:
    """Write a figure to folder/name, a PNG or a PDF by its ending. Returns the path."""
    path, kind = os.path.join(folder, name), name.rsplit(".", 1)[1]
    fixed = {"metadata": {"CreationDate": None}} if kind == "pdf" else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of names that are too long, or in scripts that the font lacks
        write_atomically(path, lambda file: figure.savefig(file, format=kind, **fixed))
    return path


# ------------------------------------------------------------------------------------------- figures of a run


def of_evaluation(result: dict, names: list[str], class_counts: list[int], folder: str, title: str) -> list[str]:
    """class_accuracy.png, and confusion.png and calibration.png where the result has them. Returns the paths.

    result: what `loop.evaluate` returns; with -e `calibration` too, see `evaluation.reliability`.
    """
    if not available():
        return []
    written = [_class_accuracy(result["per_class"], names, class_counts, folder, title)]
    if result["confusion"] is not None:
        written.append(_confusion(result["confusion"], names, folder, title))
    if "calibration" in result:
        written.append(_calibration(result["calibration"], folder, title))
    return written


def _calibration(rows, folder, title):
    """Accuracy over confidence."""
    figure, axes = subplots(height=WIDTH)
    seen = [row for row in rows if row["images"]]
    axes.plot([0, 100], [0, 100], color="grey", linestyle="--", linewidth=1, label="calibrated")
    axes.plot([row["confidence"] for row in seen], [row["accuracy"] for row in seen], marker="o", label="this model")
    axes.set(xlabel="confidence [%]", ylabel="test accuracy [%]", xlim=(0, 101), ylim=(0, 101))
    axes.set_title(_titled("Calibration", title))
    axes.legend()
    return save(figure, folder, "calibration.png")


def label(name: str, longest: int = 30) -> str:
    """A name as matplotlib shows it: on one line, in Unicode, a $ is a $, not a formula, and cut."""
    name = one_line(name)
    name = name if len(name) <= longest else f"{name[: longest - 1]}\N{HORIZONTAL ELLIPSIS}"
    return name.encode(errors="replace").decode().replace("$", r"\$")


def plain_log_ticks(axis: Any) -> None:
    """Numbers instead of powers of ten, on few ticks."""
    from matplotlib import ticker

    axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def _titled(what, run):
    return f"{what}\n{label(run, 200)}"


def _confusion(confusion, names, folder, title):
    """Rows are the true classes, in percent of the class."""
    width = min(max(WIDTH, 0.07 * len(names)), 2 * WIDTH)
    figure, axes = subplots(width=width, height=width)
    percent = [[100 * cell / max(sum(row), 1) for cell in row] for row in confusion]
    axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    axes.set(xlabel="predicted", ylabel="true")
    axes.grid(False)
    if len(names) <= MOST_NAMED:
        labels, size = [label(name) for name in names], 6.5 if len(names) <= 30 else 2.5
        axes.set_xticks(range(len(names)), labels, rotation=90, fontsize=size)
        axes.set_yticks(range(len(names)), labels, fontsize=size)
    if len(names) <= MOST_ANNOTATED:
        for i, row in enumerate(percent):
            for j, value in enumerate(row):
                color = "white" if value > 50 else "black"
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", fontsize=5.5, color=color)
    axes.set_title(_titled("Confusion, percent of the true class", title), fontsize=6)
    return save(figure, folder, "confusion.png")


def _class_accuracy(per_class, names, class_counts, folder, title):
    figure, axes = subplots(height=2.5)
    seen = [(n, a, name) for n, a, name in zip(class_counts, per_class, names, strict=True) if a is not None]
    axes.plot([n for n, _, _ in seen], [a for _, a, _ in seen], "o")
    if len(names) <= MOST_ANNOTATED:
        for n, accuracy, name in seen:
            axes.annotate(label(name), (n, accuracy), xytext=(2, 3), textcoords="offset points", fontsize=6)
    axes.set(xscale="log", ylim=(-2, 105), xlabel="training images of the class", ylabel="test accuracy [%]")
    plain_log_ticks(axes.xaxis)
    axes.margins(x=0.12)
    axes.set_title(_titled("Accuracy of each class", title), fontsize=6)
    return save(figure, folder, "class_accuracy.png")


def of_history(history: Sequence[dict], start_ib_epoch: int, folder: str, title: str) -> list[str]:
    """curves.png from a run's records: test CE, the training criterion and the accuracies, each on axes of its own.

    The losses are not comparable. Returns the paths.
    """
    if not available():
        return []
    epochs = [record["epoch"] + 1 for record in history]
    figure, (test, train, accuracy) = subplots(3, height=5.2, sharex=True)
    for axes, part, name in ((test, "test", "test loss (CE)"), (train, "train", "training criterion")):
        values = [record[part]["loss"] for record in history]
        axes.plot(epochs, values, color="C0" if part == "test" else "C3")
        axes.set(ylabel=name)
        if all(value > 0 for value in values):
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis)
    # balanced test data give top-1 and class mean the same line: a dashed one above a wide one shows both
    styles: dict[str, dict] = {"acc1": {"linewidth": 2.4, "alpha": 0.5}, "class_mean": {"linestyle": "--"}}
    for name in ("acc1", "class_mean", "many", "medium", "few"):
        values = [record["test"][name] for record in history]
        if None not in values:
            named = {"acc1": "top-1", "class_mean": "class mean"}.get(name, name)
            accuracy.plot(epochs, values, label=named, **styles.get(name, {}))
    accuracy.set(xlabel="epoch", ylabel="test accuracy [%]", ylim=(0, 102))
    names = (record["stage"]["loss"] for record in history)
    starts = next((name for name in names if name in LOSSES and LOSSES[name].first_phase_ce), None)
    if starts:
        for axes in (test, train, accuracy):
            axes.axvline(start_ib_epoch + 0.5, color="black", linestyle="--", linewidth=0.8)
        where = {"xycoords": test.get_xaxis_transform(), "textcoords": "offset points", "va": "top", "fontsize": 6}
        test.annotate(f"{label(starts)} starts", (start_ib_epoch + 0.5, 1), (3, -1), **where)
    figure.legend(*accuracy.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(label(title, 200), fontsize=6)
    return [save(figure, folder, "curves.png")]
