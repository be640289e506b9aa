"""Run cifar_train.py as its user does: as a process, or in this process through main(argv), on one CPU thread."""

import contextlib
import csv
import functools
import hashlib
import io
import os
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import torch
from torch import nn

import cifar_train
import imbalance_cifar
import models
import reproduce
from experiment import plots
from losses import row_norm

REPOSITORY = Path(__file__).resolve().parent.parent.parent
SCRIPT = REPOSITORY / "cifar_train.py"

#: 309 training images of long-tailed digits, no download.
DIGITS = ["--dataset", "digits", "--threads", "1", "--seed", "0", "--batch-size", "64"]
#: Two epochs, the second one with the IB loss, the DRW weights and the lower lr.
TWO_EPOCHS = [*DIGITS, "--epochs", "2", "--start_ib_epoch", "1", "--drw_epoch", "1", "--milestones", "1"]
#: For runs in this process: a model that takes milliseconds an epoch.
TINY = ["--arch", "tiny"]
#: Four epochs, the last two with the IB loss.
FOUR = [*DIGITS, *TINY, "--epochs", "4", "--start_ib_epoch", "2", "--milestones", "3", "--loss_type", "IB"]
#: Five epochs, the last three with the IB loss where one is asked for.
EPOCHS, START = 5, 2
FIVE = [*DIGITS, "--epochs", EPOCHS, "--start_ib_epoch", START, "--drw_epoch", "3", "--milestones", "4"]


class TinyModel(nn.Module):
    """A convolution, a batch norm and a linear head; returns (logits, features) as the published models do."""

    def __init__(self, num_classes=10, use_norm=False, feature_norm="l1"):
        super().__init__()
        self.feature_norm = feature_norm
        self.conv1 = nn.Conv2d(3, 4, 3, stride=4, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        head = models.resnet_cifar.NormedLinear if use_norm else nn.Linear
        self.linear = head(64, num_classes)

    def forward(self, x):
        hidden = nn.functional.avg_pool2d(self.bn1(self.conv1(x)).relu(), 2).flatten(1)
        return self.linear(hidden), row_norm(hidden, self.feature_norm)[:, None]


tiny = TinyModel


# ------------------------------------------------------------------------------------------ in this process

#: The digits as the script reads them, read once.
read_digits_once = functools.lru_cache(imbalance_cifar._digits)


@contextlib.contextmanager
def quiet_folder(cwd, figures=False, cuda=False):
    """The folder `cwd` as the working one, without CUDA and figures; threads and random state are put back."""
    before, threads, generator = os.getcwd(), torch.get_num_threads(), torch.get_rng_state()
    with contextlib.ExitStack() as stack:
        if not cuda:
            stack.enter_context(mock.patch("torch.cuda.is_available", return_value=False))
        if not figures:
            for name in ("of_evaluation", "of_history"):
                stack.enter_context(mock.patch.object(plots, name, return_value=[]))
            stack.enter_context(mock.patch.object(plots, "available", return_value=False))
        os.chdir(cwd)
        try:
            yield
        finally:
            os.chdir(before)
            torch.set_num_threads(threads)
            torch.set_rng_state(generator)


def run_script(script, args, cwd, figures=False, cuda=False):
    """script.main(args) in the folder `cwd`: (exit status, standard output, standard error)."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), quiet_folder(cwd, figures, cuda):
        try:
            script.main([str(a) for a in args])
        except SystemExit as stop:
            status = stop.code or 0
    return status, out.getvalue(), err.getvalue()


#: run_reproduce(args, cwd) -> (status, out, err).
run_reproduce = functools.partial(run_script, reproduce)


def run_main(args, cwd, **how):
    """`run_script` of cifar_train.py, with the model 'tiny' beside the published ones."""
    extra = mock.patch.dict(models.CIFAR_MODELS, tiny=tiny)
    with extra, mock.patch.object(imbalance_cifar, "_digits", read_digits_once):
        return run_script(cifar_train, args, cwd, **how)


def run_ok(args, cwd, **how):
    """`run_main` of a command that must succeed; what it printed on standard output."""
    status, out, err = run_main(args, cwd, **how)
    assert status == 0, err
    return out


def fails(args, cwd, *words, status=2, run=run_main, **how):
    """The one line of a command that fails: with these words, and no accuracy."""
    code, out, err = run(args, cwd, **how)
    (line,) = messages(err)
    assert (code, line.isprintable(), "error: " in line, "top-1" in out) == (status, True, True, False), err
    assert all(word in line for word in words), line
    return line


def refused(args, cwd, *words, **how):
    """The line of a command that fails, see `fails`, and changes nothing in `cwd`."""
    before = snapshot(cwd)
    line = fails(args, cwd, *words, **how)
    assert snapshot(cwd) == before
    return line


def break_off(args, cwd, after):
    """Run until the first batch of the epoch after `after` completed ones, and break off there."""
    train_one_epoch = cifar_train.train_one_epoch

    def broken(model, batches, *rest, **more):
        if broken.calls == after:
            raise KeyboardInterrupt
        broken.calls += 1
        return train_one_epoch(model, batches, *rest, **more)

    broken.calls = 0
    with mock.patch.object(cifar_train, "train_one_epoch", broken):
        return run_main(args, cwd)


# -------------------------------------------------------------------------------------------- as a process


def environment():
    """One thread, no CUDA, nothing of a terminal."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}


def run_process(args, cwd, script=SCRIPT, timeout=1800, **variables):
    """`python cifar_train.py args` in the folder `cwd`, to its end, with these variables in its environment."""
    command = [sys.executable, str(script), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, env={**environment(), **variables}, capture_output=True, text=True, timeout=timeout
    )


def wait_for(condition, seconds=600):
    """Until condition() is true; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ----------------------------------------------------------------------------------------- what a run left


def log_folder(cwd, loss="CE", rule="None", exp="0", arch="tiny", dataset="digits", imb="exp_0.01"):
    return Path(cwd) / "log" / f"{dataset}_{arch}_{loss}_{rule}_{imb}_{exp}"


def model_folder(cwd, *args, **kwargs):
    return Path(cwd) / "checkpoint" / log_folder(cwd, *args, **kwargs).name


def read_csv(path):
    """A list of dicts, one a row; fails on a row that is longer or shorter than the header."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(None not in row and None not in row.values() for row in rows), f"ragged rows in {path}"
    return rows


def read_logs(folder):
    """The rows of the three CSV files, without the seconds, which differ from run to run."""
    names = ("log_train.csv", "log_test.csv", "class_accuracy.csv")
    return {
        name: [{k: v for k, v in row.items() if k != "seconds"} for row in read_csv(folder / name)] for name in names
    }


def scalars(folder):
    """tag -> list of (step, value), in the order in which TensorBoard's own reader gives them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def load_checkpoint(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def assert_same_weights(path, other):
    """Every tensor of two checkpoints' models and momentum buffers is equal, bit for bit."""
    one, two = load_checkpoint(path), load_checkpoint(other)
    assert one["epoch"] == two["epoch"]
    assert list(one["state_dict"]) == list(two["state_dict"])
    for name, tensor in one["state_dict"].items():
        assert torch.equal(tensor, two["state_dict"][name]), f"{name} differs"
    buffers, others = one["optimizer"]["state"], two["optimizer"]["state"]
    assert buffers.keys() == others.keys()
    assert buffers, "no momentum: nothing was trained"
    for key, values in buffers.items():
        for name, value in values.items():
            assert torch.equal(value, others[key][name]), f"{name} {key} differs"


def assert_same_run(one, two, names=("ckpt.pth.tar",)):
    """Two runs, given by their checkpoint folders: these checkpoints are equal, see above, and all logs are."""
    for name in names:
        assert_same_weights(one / name, two / name)
    logs = [Path("log".join(str(path).rsplit("checkpoint", 1))) for path in (one, two)]
    assert read_logs(logs[0]) == read_logs(logs[1])


def snapshot(folder):
    """path -> sha256 of every file below `folder`; folders are there too, with None."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
        for path in sorted(Path(folder).rglob("*"))
    }


def messages(err):
    """The lines of standard error that are not warnings."""
    return [line for line in err.splitlines() if line and not line.startswith(("warning:", "*"))]
