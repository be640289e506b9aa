"""Memory and open files of a long run: python tests/faults/soak.py --epochs 1000

A thousand epochs of a small model on the digits in one process, with logs, TensorBoard and checkpoints.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "helpers"))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

import script_runner

import cifar_train
import models
from experiment.records import Records


def measure():
    """(resident memory in MB, open files) of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    resident = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return round(int(resident.split()[1]) / 1024, 1), len(os.listdir("/proc/self/fd"))


def soak(epochs, at):
    """{epoch: (MB, files)} after each of the epochs `at`."""
    models.CIFAR_MODELS["tiny"] = script_runner.tiny
    figures, add = {}, Records.add

    def noting(records, record):
        add(records, record)
        if record["epoch"] + 1 in at:
            figures[record["epoch"] + 1] = measure()

    Records.add = noting
    flags = ["--epochs", epochs, "--milestones", epochs - 1, "--start_ib_epoch", epochs // 2, "-p", 1000]
    flags += ["--loss_type", "IB", "--train_rule", "IBReweight", "--lr", "0.01"]
    with tempfile.TemporaryDirectory() as folder:
        roots = ["--root_log", f"{folder}/log", "--root_model", f"{folder}/checkpoint"]
        cifar_train.main([str(flag) for flag in [*script_runner.DIGITS, *script_runner.TINY, *flags, *roots]])
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=1000)
    options = parser.parse_args()
    print(json.dumps(soak(options.epochs, {50, options.epochs})), file=sys.stderr)
