"""Figures of a report, each with its caption: methods side by side, Fig. 2, Fig. 3."""

import collections
import itertools
import json
import pathlib
from statistics import fmean, stdev

from experiment import plots
from imbalance import groups
from paper import runs, style
from paper.rows import DATASETS, Rows, by_place, published, shared, title, values
from training.registry import LOSSES

#: Class names stand on the axis up to this many classes; beyond, many, medium and few.
MOST_NAMED = 20

Captions = dict[pathlib.Path, str]


def draw(rows: Rows, to: pathlib.Path) -> Captions:
    """All figures of a report as PNG and PDF in `to`. Returns the PNGs with their captions, in order."""
    if not plots.available():
        return {}
    found: Captions = {}
    for where, here in by_place(rows).items():
        for name, panel in panels(here, where).items():
            found |= _methods(panel, where, to, name)
    for dataset, protocol in dict.fromkeys((row.run.dataset, row.run.protocol) for row in rows):
        curves = starts(rows, dataset, protocol) if protocol != "own" else {}
        if curves:
            found |= _starts(curves, dataset, protocol, to)
    if (to / "figure2.json").is_file():
        found[_influence(json.loads((to / "figure2.json").read_text()), to)] = ""
    return found


# ------------------------------------------------------------------------------------------ methods side by side


def panels(rows: Rows, where: tuple[str, str, int, str]) -> dict[str, Rows]:
    """{name of the figure: its rows, four at most}: methods, then variants, each further figure with CE or IB again."""
    here = [row for row in rows if not row.run.variant.startswith("start")]
    here = [row for row in here if set(row.difference) == shared(here) or row.run.protocol == "own"]
    plain = [row for row in here if not row.run.variant]
    ib = [row for row in plain if row.run.method == "IB"][:1]
    variants, found = [row for row in here if row.run.variant], {}
    for kind, again, rest in (("methods", plain[:1], plain[1:]), ("controls", ib, variants)):
        step = style.MOST_IN_A_PANEL - len(again)
        for i in range(0, len(rest), step):
            part = [*again, *rest[i : i + step]]
            if len(part) > 1:
                name = "_".join([kind, *map(str, where), *[str(i // step + 1)] * (i > 0)]).replace(" ", "_")
                found[name] = {row: rows[row] for row in part}
    return found


def _methods(panel, where, to, name):
    """Above: the second phase, epoch by epoch; below: accuracy over class size, or of the groups."""
    figure, (above, below) = plots.subplots(2, height=4.5)
    first = next(iter(panel.values()))[0]
    classes, printed = len(first["class_counts"]), []
    metric = next(iter(panel)).metric
    start, begin = _second_phase(panel)
    for i, (row, found) in enumerate(panel.items()):
        look = style.of(row.run.method, row.run.variant, i)
        look["label"] += f", subset {row.run.subset}" if row.run.subset else ""
        if row.run.protocol == "own":  # what sets it apart
            look["label"] += "".join(f", {setting} {value}" for setting, value in row.difference)
        _curve(above, found, metric, look, begin, i)
        level = published(row)
        if level is not None:
            above.axhline(level, color=look["color"], linestyle=":", linewidth=1)
            printed.append(f"{style.name_of(row.run.method, row.run.variant)} {level}")
        if classes <= MOST_NAMED:
            _over_class_size(below, found, look)
        else:
            _over_groups(below, found, look, i, len(panel))
    _frame(above, panel, metric, begin)
    if start:
        above.axvline(start + 0.5, color="black", linestyle="--", linewidth=0.8)
    _class_axis(below, first)
    above.set(xlabel="epoch", ylabel=f"test {'class mean' if metric == 'class_mean' else 'top-1'} [%]")
    below.set(ylabel="test accuracy [%]")
    handles, labels = above.get_legend_handles_labels()
    columns = 2 if max(map(len, labels)) < 28 else 1
    figure.legend(handles, labels, loc="outside upper center", ncols=columns)
    caption = f"{title(where)}. Above: test accuracy from epoch {begin + 1} on, mean over the seeds"
    several = {len(found) for found in panel.values() if len(found) > 1}
    caption += "; band: ± one sample standard deviation" if several else ""
    caption += f"; dashed: the second phase starts after epoch {start}" if start else ""
    caption += f"; dotted: published ({', '.join(printed)})" if printed else ""
    caption += ". Below: accuracy of each class over its training images, last epoch" if classes <= MOST_NAMED else (
        ". Below: accuracy of the groups over the last tenth of the epochs"
    )  # fmt: skip
    if row.difference and row.run.protocol != "own":
        caption += f". All with {', '.join(' '.join(one) for one in row.difference)}"
    seeds = [f"{style.name_of(row.run.method, row.run.variant)}: {len(found)}" for row, found in panel.items()]
    return {style.save(figure, to, name): f"{caption}; points are seeds. Seeds of {'; '.join(seeds)}."}


def _second_phase(panel):
    """Epochs before the second phase, 0 where no row comes to one; and how many are left out: those before it, or the
    first quarter."""
    epochs = min(len(record["history"]) for found in panel.values() for record in found)
    with_two = [found for row, found in panel.items() if LOSSES[runs.pair_of(row.run.method)[0]].first_phase_ce]
    starts = [record["settings"]["start_ib_epoch"] for found in with_two for record in found]
    start = min((start for start in starts if start < epochs), default=0)
    return start, max(start - max(epochs // 100, 1), 0) if start else epochs // 4


def _curve(axes, found, metric, look, begin, nth):
    seeds = [[epoch["test"][metric] for epoch in record["history"]] for record in found]
    curves = list(zip(*seeds, strict=False))[begin:]
    epochs, means = range(begin + 1, begin + 1 + len(curves)), [fmean(curve) for curve in curves]
    axes.plot(epochs, means, **look, markevery=(2 + 2 * nth, max(len(means) // 6, 1)))
    if len(found) > 1:
        spread = [stdev(curve) for curve in curves]
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(epochs, low, high, color=look["color"], alpha=0.15, linewidth=0)


def _frame(axes, panel, metric, begin):
    """Limits in which the rare falls at a high learning rate do not flatten the rest."""
    shown = sorted(
        epoch["test"][metric] for found in panel.values() for record in found for epoch in record["history"][begin:]
    )
    levels = [level for row in panel if (level := published(row)) is not None]
    low, high = min([shown[len(shown) // 8], *levels]), max([shown[-1], *levels])
    axes.set_ylim(low - 0.1 * (high - low) - 0.2, high + 0.1 * (high - low) + 0.2)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _over_class_size(axes, found, look):
    sizes = found[0]["class_counts"]
    at = sizes if len(set(sizes)) == len(sizes) else range(len(sizes))
    seeds = [value for value in values(found, "last", "per_class") if value is not None]
    means = [fmean(of) if None not in of else float("nan") for of in zip(*seeds, strict=True)]
    axes.plot(at, means, color=look["color"], linewidth=0.8, marker=None if len(seeds) > 1 else look["marker"])
    for seed in seeds if len(seeds) > 1 else ():
        axes.plot(at, seed, color=look["color"], marker=look["marker"], linestyle="none", markersize=2.5, alpha=0.7)


def _over_groups(axes, found, look, nth, methods):
    for i, group in enumerate(("many", "medium", "few")):
        seeds = [value for value in values(found, "plateau", group) if value is not None]
        at = i + 0.16 * (nth - (methods - 1) / 2)
        if seeds:
            axes.bar(at, fmean(seeds), 0.13, color=look["color"], alpha=0.35)
            axes.plot([at] * len(seeds), seeds, color=look["color"], marker=look["marker"], linestyle="none")


def _class_axis(axes, first):
    sizes, names = first["class_counts"], first["classes"]
    if len(sizes) > MOST_NAMED:
        ticks = [f"{name}\n{len(classes)} classes" for name, classes in groups(sizes).items()]
        axes.set_xticks(range(3), ticks)
        axes.grid(axis="x", visible=False)
        return
    labels = [f"{plots.label(name)} ({n})" for name, n in zip(names, sizes, strict=True)]
    if len(set(sizes)) == len(sizes):
        axes.set_xscale("log")
        axes.set_xticks(sizes, labels, rotation=45, ha="right", fontsize=6)
        axes.set_xticks([], minor=True)
        axes.invert_xaxis()
    else:
        axes.set_xticks(range(len(sizes)), labels, rotation=45, ha="right", fontsize=6)


# ------------------------------------------------------------------------------------------------- Fig. 2, Fig. 3


def starts(rows: Rows, dataset: str, protocol: str) -> dict[int, list[tuple[int, list[float]]]]:
    """Fig. 3: ratio -> sorted (epochs before the IB phase, accuracies on the plateau), two starts or more."""
    curves = collections.defaultdict(list)
    for row, found in rows.items():
        run = row.run
        is_here = (run.dataset, run.protocol, run.imb_type, run.method) == (dataset, protocol, "exp", "IB")
        is_start = run.variant == "" or run.variant.startswith("start")
        if is_here and is_start and not row.difference and run.subset == 0:
            curves[run.ratio].append((run.settings["start_ib_epoch"], values(found, "plateau", "acc1")))
    return {ratio: sorted(points) for ratio, points in curves.items() if len(points) > 1}


def _starts(curves, dataset, protocol, to):
    figure, axes = plots.subplots(height=2.3)
    colors = itertools.cycle(("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00"))
    for color, (ratio, points) in zip(colors, curves.items(), strict=False):
        axes.plot([s for s, _ in points], [fmean(of) for _, of in points], color=color, label=f"ratio {ratio}")
        for start, of in points:
            axes.plot([start] * len(of), of, "o", color=color, alpha=0.6)
    axes.set(xlabel="epochs before the IB phase", ylabel="test top-1, plateau [%]")
    axes.legend()
    length = {"full": "full length", "short": "shortened to a fifth"}.get(protocol, protocol)
    caption = f"{DATASETS[dataset]}, {length}: start of the IB phase (the paper's Fig. 3), mean of the last tenth of"
    return {style.save(figure, to, f"figure3_{dataset}_{protocol}"): f"{caption} the epochs; points are seeds."}


def _influence(found, to):
    """Fig. 2: the influences that `influence.of_checkpoint` returns, of balanced and of long-tailed training data."""
    figure, panels = plots.subplots(2, height=3.6, sharex=True, sharey=True)
    for axes, (name, one) in zip(panels, found.items(), strict=True):
        looks = (("o-", "#000000"), ("s-", "#d55e00"))
        classes = zip(looks, one["classes"], one["images"], one["influence"], strict=True)
        for (look, color), who, images, influences in classes:
            label = f"{plots.label(who)}, {images} training images"
            axes.plot(range(1, len(influences) + 1), influences, look, color=color, label=label, markersize=2)
        axes.set(ylabel="influence, scaled", title=f"{name} training data")
        axes.legend()
    panels[-1].set_xlabel("image, by influence")
    return style.save(figure, to, "figure2")
