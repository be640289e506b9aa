"""What has run, beside the published figures: report.md and figures.

Accuracies in percent of the test set. "Best" is the run's best epoch, picked on the test set as the official code
does, "last" its last epoch. Only full-length runs that are the paper's to the letter (`records.describe`) are judged
against a published figure; another precision is shown there with its label; all others have tables of their own.
"""

import collections
import dataclasses
import pathlib
import shlex
from collections.abc import Iterable, Sequence
from statistics import fmean, median, stdev
from typing import Any

from experiment.provenance import lengths
from files import write_text
from paper import figures, records, runs, statistics
from paper.rows import DATASETS, Row, Rows, group, title, values
from paper.statistics import Spread
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
#: What the paper tells of its own spread: the ± of IB in Table 2 (three seeds); 40.85 and 42.14 for one cell of IB in
#: Tables 1 and 4. The latter is the larger of two such pairs (52.85 and 52.63 is the other): it errs on the wide side.
HINTS = {"cifar10": [Spread(0.57, 2)], "cifar100": [Spread(stdev([40.85, 42.14]), 1)]}

RULE = f"""Figures are mean ± sample standard deviation over the seeds. "Differs" compares ours with a published mean
of m runs (1 where nothing is said), at the level of {statistics.LEVEL:.0%}: the difference must exceed
t · s · sqrt(1 / n + 1 / m), the half width of a prediction interval with Student's t (the column "limit"). s is the
spread between seeds, pooled over all rows of the data set that have two seeds or more, and over what the paper tells
of its own spread (CIFAR-10: ± 0.57; CIFAR-100: 40.85 and 42.14 for one cell). The paper does not say whether it prints
the best or the last epoch, so a verdict needs both to agree; "?" means that they do not, or that the spread
is unknown (no row of the data set has two seeds). Figures of another experiment are shown, not judged."""


def write(folders: Sequence[str | pathlib.Path], to: str | pathlib.Path) -> list[str]:
    """report.md and figures in the folder `to`, from the records below `folders`. Returns the paths.

    A folder may hold notes.md, what a reader must know of its runs: its text comes first.

    Raises:
        DataError: there is nothing to report, neither a record, whole or half, nor figure2.png in `to`.
    """
    to = pathlib.Path(to)
    found, left_out, notes = [], [], []
    for folder in map(pathlib.Path, folders):
        good, bad = records.read(folder)
        notes += [(folder / "notes.md").read_text().strip(), ""] if (folder / "notes.md").is_file() else []
        found += good
        left_out += bad
    if not (found or left_out or (to / "figure2.png").exists()):
        raise DataError(f"no record of a run in {', '.join(map(str, folders))}")
    to.mkdir(parents=True, exist_ok=True)
    rows, doubtful = group(found)
    left_out += doubtful
    for line in left_out:
        warn(f"left out: {line}")
    images = figures.draw(rows, to)
    parts = ["# What has run", "", *notes, RULE, "", *against_the_paper(rows), *per_class(rows), *others(rows)]
    parts += runs_and_commands(rows)
    parts += ["## Left out", "", *(f"- {line}" for line in left_out), ""] if left_out else []
    images += [to / "figure2.png"] if (to / "figure2.png").exists() else []
    parts += [f"![{path.stem}]({path.name})" for path in images]
    write_text(to / "report.md", "\n".join(parts).rstrip() + "\n")
    return [str(to / "report.md"), *map(str, images)]


def mean_and_spread(of_seeds: Sequence[float | None], digits: int = 2) -> str:
    """'78.17 ± 0.57', one value alone, 'n/a' where a value is missing."""
    known = [value for value in of_seeds if value is not None]
    if not known or len(known) < len(of_seeds):
        return "n/a" if of_seeds else ""
    spread = f" ± {stdev(known):.{digits}f}" if len(known) > 1 else ""
    return f"{fmean(known):.{digits}f}{spread}"


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Markdown lines of a table."""
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return [*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows), ""]


# ----------------------------------------------------------------------------------------- beside the paper


def against_the_paper(rows: Rows) -> list[str]:
    """Of every table the cells of the data, imbalances and ratios of which something has run at full length."""
    parts, nothing = ["## Beside the published figures", ""], []
    for name, heading in TABLES.items():
        cells = [(cell, run) for cell in runs.published() if cell["table"] == name for run in runs.runs_of(cell)]
        shown = {row.place for row in rows if any(_stands_beside(row, run) for _, run in cells)}
        cells = [(cell, run) for cell, run in cells if Row(run).place in shown]
        if not cells:
            nothing.append(heading)
            continue
        lines, verdicts = [], []
        for cell, run in cells:
            matching = {row: found for row, found in rows.items() if _stands_beside(row, run)}
            for row in dict.fromkeys([Row(run), *matching]):
                line, verdict = _compared(cell, row, matching.get(row, []), rows)
                lines.append(line)
                verdicts += verdict
        heads = ["data", "type", "ratio", "method", "published", "n", "best", "difference", "last", "difference"]
        heads += ["class mean, last", "limit, best / last", "differs"]
        parts += [f"### {heading}", "", *table(heads, lines), *_about_the_verdicts(verdicts)]
        parts += [*_spreads(rows, {run.dataset for _, run in cells}), *_notes(cells)]
    if nothing:
        parts += ["Of these nothing has run at full length:", "", *(f"- {heading}" for heading in nothing), ""]
    return parts


def _stands_beside(row, run):
    return row.run == run and all(name in records.NUMERICS for name, _ in row.difference)


def _compared(cell, row, found, rows):
    """A line of the table, and a list of its verdict, empty where it is not judged."""
    metric = METRICS[cell["metric"]]
    spread = f" ± {cell['spread']}" if cell["spread"] else ""
    line = [cell["dataset"], cell["imb_type"], cell["ratio"], row.label]
    line.append(f"{cell['value']}{spread} ({cell['whose']}{', top-5' if metric == 'acc5' else ''})")
    if not found:
        return [*line, *[""] * 8], []
    differences, limits = [], []
    for when in ("best", "last"):
        differences.append(fmean(values(found, when, metric)) - cell["value"])
        known = _spread(rows, cell["dataset"], when, metric)
        limits.append(statistics.limit(known, len(found), cell["runs"]) if known else None)
    line.append(len(found))
    for when, difference in zip(("best", "last"), differences, strict=True):
        line += [mean_and_spread(values(found, when, metric)), f"{difference:+.2f}"]
    line.append(mean_and_spread(values(found, "last", "class_mean")))
    if row.difference or not cell["same_experiment"]:
        return [*line, "", "not judged"], []
    verdict = statistics.verdict(differences, limits)
    return [*line, _limits(limits), verdict], [verdict] * (None not in limits)


def _limits(limits):
    return "unknown" if None in limits else " / ".join(f"{limit:.2f}" for limit in limits)


def _spread(rows, dataset, when, metric):
    """The seed spread of a data set at full length, from the rows that are the paper's to the letter."""
    of_it = [found for row, found in rows.items() if row.place[::3] == (dataset, "full") and not row.difference]
    hints = HINTS.get(dataset, []) if metric == "acc1" else []
    return statistics.pooled([values(found, when, metric) for found in of_it], hints)


def _spreads(rows, datasets):
    parts = []
    for dataset in sorted(datasets):
        known = {when: _spread(rows, dataset, when, "acc1") for when in ("best", "last")}
        text = ", ".join(f"{when} {s.value:.2f} ({s.degrees} degrees of freedom)" for when, s in known.items() if s)
        parts += [f"Seed spread of {DATASETS[dataset]}, top-1: {text or 'unknown, no row has two seeds'}.", ""]
    return parts


def _about_the_verdicts(verdicts):
    if not verdicts:
        return []
    expected = statistics.LEVEL * len(verdicts)
    return [f'Compared: {len(verdicts)}. If nothing differed, at most {expected:.2f} false "yes" were expected.', ""]


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
    if not any(Row(run) in rows for run in cells):
        return ["Table 3 (per class, CIFAR-10, ratio 50): nothing has run at full length.", ""]
    lines, names = [], range(10)
    for run, of_run in cells.items():
        found, printed = rows.get(Row(run), []), [cell["value"] for cell in of_run]
        lines.append([run.imb_type, run.method, "published", *printed, f"{fmean(printed):.2f}"])
        for when in ("best", "last") if found else ():
            names = found[0]["classes"]
            ours = [mean_and_spread(of_class, 1) for of_class in zip(*values(found, when, "per_class"), strict=True)]
            lines.append(["", "", f"ours, {when} (n = {len(found)})", *ours])
            lines[-1].append(mean_and_spread(values(found, when, "class_mean")))
    heading = "### Table 3: accuracy of each class, CIFAR-10, ratio 50"
    notes = [(cell, run) for run, of_run in cells.items() for cell in of_run[:1]]
    return [heading, "", *table(["type", "method", "", *names, "mean"], lines), *_notes(notes)]


# ------------------------------------------------------------------------------- what has no published figure


def others(rows: Rows) -> list[str]:
    """Two tables for each data set, imbalance, ratio and protocol: what was reached, and ours against ours."""
    parts = []
    for where in dict.fromkeys(row.place for row in rows):
        here = {row: found for row, found in rows.items() if row.place == where}
        first = next(iter(here.values()))[0]
        parts += [f"## {title(where)}", ""]
        if where[-1] == "short":
            parts += [f"Shortened to {_lengths(here)}: not to be set against published figures.", ""]
        if len(first["class_counts"]) <= 20:
            parts += [f"Training images of each class: {' '.join(map(str, first['class_counts']))}.", ""]
        heads = ["method", "n", "top-1 best", "top-1 last", "top-5 last", "class mean", "many", "medium", "few"]
        parts += table([*heads, "s per epoch"], [_reached(row, found) for row, found in here.items()])
        parts += [f"Class mean and groups are of the last epoch; {first['group_rule']}.", "", *_pairs(here)]
    return parts


def _lengths(here):
    """'40 epochs, a fifth', or '2 of 200 epochs': the records' own against the full length."""
    full = {row: dataclasses.replace(row.run, protocol="full").settings["epochs"] for row in here}
    lengths = sorted({(record["settings"]["epochs"], full[row]) for row, found in here.items() for record in found})
    if all(epochs * runs.SHORTENING["short"] == whole for epochs, whole in lengths):
        return f"{' and '.join(str(epochs) for epochs, _ in lengths)} epochs, a fifth"
    return f"{' and '.join(f'{epochs} of {whole}' for epochs, whole in lengths)} epochs"


def _reached(row, found):
    cells = [row.label, len(found), mean_and_spread(values(found, "best", "acc1"))]
    cells += [
        mean_and_spread(values(found, "last", name)) for name in ("acc1", "acc5", "class_mean", "many", "medium", "few")
    ]
    return [*cells, f"{median(epoch['seconds'] for record in found for epoch in record['history']):.1f}"]


def _pairs(here):
    """IB against each other row, class weights alone against the factor at the size of CE, labelled against plain."""
    at = {row.run.variant: row for row in here if row.run.method == "IB" and not (row.difference or row.run.subset)}
    pairs = [(at[""], row) for row in here if row != at[""]] if "" in at else []
    pairs += [(at["l1-auto"], at["weights-only"])] if {"l1-auto", "weights-only"} <= at.keys() else []
    plain = ((Row(row.run), row) for row in here if row.difference)
    pairs += [pair for pair in plain if pair[0] in here and pair not in pairs]
    lines, verdicts = [], []
    for one, other in pairs:
        by_seed = [{record["settings"]["seed"]: record for record in here[row]} for row in (one, other)]
        seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
        if not seeds:
            continue
        gaps = [[by_seed[0][s][when]["acc1"] - by_seed[1][s][when]["acc1"] for s in seeds] for when in ("best", "last")]
        limits = [statistics.paired_limit(gap) for gap in gaps]
        verdict = statistics.verdict([fmean(gap) for gap in gaps], limits)
        verdicts += [verdict] * (None not in limits)
        means = [f"{fmean(gap):+.2f}" for gap in gaps]
        lines.append([f"{one.label} minus {other.label}", len(seeds), *means, _limits(limits), verdict])
    if not lines:
        return []
    text = "Ours against ours: mean difference of top-1 over the seeds that both have, paired t-test."
    heads = ["", "seeds", "best", "last", "limit, best / last", "differs"]
    return [text, "", *table(heads, lines), *_about_the_verdicts(verdicts)]


# ---------------------------------------------------------------------------------------------- how it was run


def runs_and_commands(rows: Rows) -> list[str]:
    """Every run with its precision, machine, hours and commit; the command behind every row that has one."""
    if not rows:
        return []
    lines, commands = [], []
    for row, found in rows.items():
        if not row.difference:
            commands.append(shlex.join(["python", *row.run.argv("reproduced")]))
        for record in found:
            amp, threads = record["settings"].get("amp", "none"), record["settings"].get("threads")
            hours = sum(epoch["seconds"] for epoch in record["history"]) / 3600
            machine = f"{_parts(record, 'device')}, {threads or 'all'} threads, {record['versions']['machine']}"
            used = [record["versions"], *(part["versions"] for part in record.get("trained_on", ()))]
            in_tf32 = amp == "none" and any(part.get("tf32") == "on" for part in used)  # the convolutions, on a GPU
            precision = "TF32" if in_tf32 else "float32" if amp == "none" else amp
            lines.append(
                [record["name"], record["settings"]["seed"], precision, machine, f"{hours:.2f}", _commit(record)]
            )
    heads = ["run", "seed", "precision", "machine", "hours", "commit"]
    text = "Hours are of all epochs, with those that runs share and that were trained once."
    block = ["```", *commands, "```", ""]
    what = "The command of each row that is a run of the paper or a control, for seed 0:"
    return ["## The runs", "", text, "", *table(heads, lines), *([what, "", *block] if commands else [])]


def _commit(record):
    return _parts(record, "code", _commit_text)


def _commit_text(code):
    return code["commit"][:10] + ("" if code["clean"] else ", with changes") if code else "not recorded"


def _parts(record, name, text=lambda value: value or "not recorded"):
    """What a record says under `name`; of a run of several parts that differ in it, each with its epochs."""
    parts = lengths(record.get("trained_on", []), name, record["epochs_done"])
    if len(parts) < 2:
        return text(record.get(name))
    return ", then ".join(f"{text(value)} ({epochs} epochs)" for value, epochs in parts)
