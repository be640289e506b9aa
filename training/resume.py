"""Where a run starts: from scratch, from its own newest checkpoint, or from another run's (a fork).

A fork is allowed when both runs train every epoch before the checkpoint in the same way, so that the result is
the run that was never forked.
"""

import argparse
import dataclasses
import glob
import json
import os

from training import checkpoint, plots
from training.options import INCIDENTAL, SHARED, plan
from training.plots import FIGURES
from training.records import FILES
from utils import DataError, UsageError, one_line, warn


@dataclasses.dataclass
class Start:
    """Epoch to begin with, and what a checkpoint brings: records, weights, optimizer and criterion states."""

    epoch: int
    history: list = dataclasses.field(default_factory=list)
    state_dict: dict | None = None
    optimizer: dict | None = None
    criterion: dict | None = None
    scaler: dict | None = None
    path: str | None = None
    is_fork: bool = False
    split_sha256: str | None = None
    files_sha256: str | None = None
    best_acc1: float = -1.0  # of a published checkpoint, which brings no history


class Finished(Exception):
    """The folder holds this very run, finished."""


def find_start(options, log_folder, model_folder):
    """The Start of a run; `options.seed` is filled in from a checkpoint that has one.

    Raises:
        UsageError: another run's folder, or a checkpoint of a run that differs. DataError: a bad checkpoint.
        Finished: nothing left to do.
    """
    own, held = (None, None) if options.overwrite else checkpoint.load_newest(model_folder)
    path = options.resume
    if path == "auto":
        path = _own_newest(options, own, model_folder)
    state = held if path == own else checkpoint.load(path) if path else None
    if state is not None:
        _inherit_seed(options, state)
    is_own = path is not None and os.path.abspath(path).startswith(os.path.abspath(model_folder) + os.sep)
    if _check_folder(options, held, log_folder, model_folder, is_own):
        if _is_complete(log_folder, held):
            raise Finished
        path, state, is_own = own, held, True  # stopped after the last epoch, before its logs or figures
        _inherit_seed(options, state)
    if state is None:
        return Start(epoch=options.start_epoch)
    state.setdefault("epoch", options.start_epoch)
    _check_same(options, state, path)
    if state["epoch"] >= options.epochs and state is not held:
        raise UsageError(f"{path} has {state['epoch']} epochs done, --epochs {options.epochs} asks for no more")
    return Start(
        epoch=state["epoch"],
        history=state.get("history", []),
        state_dict=state["state_dict"],
        optimizer=state.get("optimizer"),
        criterion=_criterion_state(options, state),
        scaler=state.get("scaler"),
        path=path,
        is_fork=not is_own,
        split_sha256=state.get("split_sha256"),
        files_sha256=state.get("files_sha256"),
        best_acc1=-1.0 if state.get("history") else float(state.get("best_acc1", -1.0)),
    )


def _own_newest(options, own, model_folder):
    if options.overwrite:
        raise UsageError("--resume auto and --overwrite exclude each other")
    if own is None:
        print(f"--resume auto: no checkpoint in {one_line(model_folder)}, a fresh start", flush=True)
    return own


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


def _check_folder(options, held, log_folder, model_folder, is_own):
    """Refuse to write over another run, or over this one's progress. True if the folder holds this run, finished."""
    if options.overwrite:
        return False
    settings = (held.get("settings") if held else _recorded_settings(log_folder)) or {}
    differs = difference(identity(vars(options)), identity(settings))
    if differs is not None and not (is_own and options.force):
        also = ", or --force to go on all the same" if is_own else ""
        raise UsageError(
            f"{log_folder} holds a run with other settings ({differs}): "
            f"choose another --exp_str, or --overwrite it{also}"
        )
    if held is None and settings and differs is None:
        raise UsageError(
            f"{log_folder} holds the logs of this run, {model_folder} no checkpoint: --overwrite runs it anew"
        )
    if held is None or differs is not None:
        return False
    if held.get("epoch", 0) >= options.epochs:
        return True
    if not is_own:
        raise UsageError(
            f"{model_folder} holds this run after {held.get('epoch', 0)} epochs: "
            "--resume auto goes on, --overwrite starts anew"
        )
    return False


def _recorded_settings(log_folder):
    """The settings of a run with at least one epoch in its logs, whose checkpoints lie elsewhere; else None."""
    try:
        with open(os.path.join(log_folder, "summary.json")) as file:
            return json.load(file)["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _is_complete(log_folder, held):
    """Whether logs and figures are there for every epoch of the checkpoint."""
    try:
        with open(os.path.join(log_folder, "summary.json")) as file:
            done = json.load(file)["epochs_done"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    figures = all(os.path.exists(os.path.join(log_folder, name)) for name in FIGURES)
    return done >= len(held.get("history", [])) and (figures or not plots.available())


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
        first = _first_difference_in_plan(options, _as_options(options, settings), state["epoch"])
    if first is not None:
        if not options.force:
            raise UsageError(f"{path} is of another run: {first} (--force goes on all the same)")
        warn(f"{path} is of another run: {first}; --force goes on all the same")
    for name in ("threads", "processes"):
        here = getattr(options, name, 1)
        if settings.get(name) not in (None, here):
            made = f"{path} was made with {settings[name]} {name}, this run has {here}"
            warn(f"{made}: the same run, but not to the last bit")


def _first_difference_in_plan(mine, theirs, epochs):
    for epoch in range(epochs):
        here, there = plan(mine, epoch), plan(theirs, epoch)
        for name in here | there:
            if here.get(name) != there.get(name):
                return f"in epoch {epoch}, {name} is {there.get(name)!r} there and {here.get(name)!r} here"
    return None


def _as_options(options, settings):
    """A checkpoint's settings as options; flags newer than the checkpoint as they are now."""
    return argparse.Namespace(**{**vars(options), **settings})


def _criterion_state(options, state):
    """The criterion's state, where the next epoch goes on with the same criterion."""
    settings, epoch = state.get("settings"), state.get("epoch", 0)
    if not settings or not 0 < epoch < options.epochs or not state.get("criterion"):
        return None
    same = plan(options, epoch)["loss"] == plan(_as_options(options, settings), epoch - 1)["loss"]
    return state["criterion"] if same else None


def adopt(start, model_folder):
    """Give a fork's folder the checkpoint that it starts from, and the best one of the epochs before it.

    A run that goes on from its last checkpoint but one makes it the newest, in place of one that is damaged.
    """
    if not start.is_fork:
        previous = os.path.join(model_folder, checkpoint.PREVIOUS)
        if start.path and os.path.abspath(start.path) == os.path.abspath(previous):
            os.replace(previous, os.path.join(model_folder, checkpoint.NEWEST))
        return
    checkpoint.copy(start.path, os.path.join(model_folder, checkpoint.epoch_name(start.epoch)))
    best = os.path.join(os.path.dirname(start.path), checkpoint.best_name(start.epoch))
    if os.path.exists(best):
        checkpoint.copy(best, os.path.join(model_folder, checkpoint.BEST))


def clear(log_folder, model_folder):
    """Delete what an earlier run left, file by file: nothing that a run does not write."""
    patterns = [os.path.join(glob.escape(model_folder), "ckpt*.pth.tar")]
    patterns += [
        os.path.join(glob.escape(log_folder), name)
        for name in (*FILES, *FIGURES, "confusion.png", "events.out.tfevents.*")
    ]
    for pattern in patterns:
        for path in glob.glob(pattern):
            os.unlink(path)


def load_for_evaluation(options, model_folder):
    """The checkpoint that -e evaluates (auto: this run's newest); refuses another arch, data set or imbalance.

    Raises:
        UsageError, DataError: as `find_start`.
    """
    if options.resume == "auto":
        options.resume, state = checkpoint.load_newest(model_folder)
        if state is None:
            raise DataError(f"no checkpoint at {os.path.join(model_folder, checkpoint.NEWEST)}")
    else:
        state = checkpoint.load(options.resume)
    settings = state.get("settings") or {"arch": state.get("arch", options.arch)}
    for name in ("dataset", "arch", "num_classes", "imb_type", "imb_factor", "rand_number", "image_size", "crop"):
        here = getattr(options, name, None)
        if name in settings and settings[name] != here and not options.force:
            raise UsageError(
                f"{options.resume} is of another run: {name} is {settings[name]!r} there and "
                f"{here!r} here (--force goes on all the same)"
            )
    options.use_norm = settings.get("use_norm", checkpoint.has_normalised_head(state["state_dict"]))
    return state
