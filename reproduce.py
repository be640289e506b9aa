"""Reproduce the paper's tables: list the runs behind them, run them, set what came out beside the published figures.

    python reproduce.py list --table 4
    python reproduce.py run --dataset digits --ratio 100 --method CE IB --protocol short --threads 1
    python reproduce.py report reproduced/results

The first prints the 116 commands of the main table; the second trains two short runs on the digits, which need no
download, in some minutes, their first half once; the third writes report.md and figures. The selection is the same
for list and run; flags after `--` go to the training scripts.
"""

import argparse
import contextlib
import json
import os
import shlex
from collections.abc import Sequence

from paper import runs
from utils import DataError, HelpFormatter, Parser, UsageError, command, number

CIFAR_RATIOS = (200, 100, 50, 20, 10)
#: The largest --seed and --rand_number that the scripts take.
MAX_SEED, MAX_SUBSET = 2**31 - 1, 2**32 - 1


def build_parser() -> argparse.ArgumentParser:
    """The flags of the three subcommands."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, prog="reproduce.py")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="print the runs as commands, one a line")
    _add_selection(listing)
    listing.add_argument("--json", action="store_true", help="as JSON, with what each run is and shares")
    running = commands.add_parser("run", help="train them; finished ones are skipped, broken ones continue")
    _add_selection(running)
    _add_execution(running)
    report = commands.add_parser("report", help="Markdown and figures from what has run")
    report.add_argument("folders", nargs="+", metavar="FOLDER", help="folders with records of runs")
    report.add_argument("--to", metavar="DIR", help="where report.md and figures go (default: the first folder)")
    report.add_argument(
        "--influence", nargs=2, metavar=("BALANCED", "LONG_TAILED"),
        help="Fig. 2 from two checkpoints: the same model trained on balanced and on long-tailed data",
    )  # fmt: skip
    report.add_argument("--data_dir", default="./data", help="data of the two checkpoints (default: %(default)s)")
    return parser


def _add_selection(parser):
    group = parser.add_argument_group("selection (without a table, figure or control: every combination)")
    add = group.add_argument
    add("--table", nargs="+", type=int, choices=range(1, 7), default=[], metavar="1..6", help="cells of the paper")
    add("--figure", nargs="+", type=int, choices=(2, 3), default=[], metavar="2|3", help="runs behind a figure")
    add(
        "--control", nargs="+", choices=list(runs.CONTROLS), default=[],
        help="what the paper lacks, for the data and ratios given. ib-lr: CE with the lr of the IB phase; l1-auto: "
        "the IB loss at the size of CE; weights-only: class weights without the factor, at the size of CE; "
        "weights-at-ib: the same at the size of the IB loss; detached: no gradient through the factor",
    )  # fmt: skip
    add("--dataset", nargs="+", choices=list(runs.SETUPS))
    add("--imb_type", nargs="+", choices=("exp", "step", "none"))
    add("--ratio", nargs="+", type=number(int, low=1), metavar="R", help="largest class over smallest")
    add("--method", nargs="+", choices=list(runs.METHODS))
    add("--seeds", nargs="+", type=number(int, low=0, high=MAX_SEED), default=[0], metavar="N", help="default: 0")
    add(
        "--subsets", nargs="+", type=number(int, low=0, high=MAX_SUBSET), default=[0], metavar="N",
        help="--rand_number (default: 0)",
    )  # fmt: skip
    add("--protocol", choices=list(runs.SHORTENING), default="full", help="short: every length divided by five")
    add(
        "--out", default="reproduced", metavar="DIR",
        help="folder of logs and checkpoints (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("extra", nargs="*", metavar="-- FLAGS", help="flags for every training script")


def _add_execution(parser):
    group = parser.add_argument_group("execution")
    add = group.add_argument
    add("--results", metavar="DIR", help="a small record of each finished run (default: OUT/results)")
    add(
        "--jobs", type=number(int, low=1), metavar="N",
        help="runs at a time, spread over the GPUs (default: one a GPU, 1 without; with Ray, as many as fit)",
    )  # fmt: skip
    add("--gpus", type=number(int, low=0), metavar="N", help="GPUs to use (default: all that are there)")
    add(
        "--part", type=_part, metavar="I/N",
        help="of the runs' families, which share epochs, the I-th of N parts: for machines without a common driver",
    )  # fmt: skip
    add("--threads", type=number(int, low=1), default=1, metavar="T", help="CPU threads each (default: %(default)s)")
    add("--executor", choices=("local", "ray"), default="local", help="default: %(default)s")
    add("--address", metavar="HOST:PORT", help="of the Ray cluster (default: a new one on this machine)")
    add("--gpus_per_run", type=number(float, low=0), default=0, metavar="F", help="Ray: share of a GPU (default: 0)")


def _part(text):
    """'2/5' as (2, 5)."""
    index, parts = map(int, text.split("/"))
    if not 1 <= index <= parts:
        raise argparse.ArgumentTypeError(f"{text} is not allowed: the first part of five is 1/5")
    return index, parts


def select(options: argparse.Namespace) -> list[runs.Run]:
    """The Runs that the options ask for, each once, in the paper's order.

    Raises:
        UsageError: there is none.
    """
    datasets, imb_types = options.dataset or ["cifar10"], options.imb_type or ["exp"]
    if set(datasets) & set(runs.NATURAL) and options.imb_type not in (None, ["none"]):
        raise UsageError("inaturalist is trained as it is: leave out --imb_type, or give --imb_type none")
    wanted = {name: getattr(options, name) for name in ("dataset", "imb_type", "method")}
    cells = [run for table in options.table for run in runs.cells_of_table(table)]
    cells = [run for run in cells if not options.ratio or run.ratio in options.ratio]
    for figure in options.figure:
        cells += runs.cells_of_figure(figure, datasets, options.ratio or ())
    cells = [run for run in cells if all(not of or getattr(run, name) in of for name, of in wanted.items())]
    if options.control:
        names = [name for name in options.control if runs.CONTROLS[name] in (options.method or runs.METHODS)]
        cells += runs.controls(names, runs.grid(datasets, imb_types, options.ratio or [100], ["CE"]))
    if not (options.table or options.figure or options.control):
        cells = runs.grid(datasets, imb_types, options.ratio or CIFAR_RATIOS, options.method or list(runs.METHODS))
    if not cells:
        raise UsageError("no run is all of that: leave out one of the restrictions")
    return list(dict.fromkeys(runs.spread_over(cells, options.seeds, options.subsets, options.protocol)))


def list_runs(options: argparse.Namespace) -> None:
    """Print the commands; each is complete in itself and continues where it was stopped."""
    chosen, out = select(options), options.out
    shared = {run: run.fork_epoch for run in chosen}
    if options.extra:  # the check imports torch
        from paper import driver, records

        driver.check_extra(chosen, options.extra)
        asked = {run: records.command_settings(run, tuple(options.extra)) for run in chosen}
        shared = {run: run.fork_epoch_with(vars(settings)) for run, settings in asked.items()}
    lines = [["python", *run.argv(out), "--resume", "auto", *options.extra] for run in chosen]
    if not options.json:
        with contextlib.suppress(BrokenPipeError):  # `| head`
            print("\n".join(shlex.join(line) for line in lines), flush=True)
        return
    content = [
        {
            "name": run.name, "dataset": run.dataset, "imb_type": run.imb_type, "ratio": run.ratio,
            "method": run.method, "variant": run.variant, "seed": run.seed, "subset": run.subset,
            "protocol": run.protocol, "command": line, "shared_epochs_with": run.trunk.name,
            "shared_epochs": shared[run],
        }
        for run, line in zip(chosen, lines, strict=True)
    ]  # fmt: skip
    print(json.dumps(content, indent=1))


def run_runs(options: argparse.Namespace) -> None:
    """Train what is chosen; DataError at the end if runs failed."""
    from files import run_lock
    from paper import driver

    chosen, lock = select(options), options.out
    if options.part:
        chosen = runs.part_of(chosen, *options.part)
        lock = os.path.join(options.out, "part{}of{}".format(*options.part))
    if options.executor == "ray" and options.gpus is not None:
        raise UsageError("--gpus is for this machine: with --executor ray say --gpus_per_run")
    if options.executor != "ray" and (options.address is not None or options.gpus_per_run):
        raise UsageError("--address and --gpus_per_run need --executor ray")
    driver.check_extra(chosen, options.extra)
    with run_lock(lock, patience=0):  # one driver at a time
        work = driver.Driver(
            chosen, options.out, options.results or os.path.join(options.out, "results"), _executor(options, lock),
            options.extra, options.threads,
        )  # fmt: skip
        failed = work.run()
    print(work.view.status())
    for run in failed:
        print(f"failed: {run.name}: {_last_line(work.output(run))} ({work.output(run)})")
    if failed:
        raise DataError(f"{len(failed)} of {len(chosen)} runs failed; the same command tries them again")


def _executor(options, folder):
    from paper import executors

    if options.executor == "ray":
        return executors.Ray(options.address, options.threads, options.gpus_per_run, options.jobs)
    cards = executors.visible_cards()
    if options.gpus is not None and options.gpus > len(cards):
        raise UsageError(f"--gpus {options.gpus}: this machine has {len(cards)}")
    cards = cards[: options.gpus]
    return executors.Local(options.jobs or len(cards) or 1, options.threads, cards, folder)


def _last_line(path):
    if not path.exists():
        return "not started"
    lines = path.read_text(errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "no output")


def write_report(options: argparse.Namespace) -> None:
    """report.md and figures; prints where they are."""
    from paper import report

    to, written = options.to or options.folders[0], []
    missing = [folder for folder in options.folders if not os.path.isdir(folder)]
    if missing:
        raise DataError(f"no folder {missing[0]}")
    if options.influence:
        from paper import influence

        os.makedirs(to, exist_ok=True)
        balanced, long_tailed = options.influence
        written += influence.draw(balanced, long_tailed, options.data_dir, to)
    written += report.write(options.folders, to)
    print("written: " + " ".join(written))


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    {"list": list_runs, "run": run_runs, "report": write_report}[options.command](options)


if __name__ == "__main__":
    main()
