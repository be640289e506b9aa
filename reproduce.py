"""Reproduce the paper's tables: list the runs behind them, run them, set what came out beside the published figures.
Compare methods on your own images.

    python reproduce.py list --table 4
    python reproduce.py run --dataset digits --ratio 100 --method CE IB --protocol short --threads 1
    python reproduce.py run --dataset folder --method CE BS cRT IB --seeds 0 1 -- --data_dir DIR -a resnet18
    python reproduce.py report reproduced/results

The first prints the 116 commands of the main table; the second trains two short runs on the digits, which need no
download, in some minutes, their first half once; the third trains four methods with two seeds each on a folder of
images, as folder_train.py does; the last writes report.md and figures. The selection is the same for list and run;
flags after `--` go to the training scripts. --method also takes the name of any registered loss or rule, or LOSS+RULE.
"""

import argparse
import contextlib
import dataclasses
import io
import os
import shlex
import sys
from collections.abc import Sequence

from imbalance import IMB_TYPES
from paper import runs
from utils import DataError, HelpFormatter, Parser, UsageError, command, named, number, path

CIFAR_RATIOS = (200, 100, 50, 20, 10)
#: The largest --seed and --rand_number that the scripts take.
MAX_SEED, MAX_SUBSET = 2**31 - 1, 2**32 - 1


def build_parser() -> argparse.ArgumentParser:
    """The flags of the three subcommands."""
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, prog="reproduce.py")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list", help="print the runs as commands, one a line")
    _add_selection(listing)
    running = commands.add_parser("run", help="train them; finished ones are skipped, broken ones continue")
    _add_selection(running)
    _add_execution(running)
    report = commands.add_parser("report", help="Markdown and figures from what has run")
    report.add_argument("folders", nargs="+", metavar="FOLDER", help="folders with records of runs")
    report.add_argument(
        "--to", type=path, metavar="DIR", help="where report.md and figures go (default: the first folder)"
    )
    report.add_argument(
        "--influence", nargs=2, metavar=("BALANCED", "LONG_TAILED"),
        help="Fig. 2 from two checkpoints: the same model trained on balanced and on long-tailed data",
    )  # fmt: skip
    report.add_argument("--data_dir", default="./data", help="data of the two checkpoints (default: %(default)s)")
    report.add_argument(
        "--margin", type=number(float, above=0), default=1.0, metavar="M",
        help="points within which ours agrees with a published figure (default: %(default)s)",
    )  # fmt: skip
    report.add_argument("--all_pairs", action="store_true", help="compare every two rows, not only with CE and IB")
    report.add_argument("--csv", action="store_true", help="write report.csv too, a line a row")
    report.add_argument("--latex", action="store_true", help="write report.tex too, a table a data set")
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
        "weights-at-ib: the same at the size of the IB loss; detached: no gradient through the factor; "
        "factor: the nine arms of docs/factor.md; or one of them",
    )  # fmt: skip
    add(
        "--dataset", nargs="+", metavar="NAME",
        help=f"{', '.join(runs.SETUPS)}, a data set of your own in imbalance_cifar.DATASETS, or folder: the images in "
        "--data_dir, which stands with the other flags of folder_train.py after --",
    )  # fmt: skip
    add("--imb_type", nargs="+", choices=IMB_TYPES)
    add("--ratio", nargs="+", type=number(int, low=1), metavar="R", help="largest class over smallest")
    add(
        "--method", nargs="+", metavar="NAME",
        help=f"{', '.join(runs.METHODS)}, or a loss, a rule or LOSS+RULE of training/registry.py",
    )  # fmt: skip
    add("--seeds", nargs="+", type=number(int, low=0, high=MAX_SEED), default=[0], metavar="N", help="default: 0")
    add(
        "--subsets", nargs="+", type=number(int, low=0, high=MAX_SUBSET), default=[0], metavar="N",
        help="--rand_number (default: 0)",
    )  # fmt: skip
    add("--protocol", choices=list(runs.SHORTENING), default="full", help="short: every length divided by five")
    add(
        "--out", type=path, default="reproduced", metavar="DIR",
        help="folder of logs and checkpoints (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("extra", nargs="*", metavar="-- FLAGS", help="flags for every training script")


def _add_execution(parser):
    group = parser.add_argument_group("execution")
    add = group.add_argument
    add("--results", type=path, metavar="DIR", help="a small record of each finished run (default: OUT/results)")
    add(
        "--jobs", type=number(int, low=1), metavar="N",
        help="runs at a time, spread over the GPUs (default: one a GPU, 1 without; with Ray, as many as fit)",
    )  # fmt: skip
    add("--gpus", type=number(int, low=0), metavar="N", help="GPUs to use (default: all of this machine's)")
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
    _resolve(options)
    datasets, imb_types = options.dataset or ["cifar10"], options.imb_type or ["exp"]
    if set(datasets) & set(runs.NATURAL) and options.imb_type not in (None, ["none"]):
        raise UsageError("inaturalist is trained as it is: leave out --imb_type, or give --imb_type none")
    if options.ratio and not options.table and (imb_types == ["none"] or set(datasets) <= set(runs.NATURAL)):
        raise UsageError("--ratio needs --imb_type exp or step: the imbalance is the data's own")
    wanted = {name: getattr(options, name) for name in ("dataset", "imb_type", "method")}
    cells = [run for table in options.table for run in runs.cells_of_table(table)]
    cells = [run for run in cells if not options.ratio or run.ratio in options.ratio]
    for figure in options.figure:
        cells += runs.cells_of_figure(figure, datasets, options.ratio or ())
    foreign = sorted({*(options.method or ())} - {run.method for run in cells})
    if cells and foreign:
        raise UsageError(f"--method {named(foreign)}: the table or figure has no such run")
    cells = [run for run in cells if all(not of or getattr(run, name) in of for name, of in wanted.items())]
    if not (options.table or options.figure) and (options.method or not options.control):
        is_one = options.control or set(datasets) & runs.OWN_SETUPS.keys()
        ratios = options.ratio or ([100] if is_one else CIFAR_RATIOS)
        cells = runs.grid(datasets, imb_types, ratios, options.method or list(runs.METHODS))
    if options.control:
        cells += runs.controls(options.control, runs.grid(datasets, imb_types, options.ratio or [100], ["CE"]))
    if not cells:
        raise UsageError("no run is all of that: leave out one of the restrictions")
    return list(dict.fromkeys(runs.spread_over(cells, options.seeds, options.subsets, options.protocol)))


def _resolve(options):
    """Make the folder, own data sets and own methods known, and put their names in the paper's form.

    Raises:
        UsageError: a name that nothing has.
    """
    if options.dataset and "folder" in options.dataset:
        _add_folder(options)
    for name in set(options.dataset or ()) - {*runs.SETUPS, *runs.OWN_SETUPS}:
        import imbalance_cifar

        if name not in imbalance_cifar.DATASETS:
            known = ", ".join(dict.fromkeys([*runs.SETUPS, *imbalance_cifar.DATASETS, "folder"]))
            raise UsageError(f"--dataset {name}: choose from {known}")
        runs.OWN_SETUPS[name] = dataclasses.replace(runs.CIFAR, largest=10**9)  # trained as CIFAR is
    options.method = options.method and [_method(name) for name in options.method]


def _method(name):
    """'cRT' is CE+cRT, 'BS+DRW' a loss and a rule of the registry; of those, the name that the paper's tables have."""
    if name in runs.METHODS:
        return name
    from training import registry  # imports torch

    loss, rule = runs.pair_of(f"CE+{name}" if name in registry.RULES else name)
    if loss not in registry.LOSSES or rule not in registry.RULES:
        known = ", ".join([*runs.METHODS, *(n for n in registry.LOSSES if n not in runs.METHODS)])
        rules = ", ".join(registry.RULES)
        raise UsageError(f"--method {name}: choose from {known}, a rule ({rules}), or LOSS+RULE")
    return runs.name_of_method(loss, rule)


#: Flags of folder_train.py that a run of it names itself.
NAMED_BY_RUN = {"dataset", *runs.Setup.__dataclass_fields__}


def _add_folder(options):
    """Add the folder of --data_dir as a data set; what its runs name themselves leaves the flags after --."""
    from experiment import parser
    from experiment.settings import FIELDS

    if options.dataset != ["folder"] or options.table or options.figure:
        raise UsageError("--dataset folder cannot be combined with another data set, --table or --figure")
    said = io.StringIO()  # warnings about lengths that the runs set; each run says its own
    try:
        with contextlib.redirect_stderr(said):
            settings = parser.parse("folder_train.py", options.extra)
    except BaseException:
        print(said.getvalue(), end="", file=sys.stderr)
        raise
    if "data_dir" not in settings.given:
        raise UsageError("--dataset folder needs -- --data_dir DIR")
    if settings.given & {"imb_type", "imb_factor"}:
        raise UsageError("--imb_type and --imb_factor: with --dataset folder give --imb_type and --ratio before --")
    if settings.dataset in runs.SETUPS:
        raise UsageError(f"{settings.dataset} is a data set of the paper: name this one with --dataset NAME after --")
    runs.OWN_SETUPS[settings.dataset] = runs.folder_setup(settings)
    options.dataset = [settings.dataset]
    options.imb_type = options.imb_type or ["none"]
    extra = []
    for name in sorted(settings.given - NAMED_BY_RUN):
        value = getattr(settings, name)
        if value is None:  # --pretrained none
            continue
        many = value if isinstance(value, tuple) else (value,)
        extra += [FIELDS[name].metadata["flags"][-1], *([] if isinstance(value, bool) else map(str, many))]
    options.extra = extra


def list_runs(options: argparse.Namespace) -> None:
    """Print the commands; each is complete in itself and continues where it was stopped."""
    chosen = select(options)
    if options.extra:  # the check imports torch
        from paper import driver

        driver.check_extra(chosen, options.extra)
    for run in chosen:
        print(shlex.join(["python", *run.argv(options.out, ["--resume", "auto", *options.extra])]), flush=True)


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
    results = options.results or os.path.join(options.out, "results")
    with run_lock(lock, patience=0):  # one driver at a time
        executor = _executor(options, lock)
        work = driver.Driver(chosen, options.out, results, executor, options.extra)
        print(work.announcement(), flush=True)
        failed = work.run()
    print(work.status())
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
    local = executors.Local(options.jobs or len(cards) or 1, options.threads, cards, folder)
    if options.gpus == 0:
        local.variables["CUDA_VISIBLE_DEVICES"] = ""
    return local


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
        written.append(influence.write(balanced, long_tailed, options.data_dir, to))
    written += report.write(options.folders, to, options.margin, options.csv, options.latex, options.all_pairs)
    print("written: " + " ".join(written))


@command
def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    {"list": list_runs, "run": run_runs, "report": write_report}[options.command](options)


if __name__ == "__main__":
    main()
