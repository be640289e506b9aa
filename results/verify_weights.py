"""Evaluate every committed weight file and compare it with the record of its run: `make verify-weights DATA=DIR`.

    python results/verify_weights.py --data_dir data

Reads results/*/weights/weights.csv: file, sha256, record, top-1 of the last epoch in percent. Exit status 1 where
there is no weights.csv, a file is missing, or a checksum or a figure does not agree to 0.01.
"""

import argparse
import csv
import hashlib
import json
import pathlib
import subprocess
import sys
import tempfile

RESULTS = pathlib.Path(__file__).resolve().parent
TOLERANCE = 0.01


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", default="data", help="folder of CIFAR (default: %(default)s)")
    data_dir = pathlib.Path(parser.parse_args().data_dir).resolve()
    tables = sorted(RESULTS.glob("*/weights/weights.csv"))
    if not tables:
        print("verify_weights.py: no weights.csv in results/", file=sys.stderr)
        return 1
    wrong = 0
    for table in tables:
        with open(table, newline="") as file:
            for row in csv.DictReader(file):
                problem = check(table.parent, row, data_dir)
                wrong += problem is not None
                print(f"{table.parent.parent.name}/{row['file']}: {problem or 'ok, ' + row['acc1_last']}", flush=True)
    print(f"{wrong} of {len(tables)} tables disagree" if wrong else f"all weights of {len(tables)} tables agree")
    return 1 if wrong else 0


def check(folder: pathlib.Path, row: dict[str, str], data_dir: pathlib.Path) -> str | None:
    """What is wrong with a row of weights.csv, or None."""
    path = folder / row["file"]
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != row["sha256"]:
        return "the file is missing or its sha256 differs"
    with tempfile.TemporaryDirectory() as out:
        command = [
            sys.executable,
            str(RESULTS.parent / "cifar_train.py"),
            "--data_dir",
            str(data_dir),
            "--root_log",
            out,
        ]
        done = subprocess.run([*command, "--resume", str(path), "-e"], capture_output=True, text=True)
        found = list(pathlib.Path(out).rglob("evaluation.json"))
        if done.returncode or not found:
            return (done.stderr.strip().splitlines() or ["no evaluation"])[-1]
        accuracy = json.loads(found[0].read_text())["acc1"]
    expected = float(row["acc1_last"])
    return None if abs(accuracy - expected) <= TOLERANCE else f"top-1 {accuracy:.2f}, the record has {expected:.2f}"


if __name__ == "__main__":
    sys.exit(main())
