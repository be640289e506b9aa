"""cifar_train.py as torchrun starts it, with two small models beside the published ones.

DIE_AT=epoch: rank 1 kills itself in the first batch of that epoch, in its first life.
REPORT=1: every rank writes a checksum of its final parameters and buffers into the working folder; no figures.

`--forked FILE` runs the commands of a JSON file instead, [[folder, script, ranks, arguments], ...], one after another.
Several ranks are forks of this process, so that torch is imported once.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import socket
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

from script_runner import TinyModel, tiny
from torch import nn

import cifar_train
import inat_train
import models
from experiment import plots
from experiment.run import Run
from training import distributed


def plain(num_classes=10, use_norm=False, feature_norm="l1"):
    """A model without batch norm: its gradients are sums over samples."""
    model = TinyModel(num_classes, use_norm, feature_norm)
    model.bn1 = nn.Identity()
    return model


def die_at(epoch):
    train = cifar_train.train_one_epoch

    def mortal(*args, **kwargs):
        mortal.epoch += 1
        if mortal.epoch == epoch and not distributed.restarts():
            distributed.barrier()  # until rank 0 has saved the epoch before
            if distributed.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
        return train(*args, **kwargs)

    mortal.epoch = -1
    cifar_train.train_one_epoch = mortal


def reporting(run, *args, report=Run.report):
    report(run, *args)
    digest = hashlib.sha256()
    for name, tensor in run.parts["state_dict"].state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    path = pathlib.Path(f"rank{distributed.rank()}of{distributed.world_size()}")
    path.write_text(f"{digest.hexdigest()} {run.history[-1]['test']['seen']}")


def run_in(folder, script, arguments, number):
    """A script's main in a folder; what it prints is in out<number> and err<number> there."""
    os.chdir(folder)
    out, err = open(f"out{number}", "a"), open(f"err{number}", "a")  # noqa: SIM115
    with out, err, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        script.main(arguments)


def run_forked(folder, script, ranks, arguments):
    """Run a script's main in so many forks; the status of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(ranks):
        children.append(os.fork())
        if children[-1] == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            status = 1
            try:
                run_in(folder, script, arguments, ranks)
                status = 0
            finally:
                os._exit(status)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    models.CIFAR_MODELS.update(plain=plain, tiny=tiny)
    if "REPORT" in os.environ:
        Run.report = reporting
        plots.of_evaluation = plots.of_history = lambda *args: []
    if "DIE_AT" in os.environ:
        die_at(int(os.environ["DIE_AT"]))
    if sys.argv[1] == "--forked":
        for folder, name, ranks, arguments in json.loads(pathlib.Path(sys.argv[2]).read_text()):
            script = {"cifar": cifar_train, "inat": inat_train}[name]
            if ranks == 1:
                run_in(folder, script, arguments, 1)
            elif any(run_forked(folder, script, ranks, arguments)):
                sys.exit(pathlib.Path(folder, f"err{ranks}").read_text())
    else:
        cifar_train.main()
