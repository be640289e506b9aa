"""What has run, beside the published figures: report.md, report.csv, report.tex and figures.

Accuracies in percent of the test set. "Best" is the run's best epoch, picked on the test set as the official code
does, "plateau" the mean over the last tenth of the epochs, "last" the last epoch. Only full-length runs that are
exactly the paper's (`records.identify`) are judged against a published figure; another precision is shown there with
its label; all others have tables of their own.
"""

import collections
import dataclasses
import itertools
import pathlib
import shlex
from collections.abc import Iterable, Sequence
from statistics import fmean, median, stdev
from typing import Any

from experiment.provenance import lengths
from experiment.records import csv_text
from files import write_text
from paper import figures, records, runs, statistics
from paper.rows import WHEN, Row, Rows, by_place, first_phases, gaps, group, labels, one_image, pairs, title, values
from training.metrics import CLASS_FIGURES
from utils import DataError, warn

TABLES = {
    "1": "Table 1: norm of the influence",
    "2": "Table 2: epsilon, and no factor",
    "4": "Table 4: long-tailed CIFAR, ResNet-32",
    "5": "Table 5: Tiny ImageNet, ResNet-18",
    "6": "Table 6: iNaturalist 2018, ResNet-50",
    "independent": "Independent: another code base (BagofTricks-LT, ResNet-32, 200 epochs), one run each",
    "yardstick": "Balanced Softmax, logit adjustment, CE with CB weights: published elsewhere",
}
METRICS = {"top1": "acc1", "top5": "acc5"}
#: What a published figure may be: the paper does not say. Each has a verdict of its own.
JUDGED = ("best", "plateau")
SHOWN = ("acc1", *CLASS_FIGURES)
NAMES = {
    "acc1": "top-1", "acc5": "top-5", "class_mean": "class mean", "macro_f1": "macro-F1",
    "val": "validation class mean",
}  # fmt: skip

RULE = """Figures are mean ± sample standard deviation over the seeds. **Plateau** is the mean over the last tenth of
the epochs (180 to 199 of 200, counted from 0); comparisons rest on it. The paper does not say whether its figures are
best or last epochs, so best and plateau each have a verdict: "agrees" where the 90 % interval of the mean difference
lies inside ± {margin:g} (two one-sided tests), "higher" or "lower" where its 95 % interval lies outside of that; else
"not known", with the number of seeds at which this mean and spread would just decide. Fewer than three seeds have no
verdict. The spread is that of the differences themselves; the ± of the paper is shown and not used. Figures of another
experiment are shown, not judged."""


def write(
    folders: Sequence[str | pathlib.Path], to: str | pathlib.Path, margin: float = statistics.MARGIN,
    as_csv: bool = False, as_latex: bool = False, all_pairs: bool = False,
) -> list[str]:  # fmt: skip
    """report.md and figures in the folder `to`, from the records below `folders`. Returns the paths.

    A folder may hold notes.md, what a reader must know of its runs: its text comes first.

    Args:
        margin: of the agreement with a published figure, in percent points.
        as_csv, as_latex: write report.csv and report.tex too.
        all_pairs: compare every two rows of a place, not only those with CE and IB.

    Raises:
        DataError: there is nothing to report, neither a record, complete or not, nor figure2.json in `to`.
    """
    to = pathlib.Path(to)
    found, left_out, notes = [], [], []
    for folder in map(pathlib.Path, folders):
        good, bad = records.read(folder)
        note = folder / "notes.md"
        notes += [note.read_text(encoding="utf-8").strip(), ""] if note.is_file() else []
        found += good
        left_out += bad
    if not (found or left_out or (to / "figure2.json").exists()):
        raise DataError(f"no record of a run in {', '.join(map(str, folders))}")
    to.mkdir(parents=True, exist_ok=True)
    rows, doubtful = group(found)
    left_out += doubtful
    for line in left_out:
        warn(f"left out: {line}")
    images = figures.draw(rows, to)
    parts = ["# What has run", "", *notes, RULE.format(margin=margin), ""]
    parts += [*against_the_paper(rows, margin), *per_class(rows), *others(rows, all_pairs), *runs_and_commands(rows)]
    parts += ["## Left out", "", *(f"- {line}" for line in left_out), ""] if left_out else []
    for path, caption in images.items():
        parts += [f"![{path.stem}]({path.name})", "", caption, ""]
    write_text(to / "report.md", "\n".join(parts).rstrip() + "\n")
    written = [to / "report.md", *images]
    for wanted, name, make in ((as_csv, "report.csv", as_lines), (as_latex, "report.tex", latex_text)):
        if wanted:
            write_text(to / name, make(rows))
            written.append(to / name)
    return list(map(str, written))


def mean_and_spread(of_seeds: Sequence[float | None], digits: int = 2, sign: str = "") -> str:
    """'78.17 ± 0.57', one value alone, 'n/a' where a value is missing; sign '+' shows it."""
    known = [value for value in of_seeds if value is not None]
    if not known or len(known) < len(of_seeds):
        return "n/a" if of_seeds else ""
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{fmean(known):{sign}.{digits}f}{spread}"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Markdown lines of a table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


# ----------------------------------------------------------------------------------------- beside the paper


def against_the_paper(rows: Rows, margin: float = statistics.MARGIN) -> list[str]:
    """Of every table the cells of the data, imbalances and ratios of which something has run at full length."""
    parts, nothing = ["## Beside the published figures", ""], []
    for name, heading in TABLES.items():
        cells = [(cell, run) for cell in runs.published() if cell["table"] == name for run in runs.runs_of(cell)]
        shown = {row.place for row in rows if any(_stands_beside(row, run) for _, run in cells)}
        cells = [(cell, run) for cell, run in cells if Row(run).place in shown]
        if not cells:
            nothing.append(heading)
            continue
        lines = []
        for cell, run in cells:
            matching = [row for row in rows if _stands_beside(row, run)]
            for row in dict.fromkeys([Row(run), *matching]):
                lines.append(_compared(cell, row, rows.get(row, []), margin))
        heads = ["data", "type", "ratio", "method", "published", "n", "best", "difference", "verdict", "plateau"]
        heads += ["difference", "verdict", "last", "difference"]
        parts += [f"### {heading}", "", *table(heads, lines), *_gains(cells, rows, margin), *_notes(cells)]
    if nothing:
        parts += ["Of these nothing has run at full length:", "", *(f"- {heading}" for heading in nothing), ""]
    return parts


def _stands_beside(row, run):
    return row.run == run and all(name in records.NUMERICS for name, _ in row.difference)


def _compared(cell, row, found, margin):
    """A line of the table."""
    metric = METRICS[cell["metric"]]
    spread = f" ± {cell['spread']}" if cell["spread"] else ""
    line = [cell["dataset"], cell["imb_type"], cell["ratio"], row.label]
    line.append(f"{cell['value']}{spread} ({cell['whose']}{', top-5' if metric == 'acc5' else ''})")
    if not found:
        return [*line, *[""] * 9]
    line.append(len(found))
    is_judged = cell["same_experiment"] and not row.difference
    for when in WHEN:
        ours = values(found, when, metric)
        differences = [value - cell["value"] for value in ours]
        line += [mean_and_spread(ours), f"{fmean(ours) - cell['value']:+.2f}"]
        if when in JUDGED:
            line.append(_verdict(differences, margin, found) if is_judged else "not judged")
    return line


def _verdict(differences, margin, found):
    result = statistics.against(differences, margin, one_image(found))
    if result.verdict != statistics.NOT_KNOWN:
        return result.verdict
    return f"not known ({result.seeds or f'over {statistics.MOST_SEEDS}'} seeds would just decide)"


def _gains(cells, rows, margin):
    """Our gain over CE, seed by seed, beside the published one, where both figures are of one author."""
    figures = {(run, cell["metric"], cell["whose"]): cell for cell, run in cells if cell["same_experiment"]}
    lines = []
    for (run, metric, whose), cell in figures.items():
        row, ce = Row(run), Row(dataclasses.replace(run, method="CE"))
        of_ce = figures.get((ce.run, metric, whose))
        both = pairs(rows, row, ce) if row != ce and of_ce and {row, ce} <= rows.keys() else []
        if not (both and of_ce):
            continue
        published = cell["value"] - of_ce["value"]
        line = [run.dataset, run.imb_type, run.ratio, f"{row.label} minus CE", f"{published:+.2f}", len(both)]
        for when in WHEN:
            gained = gaps(both, when, METRICS[metric])
            line.append(mean_and_spread(gained, sign="+"))
            if when in JUDGED:
                line.append(_verdict([gain - published for gain in gained], margin, rows[row]))
        lines.append(line)
    if not lines:
        return []
    heads = ["data", "type", "ratio", "gain", "published", "n", "best", "verdict", "plateau", "verdict", "last"]
    return ["The gain over CE, seed by seed within one first phase, one statistic for both:", "", *table(heads, lines)]


def _notes(cells):
    """A line for each note, with the cells that it is about."""
    about = collections.defaultdict(list)
    for cell, run in cells:
        if cell["note"]:
            about[cell["note"]].append(
                f"{cell['dataset']} {cell['imb_type']} {cell['ratio']} {run.title} {cell['value']}"
            )
    return [*(f"- {', '.join(where)}: {note}" for note, where in about.items()), ""] if about else []


def per_class(rows: Rows) -> list[str]:
    """Table 3: ours, best and last epoch, under the published accuracies of each class."""
    cells = collections.defaultdict(list)
    for cell in runs.published():
        if cell["table"] == "3":
            cells[runs.runs_of(cell)[0]].append(cell)
    if not any(_stands_beside(row, run) for row in rows for run in cells):
        return ["Table 3 (per class, CIFAR-10, ratio 50): nothing has run at full length.", ""]
    lines, names = [], []
    for run, of_run in cells.items():
        printed = [cell["value"] for cell in of_run]
        lines.append([run.imb_type, run.method, "published", *printed, f"{fmean(printed):.2f}"])
        for row, when in itertools.product((row for row in rows if _stands_beside(row, run)), ("best", "last")):
            found = rows[row]
            names = found[0]["classes"]
            ours = [mean_and_spread(of_class, 1) for of_class in zip(*values(found, when, "per_class"), strict=True)]
            lines.append(["", row.label if row.difference else "", f"ours, {when} (n = {len(found)})", *ours])
            lines[-1].append(mean_and_spread(values(found, when, "class_mean")))
    heading = "### Table 3: accuracy of each class, CIFAR-10, ratio 50"
    notes = [(cell, run) for run, of_run in cells.items() for cell in of_run[:1]]
    return [heading, "", *table(["type", "method", "", *names, "mean"], lines), *_notes(notes)]


# ------------------------------------------------------------------------------- what has no published figure


def others(rows: Rows, all_pairs: bool = False) -> list[str]:
    """Two tables for each data set, imbalance, ratio and protocol: what was reached, and ours against ours."""
    parts = []
    for where, here in by_place(rows).items():
        first = next(iter(here.values()))[0]
        parts += [f"## {title(where)}", ""]
        if where[-1] not in ("full", "own"):
            epochs = sorted({record["settings"]["epochs"] for found in here.values() for record in found})
            length = f"Of {' and '.join(map(str, epochs))} epochs"
            parts += [f"{length}: not the paper's length, and not to be set against published figures.", ""]
        if len(first["class_counts"]) <= 20:
            parts += [f"Training images of each class: {' '.join(map(str, first['class_counts']))}.", ""]
        names, of_all = labels(here)
        parts += [f"{_said(of_all)}.", ""] if of_all else []
        if any(record["history"][-1].get("val") for found in here.values() for record in found):
            parts += ["Best: of runs with a validation set the epoch that it chooses, else the test set's.", ""]
        phases, metrics = first_phases(here), _metrics(here)
        heads = ["method", "n", *(f"top-1 {when}" for when in WHEN)]
        heads += [f"{NAMES.get(name, name)}, plateau" for name in metrics]
        heads += ["s per epoch", *["first phase"] * bool(phases)]
        lines = []
        for row, found in here.items():
            seconds = median(epoch["seconds"] for record in found for epoch in record["history"])
            lines.append(
                [*_reached(names[row], found, metrics), f"{seconds:.1f}", *[phases.get(row, "")] * bool(phases)]
            )
        parts += table(heads, lines)
        parts += [f"{first['group_rule'][0].upper()}{first['group_rule'][1:]}.", ""]
        if phases:
            text = "Rows of different letters start from different first phases of the same seed, trained apart: they"
            parts += [f"{text} are not compared.", ""]
        parts += _pairs(here, names, all_pairs)
    return parts


def _said(of_all):
    """What all rows of a table share, as text."""
    return "All of these: " + ", ".join(f"{name} {value}" for name, value in of_all)


def _metrics(here):
    """What is shown beside top-1: what a record has a value of; groups without a class have none."""
    records_of_all = [record for found in here.values() for record in found]
    shown = [name for name in SHOWN[1:] if any(record["last"].get(name) is not None for record in records_of_all)]
    return shown + ["val"] * any(record["history"][-1].get("val") for record in records_of_all)


def _reached(label, found, metrics):
    """The label, number of seeds, top-1 best, plateau and last, the plateau of each metric."""
    top1 = [mean_and_spread(values(found, when, "acc1")) for when in WHEN]
    return [label, len(found), *top1, *(mean_and_spread(values(found, "plateau", name)) for name in metrics)]


def _chosen_pairs(here, all_pairs):
    """Every two rows, or those with CE and with IB, and labelled ones against plain ones."""
    listed = list(here)
    if all_pairs or len(listed) <= 5:
        return [(one, other) for i, other in enumerate(listed) for one in listed[i + 1 :]]
    _, of_all = labels(here)
    plain = {
        (row.run.method, row.run.variant, row.run.subset): row
        for row in reversed(listed)  # of own data the first of a method, which has the fewest constants of its own
        if row.difference == of_all or row.run.protocol == "own"
    }
    bases = [(row, (base, "", row.run.subset)) for base in ("CE", "IB") for row in listed]
    found = [(row, plain[base]) for row, base in bases if base in plain]
    found += [(row, Row(row.run)) for row in listed if row.difference and Row(row.run) in here]
    unique = {frozenset(pair): pair for pair in reversed(found) if pair[0] != pair[1]}
    return list(unique.values())[::-1]


def _pairs(here, names, all_pairs):
    """Ours against ours: two rows that differ in the method alone, over the seeds that both have."""
    both = {(one, other): pairs(here, one, other) for one, other in _chosen_pairs(here, all_pairs)}
    both = {rows: found for rows, found in both.items() if found}
    if not both:
        return []
    metric, resolution = next(iter(here)).metric, one_image(record for found in here.values() for record in found)
    on_plateau = {rows: gaps(found, "plateau", metric) for rows, found in both.items()}
    lines = []
    for rows, contrast in statistics.family(on_plateau, resolution=resolution).items():
        line = [f"{names[rows[0]]} minus {names[rows[1]]}", contrast.n]
        line += [mean_and_spread(of, sign="+") for of in (gaps(both[rows], "best", metric), on_plateau[rows])]
        lines.append([*line, *contrast.texts])
    text = f"Ours against ours: difference of {NAMES[metric]} over the seeds that both have"
    text += ", paired t-test on the plateau. p is Holm's for the whole table, and decides; intervals are not adjusted."
    return [text, "", *table(["", "seeds", "best", "plateau", "95 % interval", "p", "verdict"], lines)]


# ------------------------------------------------------------------------------------------- for other programs


def as_lines(rows: Rows) -> str:
    """CSV, a line a row: place, method, n, then mean and standard deviation of every figure, best, plateau, last."""
    columns = list(itertools.product(WHEN, SHOWN))
    names = [f"{when}_{name}{part}" for when, name in columns for part in ("", "_sd")]
    lines: list[list] = [["dataset", "imb_type", "ratio", "length", "method", "n", *names]]
    for row, found in rows.items():
        figures_of = [mean_and_spread(values(found, when, name), 4).partition(" ± ") for when, name in columns]
        cells = [cell for mean, _, spread in figures_of for cell in (mean.removeprefix("n/a"), spread)]
        lines.append([*row.place, row.label, len(found), *cells])
    return csv_text(lines)


def latex_text(rows: Rows) -> str:
    """LaTeX, a booktabs table a place: top-1 best, plateau and last, class mean and groups on the plateau."""
    parts = ["% \\usepackage{booktabs}"]
    for where, here in by_place(rows).items():
        metrics, (names, of_all) = _metrics(here), labels(here)
        heads = ["method", "$n$", *WHEN, *(NAMES.get(name, name) for name in metrics)]
        parts += ["\\begin{table}", "\\centering", rf"\begin{{tabular}}{{l{'c' * (len(heads) - 1)}}}", "\\toprule"]
        parts += [" & ".join(heads) + r" \\", "\\midrule"]
        for row, found in here.items():
            label, *cells = map(str, _reached(names[row], found, metrics))
            line = " & ".join([_latex(label), *(cell.replace("±", r"$\pm$") for cell in cells)])
            parts.append(line + r" \\")
        caption = rf"{_latex(title(where))}: test accuracy [\%]; class mean and groups: last tenth of the epochs."
        caption += f" {_latex(_said(of_all))}." if of_all else ""
        parts += ["\\bottomrule", "\\end{tabular}", rf"\caption{{{caption}}}", "\\end{table}", ""]
    return "\n".join(parts)


def _latex(text):
    return "".join(rf"\{c}" if c in "_%&#$" else c for c in text)


# ---------------------------------------------------------------------------------------------- how it was run


def runs_and_commands(rows: Rows) -> list[str]:
    """Every run with its precision, machine, hours and commit; the command behind every row that has one."""
    if not rows:
        return []
    lines, commands = [], []
    for row, found in rows.items():
        if not row.difference and row.run.protocol != "own":
            commands.append(shlex.join(["python", *row.run.argv("reproduced")]))
        for record in found:
            threads = record["settings"].get("threads")
            hours = sum(epoch["seconds"] for epoch in record["history"]) / 3600
            machine = f"{_parts(record, 'device')}, {threads or 'all'} threads, {record['versions']['machine']}"
            who = record["name"], record["settings"]["seed"], records.precision(record)
            lines.append([*who, machine, f"{hours:.2f}", _parts(record, "code", _commit)])
    heads = ["run", "seed", "precision", "machine", "hours", "commit"]
    text = "Hours are of all epochs, with those that runs share and that were trained once."
    block = ["```", *commands, "```", ""]
    what = "The command of each row that is a run of the paper or a control, for seed 0:"
    return ["## The runs", "", text, "", *table(heads, lines), *([what, "", *block] if commands else [])]


def _commit(code):
    return code["commit"][:10] + ("" if code["clean"] else ", with changes") if code else "not recorded"


def _parts(record, name, text=lambda value: value or "not recorded"):
    """What a record says under `name`; of a run of several parts that differ in it, each with its epochs."""
    parts = lengths(record.get("trained_on", []), name, record["epochs_done"])
    if len(parts) < 2:
        return text(record.get(name))
    return ", then ".join(f"{text(value)} ({epochs} epochs)" for value, epochs in parts)
