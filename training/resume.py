"""Where a run starts: from scratch, from its own newest checkpoint, or from another run's (a fork).

A fork is allowed when both runs train every epoch before the checkpoint in the same way, so that the result is
the run that was never forked.
"""

import argparse
import dataclasses
import glob
import os
import shutil

from training import checkpoint
from training.options import INCIDENTAL, SHARED, plan
from utils import UsageError, warn


@dataclasses.dataclass
class Start:
    """Epoch to begin with, and what a checkpoint brings: records, weights, optimizer and criterion states."""

    epoch: int = 0
    history: list = dataclasses.field(default_factory=list)
    state_dict: dict | None = None
    optimizer: dict | None = None
    criterion: dict | None = None
    path: str | None = None
    is_fork: bool = False


class Finished(Exception):
    """The folder holds this very run, finished."""


def find_start(options, log_folder, model_folder):
    """The Start of a run; `options.seed` is filled in from a checkpoint that has one.

    Raises:
        UsageError: another run's folder, or a checkpoint of a run that differs. DataError: a bad checkpoint.
        Finished: nothing left to do.
    """
    own = os.path.join(model_folder, checkpoint.NEWEST)
    path = options.resume
    if path == "auto":
        if options.overwrite:
            raise UsageError("--resume auto and --overwrite exclude each other")
        path = own if os.path.exists(own) else None
        if path is None:
            print(f"--resume auto: no checkpoint in {model_folder}, a fresh start", flush=True)
    state = checkpoint.load(path) if path else None
    if state is not None:
        _inherit_seed(options, state)
    is_own = path is not None and os.path.abspath(path).startswith(os.path.abspath(model_folder) + os.sep)
    _check_folder(options, own, log_folder, state, is_own)
    if state is None:
        return Start(epoch=options.start_epoch)
    state.setdefault("epoch", options.start_epoch)
    _check_same(options, state, path)
    return Start(
        epoch=state["epoch"],
        history=state.get("history", []),
        state_dict=state["state_dict"],
        optimizer=state.get("optimizer"),
        criterion=_criterion_state(options, state),
        path=path,
        is_fork=not is_own,
    )


def identity(settings):
    """The settings that make a run what it is."""
    return {name: value for name, value in settings.items() if name not in INCIDENTAL | {"start_epoch"}}


def difference(mine, theirs):
    """The first setting in which two identities differ, as text, or None. A seed left out fits any."""
    for name in sorted(mine.keys() & theirs.keys()):  # a flag that is newer than the checkpoint changed nothing then
        if name == "seed" and mine.get(name) is None:
            continue
        if mine.get(name) != theirs.get(name):
            return f"{name} is {theirs.get(name)!r} there and {mine.get(name)!r} here"
    return None


def _inherit_seed(options, state):
    settings = state.get("settings") or {}
    if options.seed is None:
        options.seed = settings.get("seed")


def _check_folder(options, own, log_folder, state, is_own):
    """Refuse to write over another run, or over this one's progress."""
    if options.overwrite or not os.path.exists(own):
        return
    held = checkpoint.load(own)
    settings = held.get("settings") or {}
    differs = difference(identity(vars(options)), identity(settings))
    if differs is None:
        if held["epoch"] >= options.epochs:
            raise Finished
        if not is_own:
            raise UsageError(
                f"{os.path.dirname(own)} holds this run after {held['epoch']} epochs: "
                "--resume auto goes on, --overwrite starts anew"
            )
    elif not (is_own and options.force):
        raise UsageError(
            f"{log_folder} holds a run with other settings ({differs}): choose another --exp_str, or --overwrite it"
        )


def _check_same(options, state, path):
    """The checkpoint's run must be this run in every epoch that it has trained."""
    settings = state.get("settings")
    if settings is None:
        warn(f"{path} records no settings: only its arch can be checked")
        settings = {"arch": state.get("arch", options.arch)}
    first = None
    for name in SHARED:
        if name in settings and settings[name] != getattr(options, name):
            first = f"{name} is {settings[name]!r} there and {getattr(options, name)!r} here"
            break
    if first is None and "epochs" in settings:
        first = _first_difference_in_plan(options, argparse.Namespace(**settings), state["epoch"])
    if first is not None:
        if not options.force:
            raise UsageError(f"{path} is of another run: {first} (--force goes on all the same)")
        warn(f"{path} is of another run: {first}; --force goes on all the same")
    if settings.get("threads") not in (None, options.threads):
        warn(
            f"{path} was made with {settings['threads']} threads, this run has {options.threads}: "
            "the same run, but not to the last bit"
        )
    if state["epoch"] >= options.epochs and not options.evaluate:
        raise UsageError(f"{path} has {state['epoch']} epochs done, --epochs {options.epochs} asks for no more")


def _first_difference_in_plan(mine, theirs, epochs):
    for epoch in range(epochs):
        here, there = plan(mine, epoch), plan(theirs, epoch)
        for name in here | there:
            if here.get(name) != there.get(name):
                return f"in epoch {epoch}, {name} is {there.get(name)!r} there and {here.get(name)!r} here"
    return None


def _criterion_state(options, state):
    """The criterion's state, where the next epoch goes on with the same criterion."""
    settings, epoch = state.get("settings"), state.get("epoch", 0)
    if not settings or not 0 < epoch < options.epochs or not state.get("criterion"):
        return None
    same = plan(options, epoch)["loss"] == plan(argparse.Namespace(**settings), epoch - 1)["loss"]
    return state["criterion"] if same else None


def adopt(start, model_folder):
    """Give a fork's folder the checkpoint that it starts from, and the best one of the epochs before it."""
    if not start.is_fork:
        return
    shutil.copyfile(start.path, os.path.join(model_folder, checkpoint.epoch_name(start.epoch)))
    best = os.path.join(os.path.dirname(start.path), checkpoint.best_name(start.epoch))
    if os.path.exists(best):
        shutil.copyfile(best, os.path.join(model_folder, checkpoint.BEST))


def clear(log_folder, model_folder):
    """Delete what an earlier run left, file by file: nothing that a run does not write."""
    patterns = [os.path.join(glob.escape(model_folder), "ckpt*.pth.tar")]
    for name in ("*.csv", "*.json", "*.png", "events.out.tfevents.*"):
        patterns.append(os.path.join(glob.escape(log_folder), name))
    for pattern in patterns:
        for path in glob.glob(pattern):
            os.unlink(path)


def load_for_evaluation(options, model_folder):
    """The checkpoint that -e evaluates (auto: this run's newest); refuses another arch, data set or imbalance.

    Raises:
        UsageError, DataError: as `find_start`.
    """
    if options.resume == "auto":
        options.resume = os.path.join(model_folder, checkpoint.NEWEST)
    state = checkpoint.load(options.resume)
    settings = state.get("settings") or {"arch": state.get("arch", options.arch)}
    for name in ("dataset", "arch", "num_classes", "imb_type", "imb_factor", "rand_number"):
        if name in settings and settings[name] != getattr(options, name) and not options.force:
            raise UsageError(
                f"{options.resume} is of another run: {name} is {settings[name]!r} there and "
                f"{getattr(options, name)!r} here (--force goes on all the same)"
            )
    options.use_norm = checkpoint.has_normalised_head(state["state_dict"])
    return state
