"""Figures of a report: methods side by side, and Fig. 3."""

import collections
import pathlib
from statistics import fmean, stdev

from experiment import plots
from paper.rows import DATASETS, Rows, title, values


def draw(rows: Rows, to: pathlib.Path) -> list[pathlib.Path]:
    """methods_*.png of every place with two methods or more, figure3_*.png where the start varies. The paths."""
    pyplot = plots.load_pyplot() if rows else None
    if pyplot is None:
        return []
    written = []
    for where in dict.fromkeys(row.place for row in rows):
        plain = {row.label: found for row, found in rows.items() if row.place == where and not _is_start(row)}
        if len(plain) > 1:
            written.append(_methods(pyplot, plain, where, to))
    for dataset, protocol in dict.fromkeys((row.run.dataset, row.run.protocol) for row in rows):
        curves = starts(rows, dataset, protocol)
        if curves:
            written.append(_starts(pyplot, curves, dataset, protocol, to))
    return [pathlib.Path(path) for path in written]


def _is_start(row):
    return row.run.variant.startswith("start")


def starts(rows: Rows, dataset: str, protocol: str) -> dict[int, list[tuple[int, list[float]]]]:
    """Fig. 3: ratio -> sorted (start of the IB phase in epochs, accuracies of the last epoch), two starts or more."""
    curves = collections.defaultdict(list)
    for row, found in rows.items():
        run = row.run
        is_here = (run.dataset, run.protocol, run.imb_type, run.method) == (dataset, protocol, "exp", "IB")
        if is_here and (run.variant == "" or _is_start(row)) and not row.difference and run.subset == 0:
            curves[run.ratio].append((run.settings["start_ib_epoch"], values(found, "last", "acc1")))
    return {ratio: sorted(points) for ratio, points in curves.items() if len(points) > 1}


def _starts(pyplot, curves, dataset, protocol, to):
    figure, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    for ratio, points in curves.items():
        means = [fmean(values) for _, values in points]
        spread = [stdev(values) if len(values) > 1 else 0 for _, values in points]
        axes.errorbar([start for start, _ in points], means, spread, marker="o", capsize=3, label=f"ratio {ratio}")
    axes.set(xlabel="epochs before the IB phase", ylabel="test top-1, last epoch [%]")
    axes.set_title(f"{DATASETS[dataset]}, {protocol} length: start of the IB phase (Fig. 3)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    return plots.save_figure(pyplot, figure, to, f"figure3_{dataset}_{protocol}.png")


def _methods(pyplot, rows, where, to):
    """Left: test accuracy over the epochs; right: accuracy of each class in the last epoch; means over the seeds.

    Lines get thinner and change their dashes from row to row, so that one that hides another shows it.
    """
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    for i, (name, found) in enumerate(rows.items()):
        style = {"linestyle": ("-", "--", "-.", ":")[i % 4], "linewidth": 3 - 2 * i / max(len(rows) - 1, 1)}
        curves = list(zip(*([e["test"]["acc1"] for e in record["history"]] for record in found), strict=False))
        means = [fmean(values) for values in curves]
        epochs = range(1, len(means) + 1)
        (line,) = left.plot(epochs, means, label=f"{name} (n = {len(found)})", color=f"C{i % 10}", **style)
        if len(found) > 1:
            spread = [stdev(values) for values in curves]
            low = [m - s for m, s in zip(means, spread, strict=True)]
            high = [m + s for m, s in zip(means, spread, strict=True)]
            left.fill_between(epochs, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        classes = [fmean(values) for values in zip(*values(found, "last", "per_class"), strict=True)]
        right.plot(
            range(len(classes)), classes, color=line.get_color(), marker="osv^Dx+P"[i % 8], markersize=4, **style
        )
    figure.suptitle(title(where))
    left.set(xlabel="epoch", ylabel="test top-1 [%]", title="Over the epochs")
    left.legend(fontsize=8)
    right.set(xlabel="class, largest first", ylabel="test accuracy [%]", title="Of each class, last epoch")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return plots.save_figure(pyplot, figure, to, "methods_" + "_".join(map(str, where)) + ".png")
