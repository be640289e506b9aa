"""What has run, beside the published figures: report.md and figures.

Accuracies in percent of the test set. "Best" is the run's best epoch, picked on the test set as the official code
does, "last" its last epoch. Only full-length runs that are the paper's to the letter (`runs.describe`) stand beside a
published figure; others have tables of their own.
"""

import collections
import math
import pathlib
import statistics

from paper import records, runs
from training import plots
from training.checkpoint import write_atomically

TABLES = {
    "1": "Table 1: norm of the influence",
    "2": "Table 2: epsilon, and no factor",
    "4": "Table 4: long-tailed CIFAR, ResNet-32",
    "5": "Table 5: Tiny ImageNet, ResNet-18",
    "6": "Table 6: iNaturalist 2018, ResNet-50",
    "yardstick": "Balanced Softmax, logit adjustment, CE with CB weights: published elsewhere",
}
METRICS = {"top1": "acc1", "top5": "acc5"}
#: A difference beyond this many standard errors is called larger than the noise.
STANDARD_ERRORS = 2

RULE = f"""Figures are mean ± sample standard deviation over the seeds. The difference is ours (best epoch, which is
what the official code prints; the paper does not say) minus the published figure. It is called larger
than the noise where it exceeds {STANDARD_ERRORS} standard errors, sqrt(v / n + u / m): n is the number
of our runs, v the larger of their variance and the binomial variance p (1 - p) / N of a test set of N
images (with one run there is only the latter); m is the number of runs behind the published figure (1
where nothing is said), u the square of its ± or, without one, v. One run knows nothing of the spread
between seeds, so with n = 1 read "yes" as "perhaps"."""


def write(folders, to):
    """report.md and figures in the folder `to`, from the records below `folders`. Returns the paths."""
    to = pathlib.Path(to)
    to.mkdir(parents=True, exist_ok=True)
    found = [record for folder in folders for record in records.read(folder)]
    by_row = group(found)
    figures = draw(by_row, to)
    parts = ["# What has run", "", RULE, ""]
    parts += against_the_paper(by_row) + per_class(by_row) + others(by_row)
    figures += [to / "figure2.png"] if (to / "figure2.png").exists() else []
    parts += [f"![{path.stem}]({path.name})" for path in figures]
    path = to / "report.md"
    write_atomically(path, lambda file: file.write(("\n".join(parts).rstrip() + "\n").encode()))
    return [str(path), *map(str, figures)]


def group(found):
    """(Run with seed 0, difference) -> records of its seeds, in the paper's order; of a seed there is one."""
    rows = collections.defaultdict(dict)
    for record in found:
        run, difference = runs.describe(record["settings"])
        if run is not None:
            key = runs.spread_over([run], [0], [run.subset], run.protocol)[0], difference
            rows[key][run.seed] = record
    order = list(runs.METHODS)
    keys = sorted(rows, key=lambda key: (place(key[0]), order.index(key[0].method), key[0].variant, key[0].subset))
    return {key: [rows[key][seed] for seed in sorted(rows[key])] for key in keys}


def place(run):
    """What tells one table of runs from another."""
    return run.dataset, run.imb_type, run.ratio, run.protocol


def mean_and_spread(values, digits=2):
    """'78.17 ± 0.57', one value alone, 'n/a' where a value is missing."""
    if not values or None in values:
        return "n/a" if values else ""
    text = f"{statistics.mean(values):.{digits}f}"
    return text + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def noise(values, test_size, spread=None, runs_published=1):
    """The difference, in percent points, up to which ours and the published figure may be the same; see RULE.

    Args:
        values: our accuracies in percent, one a run. test_size: images.
        spread, runs_published: the published ± or None, and its number of runs.
    """
    share = statistics.mean(values) / 100
    variance = share * (1 - share) / test_size * 100**2
    if len(values) > 1:
        variance = max(variance, statistics.variance(values))
    published = variance if spread is None else spread**2
    return STANDARD_ERRORS * math.sqrt(variance / len(values) + published / runs_published)


def table(heads, rows):
    """Markdown lines of a table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


# ----------------------------------------------------------------------------------------- beside the paper


def against_the_paper(by_row):
    """Every cell of the tables of which something has run, blank where it has not."""
    parts, nothing = ["## Beside the published figures", ""], []
    for name, title in TABLES.items():
        cells = [row for row in runs.published() if row["table"] == name]
        compared = [_compared(cell, by_row.get((runs.run_of(cell), ""), [])) for cell in cells]
        if not any(row[-1] for row in compared):
            nothing.append(title)
            continue
        heads = ["data", "type", "ratio", "method", "published", "ours, best", "ours, last", "class mean, last", "n"]
        parts += [f"### {title}", "", *table([*heads, "difference", "over the noise"], [row[:-1] for row in compared])]
        parts += [f"- {_where(cell)}, {cell['value']}: {cell['note']}" for cell in cells if cell["note"]] + [""]
    if nothing:
        parts += ["Of these nothing has run at full length:", "", *(f"- {title}" for title in nothing), ""]
    return parts


def _where(cell):
    parts = (cell["dataset"], cell["imb_type"], str(cell["ratio"]), runs.titled(cell["method"], cell["variant"]))
    return " ".join(parts)


def _compared(cell, found):
    """A row of the table, and whether anything has run."""
    metric = METRICS[cell["metric"]]
    best, last = ([record[when][metric] for record in found] for when in ("best", "last"))
    spread = f" ± {cell['spread']}" if cell["spread"] else ""
    row = [cell["dataset"], cell["imb_type"], cell["ratio"], runs.titled(cell["method"], cell["variant"])]
    row += [f"{cell['value']}{spread} ({cell['whose']}{', top-5' if metric == 'acc5' else ''})"]
    row += [mean_and_spread(best), mean_and_spread(last), mean_and_spread([r["last"]["class_mean"] for r in found])]
    if not found:
        return [*row, "", "", "", False]
    difference = statistics.mean(best) - cell["value"]
    limit = noise(best, found[0]["best"]["seen"], cell["spread"], cell["runs"])
    verdict = f"{'yes' if abs(difference) > limit else 'no'} (over {limit:.2f})"
    return [*row, len(found), f"{difference:+.2f}", verdict, True]


def per_class(by_row):
    """Table 3: ours under the published accuracies of each class."""
    cells = collections.defaultdict(list)
    for row in runs.published():
        if row["table"] == "3":
            cells[runs.run_of(row)].append(row["value"])
    if not any(by_row.get((run, "")) for run in cells):
        return ["Table 3 (per class, CIFAR-10, ratio 50): nothing has run at full length.", ""]
    rows, names = [], range(10)
    for run, values in cells.items():
        found = by_row.get((run, ""), [])
        names = found[0]["classes"] if found else names
        ours = [mean_and_spread(v, 1) for v in zip(*(r["last"]["per_class"] for r in found), strict=True)]
        rows.append([run.imb_type, run.method, "published", *values, f"{statistics.mean(values):.2f}"])
        mean = mean_and_spread([record["last"]["class_mean"] for record in found])
        rows.append(["", "", f"ours, last (n = {len(found)})", *(ours or [""] * 10), mean])
    title = "### Table 3: accuracy of each class, CIFAR-10, ratio 50"
    return [title, "", *table(["type", "method", "", *names, "mean"], rows)]


# ------------------------------------------------------------------------------- what has no published figure


def others(by_row):
    """A table for each data set, imbalance, ratio and protocol: short runs, digits, controls, variants."""
    parts = []
    for where in dict.fromkeys(place(run) for run, _ in by_row):
        rows = {key: found for key, found in by_row.items() if place(key[0]) == where}
        dataset, imb_type, ratio, protocol = where
        parts += [f"## {dataset}, {imb_type}, ratio {ratio}, {protocol} length", ""]
        epochs = next(iter(rows.values()))[0]["settings"]["epochs"]
        if protocol == "short":
            parts += [f"Shortened to {epochs} epochs, a fifth: not to be set against published figures.", ""]
        counts = next(iter(rows.values()))[0]["class_counts"]
        if len(counts) <= 20:
            parts += [f"Training images of each class: {' '.join(map(str, counts))}.", ""]
        heads = ["method", "n", "top-1 best", "top-1 last", "top-5 last", "class mean", "many", "medium", "few"]
        parts += table([*heads, "s per epoch"], [_row(key, found) for key, found in rows.items()])
        parts += [f"Class mean and groups are of the last epoch; {next(iter(rows.values()))[0]['group_rule']}.", ""]
    return parts


def label(run, difference):
    """A row's name: method, variant, another subset, settings that are not the paper's."""
    name = run.title + (f", subset {run.subset}" if run.subset else "")
    return name + (f", but {difference}" if difference else "")


def _row(key, found):
    cells = [label(*key), len(found), mean_and_spread([record["best"]["acc1"] for record in found])]
    for name in ("acc1", "acc5", "class_mean", "many", "medium", "few"):
        cells.append(mean_and_spread([record["last"][name] for record in found]))
    seconds = statistics.median(epoch["seconds"] for record in found for epoch in record["history"])
    return [*cells, f"{seconds:.1f}"]


# --------------------------------------------------------------------------------------------------- figures


def draw(by_row, to):
    """methods_*.png of every place with two methods or more, figure3_*.png where the start varies. The paths."""
    pyplot = plots.load_pyplot() if by_row else None
    if pyplot is None:
        return []
    written = []
    for where in dict.fromkeys(place(run) for run, _ in by_row):
        rows = {key: found for key, found in by_row.items() if place(key[0]) == where}
        plain = {label(*key): found for key, found in rows.items() if not key[0].variant.startswith("start")}
        if len(plain) > 1:
            written.append(_methods(pyplot, plain, where, to))
    for dataset, protocol in dict.fromkeys((run.dataset, run.protocol) for run, _ in by_row):
        curves = starts(by_row, dataset, protocol)
        if curves:
            written.append(_starts(pyplot, curves, dataset, protocol, to))
    return [pathlib.Path(path) for path in written]


def starts(by_row, dataset, protocol):
    """Fig. 3: ratio -> sorted (start of the IB phase in epochs, accuracies of the last epoch), two starts or more."""
    curves = collections.defaultdict(list)
    for (run, difference), found in by_row.items():
        is_start = run.variant == "" or run.variant.startswith("start")
        is_here = (run.dataset, run.protocol, run.imb_type, run.method) == (dataset, protocol, "exp", "IB")
        if is_here and is_start and not difference and run.subset == 0:
            curves[run.ratio].append((run.settings["start_ib_epoch"], [r["last"]["acc1"] for r in found]))
    return {ratio: sorted(points) for ratio, points in curves.items() if len(points) > 1}


def _starts(pyplot, curves, dataset, protocol, to):
    figure, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    for ratio, points in curves.items():
        means = [statistics.mean(values) for _, values in points]
        spread = [statistics.stdev(values) if len(values) > 1 else 0 for _, values in points]
        axes.errorbar([start for start, _ in points], means, spread, marker="o", capsize=3, label=f"ratio {ratio}")
    axes.set(xlabel="epoch at which the IB phase starts", ylabel="top-1, last epoch [%]")
    axes.set_title(f"{dataset}, {protocol} length: start of the IB phase (Fig. 3)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    return plots.save_figure(pyplot, figure, to, f"figure3_{dataset}_{protocol}.png")


def _methods(pyplot, rows, where, to):
    """Left: test accuracy over the epochs; right: accuracy of each class in the last epoch; means over the seeds."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    for name, found in rows.items():
        curves = list(zip(*([e["test"]["acc1"] for e in record["history"]] for record in found), strict=False))
        means = [statistics.mean(values) for values in curves]
        epochs = range(1, len(means) + 1)
        (line,) = left.plot(epochs, means, label=f"{name} (n = {len(found)})", linewidth=1.2)
        if len(found) > 1:
            spread = [statistics.stdev(values) for values in curves]
            low = [m - s for m, s in zip(means, spread, strict=True)]
            high = [m + s for m, s in zip(means, spread, strict=True)]
            left.fill_between(epochs, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        classes = [statistics.mean(values) for values in zip(*(r["last"]["per_class"] for r in found), strict=True)]
        right.plot(range(len(classes)), classes, color=line.get_color(), marker=".", linewidth=1)
    left.set(xlabel="epoch", ylabel="test top-1 [%]", title=" ".join(map(str, where)))
    left.legend(fontsize=8)
    right.set(xlabel="class, largest first", ylabel="test accuracy, last epoch [%]", title="Each class")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return plots.save_figure(pyplot, figure, to, "methods_" + "_".join(map(str, where)) + ".png")
