"""Print the runs of a results folder as a Markdown table.

    python results/table.py results/cifar10_lt100_short
    python results/table.py log

Reads every <folder>/<run>/summary.json, in the order in which the paper names the methods.
"""

import json
import pathlib
import statistics
import sys

METHODS = {
    ("CE", "None"): "CE",
    ("IB", "IBReweight"): "IB",
    ("IB", "CBReweight"): "IB+CB",
    ("IBFocal", "IBReweight"): "IB+Focal",
}


def method(settings):
    """The paper's name of a method, or loss + rule."""
    key = (settings["loss_type"], settings["train_rule"])
    return METHODS.get(key, " + ".join(key))


def figure(value):
    return "n/a" if value is None else f"{value:.2f}"


def row(summary):
    best, last = summary["best"], summary["last"]
    seconds = statistics.median(record["seconds"] for record in summary["history"])
    cells = [
        method(summary["settings"]),
        f"{best['acc1']:.2f} (epoch {best['epoch'] + 1})",
        f"{last['acc1']:.2f}",
        f"{best['acc5']:.2f} / {last['acc5']:.2f}",
        *[figure(last[name]) for name in ("class_mean", "many", "medium", "few")],
        f"{seconds:.0f}",
        str(summary["settings"]["seed"]),
    ]
    return "| " + " | ".join(cells) + " |"


def main(folder):
    summaries = [json.loads(path.read_text()) for path in pathlib.Path(folder).glob("*/summary.json")]
    order = list(METHODS.values())
    summaries.sort(key=lambda s: (order.index(m) if (m := method(s["settings"])) in order else len(order), s["name"]))
    heads = ["method", "top-1 best", "top-1 last", "top-5 best / last", "class mean", "many", "medium", "few"]
    print("| " + " | ".join([*heads, "s per epoch", "seed"]) + " |")
    print("|" + "---|" * (len(heads) + 2))
    for summary in summaries:
        print(row(summary))


if __name__ == "__main__":
    main(*sys.argv[1:] or ["log"])
