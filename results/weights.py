"""The weights in results/: check them against the records of their runs, or add those of a finished run.

    python results/weights.py verify --data_dir data
    python results/weights.py add results/cifar10_lt100 reproduced/checkpoint/NAME/ckpt.pth.tar

A folder of results holds weights/<run>.pth.tar, which -e of the scripts evaluates, and weights/weights.csv: file,
sha256, record of the run, its top-1 of the last epoch in percent.
"""

import csv
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile

RESULTS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(RESULTS.parent))

from experiment import checkpoint  # noqa: E402
from experiment.resume import settings_of_checkpoint  # noqa: E402
from files import write_text  # noqa: E402
from paper import records  # noqa: E402
from utils import DataError, HelpFormatter, Parser, choose_device, command  # noqa: E402

#: Points of top-1 between evaluation and record: from CPU to CPU; where a GPU is one of the two. Its convolutions are
#: in TF32, so some images at the edge of two classes fall to the other.
TOLERANCE, WITH_GPU = 0.01, 0.05
TABLE, COLUMNS = "weights.csv", ("file", "sha256", "record", "acc1_last")
#: What a weight file has of its checkpoint; settings and classes are the record's.
KEPT = ("epoch", "arch", "state_dict", "split_sha256")


@command
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__, formatter_class=HelpFormatter, prog="weights.py")
    commands = parser.add_subparsers(dest="command", required=True)
    verifying = commands.add_parser("verify", help="evaluate every weight file and compare with its record")
    verifying.add_argument("--data_dir", default="data", help="folder of CIFAR (default: %(default)s)")
    verifying.add_argument("folders", nargs="*", type=pathlib.Path, metavar="FOLDER", help="default: all of results/")
    adding = commands.add_parser("add", help="add the weights of finished runs whose records are in FOLDER")
    adding.add_argument("folder", type=pathlib.Path, metavar="FOLDER")
    adding.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="the last epoch's, ckpt.pth.tar")
    options = parser.parse_args(argv)
    if options.command == "verify":
        return verify(options.folders or sorted(RESULTS.glob("*/")), pathlib.Path(options.data_dir).resolve())
    for path in options.checkpoints:
        print(f"written: {add(options.folder, path)}")


# ------------------------------------------------------------------------------------------------- verify


def verify(folders: list[pathlib.Path], data_dir: pathlib.Path) -> None:
    """Evaluate the weights of `folders` on the test images in `data_dir`; print a line for each file.

    Raises:
        DataError: there are none; a file is missing; a checksum does not agree, or a figure by more than TOLERANCE
            (WITH_GPU).
    """
    tables = [folder / "weights" / TABLE for folder in folders if (folder / "weights" / TABLE).exists()]
    rows = [(table.parent, row) for table in tables for row in _rows(table)]
    if not rows:
        raise DataError(f"no weights in {', '.join(map(str, folders))}")
    wrong = 0
    for folder, row in rows:
        agrees, line = check(folder, row, data_dir)
        wrong += not agrees
        print(f"{folder.parent.name}/{row['file']}: {line}", flush=True)
    if wrong:
        raise DataError(f"{wrong} of {len(rows)} weight files do not agree with their records")
    print(f"{len(rows)} of {len(rows)} weight files agree with their records")


def check(folder: pathlib.Path, row: dict[str, str], data_dir: pathlib.Path) -> tuple[bool, str]:
    """Whether a row of weights.csv in `folder` agrees with its record and its file, and a line that says so."""
    path = folder / row["file"]
    if not path.exists() or _sha256(path) != row["sha256"]:
        return False, "the file is missing or its sha256 differs"
    try:
        record = _record(folder.parent / row["record"])
    except DataError as error:
        return False, str(error)
    expected = float(row["acc1_last"])
    if abs(record["last"]["acc1"] - expected) > TOLERANCE:
        return False, f"{row['record']} has another top-1 than the table"
    with tempfile.TemporaryDirectory() as out:
        script = [sys.executable, str(RESULTS.parent / "cifar_train.py"), "--data_dir", str(data_dir)]
        done = subprocess.run([*script, "--root_log", out, "--resume", str(path), "-e"], capture_output=True, text=True)
        found = list(pathlib.Path(out).rglob("evaluation.json"))
        if done.returncode or not found:
            return False, (done.stderr.strip().splitlines() or ["no evaluation"])[-1]
        accuracy = json.loads(found[0].read_text())["acc1"]
    with_gpu = record["device"] != "cpu" or choose_device().type == "cuda"
    if round(abs(accuracy - expected), 4) > (WITH_GPU if with_gpu else TOLERANCE):
        return False, f"top-1 {accuracy:.2f}, the record has {expected:.2f}"
    return True, f"ok, {accuracy:.2f}" + with_gpu * f" (the record, on {record['device']}: {expected:.2f})"


# ---------------------------------------------------------------------------------------------------- add


def add(folder: pathlib.Path, path: str) -> pathlib.Path:
    """Write the weights of a run's last checkpoint, without optimizer and history, to `folder`/weights.

    Raises:
        DataError: `folder` has no record of the run, or the checkpoint is not of the record's last epoch.
    """
    state = checkpoint.load(path)
    settings = settings_of_checkpoint(state, path)
    if settings is None or not state.get("history"):
        raise DataError(f"{path} records no settings or no history: it is no run of this repository")
    name = settings.name
    record = _record(folder / f"{name}.json")
    if record.get("split", {}).get("sha256") != state.get("split_sha256"):
        raise DataError(f"{folder / name}.json is not the record of {path}")
    last = records.rounded(state["history"][-1]["test"]["acc1"])
    if (state["epoch"], last) != (record["epochs_done"], record["last"]["acc1"]):
        raise DataError(f"{path} is not of the last epoch of {folder / name}.json")
    content = {part: state[part] for part in KEPT if part in state}
    content["settings"] = {**record["settings"], "exp_str": settings.exp_str}
    content |= {"classes": record["classes"], "class_counts": record["class_counts"]}
    weights = folder / "weights"
    weights.mkdir(exist_ok=True)
    file = weights / f"{name}.pth.tar"
    checkpoint.save(str(weights), [file.name], content)
    row = {"file": file.name, "sha256": _sha256(file), "record": f"{name}.json", "acc1_last": f"{last:.2f}"}
    others = [other for other in _rows(weights / TABLE) if other["file"] != file.name]
    rows = sorted([*others, row], key=lambda row: row["file"])
    lines = [",".join(COLUMNS), *(",".join(row[column] for column in COLUMNS) for row in rows)]
    write_text(weights / TABLE, "\n".join(lines) + "\n")
    return file


def _record(path):
    """The record of a finished run in a file; raises DataError where it holds none."""
    try:
        record = records.load(path)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from None
    if record is None:
        raise DataError(f"{path} is not the record of a run")
    return record


def _rows(table):
    """The rows of a weights.csv as dicts, none where there is no file; raises DataError for a row of another form."""
    if not table.exists():
        return []
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        try:
            float(row["acc1_last"])
            is_row = tuple(row) == COLUMNS and all(row.values())
        except (KeyError, TypeError, ValueError):
            is_row = False
        if not is_row:
            raise DataError(f"{table}, line {number}: not a row of {','.join(COLUMNS)}")
    return rows


def _sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    main()
