"""The weights in results/: check them against the records of their runs; make a file of weights to give away.

    python results/weights.py verify --data_dir data
    python results/weights.py verify results/cifar10_lt100/weights/NAME.pth.tar
    python results/weights.py slim checkpoint/NAME/ckpt.best.pth.tar weights.pth.tar

A folder of results holds weights/<run>.pth.tar, which -e of the scripts evaluates, and weights/weights.csv: file,
sha256, record of the run, its top-1 of the last epoch in percent. `slim` leaves out optimizer, history, and the paths
and settings of the machine.
"""

import contextlib
import csv
import hashlib
import io
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import cifar_train
from experiment import checkpoint
from experiment.settings import fields_affecting
from paper import records
from utils import DataError, HelpFormatter, Parser, choose_device, command
from utils import path as file_path

RESULTS = pathlib.Path(__file__).resolve().parent
#: Points of top-1 between evaluation and record: from CPU to CPU; where a GPU is one of the two. Its convolutions are
#: in TF32, so some images at the edge of two classes fall to the other.
TOLERANCE, WITH_GPU = 0.01, 0.05
TABLE = "weights.csv"
#: What of a checkpoint is of no use to others.
LEFT_OUT = ("optimizer", "scaler", "history", "trained_on")


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, prog="weights.py")
    commands = parser.add_subparsers(dest="command", required=True)
    verifying = commands.add_parser("verify", help="evaluate weight files and compare each with its record")
    verifying.add_argument("--data_dir", type=file_path, default="data", help="folder of CIFAR (default: %(default)s)")
    verifying.add_argument(
        "paths", nargs="*", type=pathlib.Path, metavar="FILE|FOLDER", help="default: all of results/"
    )
    slimming = commands.add_parser("slim", help="write a checkpoint's weights alone, to give them away")
    slimming.add_argument("checkpoint", metavar="CHECKPOINT")
    slimming.add_argument("to", type=pathlib.Path, metavar="FILE")
    options = parser.parse_args(argv)
    if options.command == "slim":
        return print(f"written: {slim(options.checkpoint, options.to)}")
    tables = sorted(RESULTS.glob(f"*/weights/{TABLE}"))
    verify(options.paths or [table.parents[1] for table in tables], pathlib.Path(options.data_dir).resolve())


def verify(paths: list[pathlib.Path], data_dir: pathlib.Path) -> None:
    """Evaluate weight files, or all of folders of results, on the test images in `data_dir`; print a line for each.

    Raises:
        DataError: there are none; a file is missing; a checksum does not agree, or a figure by more than TOLERANCE
            (WITH_GPU).
    """
    found = {str(path): _rows(path.resolve()) for path in paths}
    unknown = [path for path, of_path in found.items() if not of_path]
    if unknown or not found:
        raise DataError(f"no weights in {', '.join(unknown) or RESULTS}: {TABLE} names them")
    rows, wrong = [row for of_path in found.values() for row in of_path], 0
    for folder, row in rows:
        agrees, line = check(folder, row, data_dir)
        wrong += not agrees
        print(f"{folder.parent.name}/{row['file']}: {line}", flush=True)
    if wrong:
        raise DataError(f"{wrong} of {len(rows)} weight files do not agree with their records, or were not checked")
    print(f"{len(rows)} of {len(rows)} weight files agree with their records")


def check(folder: pathlib.Path, row: dict[str, str], data_dir: pathlib.Path) -> tuple[bool, str]:
    """Whether a row of weights.csv in `folder` agrees with its record and its file, and a line that says so."""
    path, of_record = folder / row["file"], folder.parent / row["record"]
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != row["sha256"]:
        return False, "the file is missing or its sha256 differs"
    try:
        record = records.load(of_record)
    except ValueError as error:
        return False, f"{of_record}: {error}"
    expected = float(row["acc1_last"])
    if record is None or abs(record["last"]["acc1"] - expected) > TOLERANCE:
        return False, f"{row['record']} has another top-1 than the table"
    printed, flags = io.StringIO(), ["--data_dir", str(data_dir), "--resume", str(path), "-e"]
    with tempfile.TemporaryDirectory() as out:
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
                accuracy = cifar_train.main([*flags, "--root_log", out])["acc1"]
        except SystemExit as stop:
            if stop.code not in (1, 2):  # Ctrl-C or SIGTERM, which are for this command too
                raise
            return False, printed.getvalue().strip().splitlines()[-1]
    with_gpu = record["device"] != "cpu" or choose_device().type == "cuda"
    if round(abs(accuracy - expected), 4) > (WITH_GPU if with_gpu else TOLERANCE):
        return False, f"top-1 {accuracy:.2f}, the record has {expected:.2f}"
    compared = f" (the record, on {record['device']}: {expected:.2f})" if with_gpu else ""
    return True, f"ok, {accuracy:.2f}{compared}"


def _rows(path):
    """(folder of weights, row of its weights.csv) for a weight file, or for every one of a folder of results."""
    folder = path / "weights" if path.is_dir() else path.parent
    table = folder / TABLE
    if not table.exists():
        return []
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    return [(folder, row) for row in rows if path.is_dir() or row["file"] == path.name]


def slim(path: str, to: pathlib.Path) -> pathlib.Path:
    """Write a checkpoint without its optimizer, history, and settings of the machine. `-e` and `--pretrained` take it.

    Raises:
        DataError: `path` is no checkpoint, or `to` exists.
    """
    if to.exists():
        raise DataError(f"{to} exists already: choose another name")
    state = checkpoint.load(path)
    places = (*fields_affecting("nothing", "rounding"), "train_list", "val_list", "pretrained")
    content = {name: value for name, value in state.items() if name not in LEFT_OUT}
    kept = {name: value for name, value in state.get("settings", {}).items() if name not in places}
    if kept:
        content["settings"] = {**kept, "exp_str": "weights"}
    if state.get("forced"):
        content["forced"] = ["--force"]  # what it passed over may name files
    checkpoint.save(str(to), content)
    return to


if __name__ == "__main__":
    main()
