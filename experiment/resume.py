"""Where a run starts: from scratch, from its own newest checkpoint, or from another run's (a fork).

A fork is allowed when both runs train every epoch before the checkpoint in the same way, so that the result is
the run that was never forked. A longer run continues a shorter one under the same condition.
"""

import contextlib
import dataclasses
import glob
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

from experiment import checkpoint, plots
from experiment.parser import SCRIPTS
from experiment.plots import FIGURES
from experiment.records import FILES, best_epoch
from experiment.settings import IDENTITY, OF_CHECKPOINT, SHARED, Settings, from_record
from training.recipe import Recipe
from training.registry import LOSSES
from utils import DataError, UsageError, one_line, warn

#: What -e writes: a folder below the run's logs, and the file of --save_logits in it.
EVALUATION, LOGITS = "evaluate", "logits.npz"


@dataclasses.dataclass(frozen=True)
class ResumeState:
    """The epoch to begin with, and what a checkpoint brings: history, weights, optimizer and criterion states."""

    epoch: int = 0
    history: Sequence[dict] = ()
    state_dict: dict | None = None
    optimizer: dict | None = None
    criterion: dict | None = None
    scaler: dict | None = None
    path: str | None = None
    is_fork: bool = False
    is_finished: bool = False  # nothing is left to train; logs and figures are there
    split_sha256: str | None = None
    files_sha256: str | None = None
    best_acc1: float = -1.0  # of a published checkpoint, which brings no history
    seed: int | None = None
    flip: str = "auto"  # --flip of the run that made the checkpoint
    classes: Sequence[str] | None = None
    class_counts: Sequence[int] | None = None  # of its training images
    trained_on: Sequence[dict] = ()  # see provenance.py
    forced: Sequence[str] = ()  # what --force has passed over


def find_start(settings: Settings) -> ResumeState:
    """Where the run starts, with the seed that a checkpoint has.

    Raises:
        UsageError: another run's folder, or a checkpoint of a run that differs. DataError: a bad checkpoint.
    """
    own, held = (None, None) if settings.overwrite else checkpoint.load_newest(settings.model_folder)
    path = _start_of_auto(own, settings) if settings.resume == "auto" else settings.resume or None
    if settings.overwrite:
        _check_not_deleted([path, settings.pretrained], settings.model_folder)
    is_own = path is not None and _is_below(path, settings.model_folder)
    is_trained = held is not None and _is_trained(settings, held)
    if is_trained and not is_own:
        path = own  # nothing is to be started: at most its logs or figures are missing
    state = held if path == own else checkpoint.load(path) if path else None
    theirs = settings_of_checkpoint(state, path)
    if settings.seed is None and theirs is not None:
        settings = dataclasses.replace(settings, seed=theirs.seed)
    newest = held.get("epoch", 0) if held else 0
    is_older = state is not None and is_own and state.get("epoch", 0) < newest
    is_finished = _check_folder(settings, held, state, is_own) and not (is_older and settings.force)
    if is_finished or (is_trained and not is_older):
        path, state, is_own, is_older = own, held, True, False
        theirs = settings_of_checkpoint(state, path)
    if state is None:
        return ResumeState(epoch=settings.start_epoch)
    if is_older and not settings.force:
        raise UsageError(
            f"{path} has {state.get('epoch', 0)} epochs done, but {settings.model_folder} holds this run after "
            f"{newest}: --resume auto continues it, another --exp_str forks from it, or use --force to train the "
            "epochs between them again"
        )
    epoch = state.get("epoch", settings.start_epoch)
    difference = _check_same(settings, theirs, state, epoch, path)
    is_done_here = epoch == settings.epochs and state is held and difference is None
    if epoch >= settings.epochs and not is_done_here:
        raise UsageError(f"{path} has {epoch} epochs done: --epochs {settings.epochs} leaves nothing to train")
    if epoch >= settings.epochs and not state.get("history"):
        raise UsageError(f"{path} has all epochs done, but no history to make logs of: evaluate it with -e")
    return ResumeState(
        epoch=epoch,
        history=state.get("history", []),
        state_dict=state["state_dict"],
        optimizer=state.get("optimizer"),
        criterion=_criterion_state(settings, theirs, state, epoch),
        scaler=state.get("scaler"),
        path=path,
        is_fork=settings.overwrite or not is_own,
        is_finished=is_finished,
        split_sha256=state.get("split_sha256"),
        files_sha256=state.get("files_sha256"),
        best_acc1=_published_best(state),
        seed=theirs.seed if theirs is not None else None,
        # settings without the flag are older: every data set was mirrored then
        flip=state["settings"].get("flip", "on") if theirs is not None else "auto",
        classes=state.get("classes"),
        class_counts=state.get("class_counts"),
        trained_on=state.get("trained_on", ()),
        forced=[*state.get("forced", ()), *([difference] if difference else [])],
    )


def _start_of_auto(own, settings):
    """The run's own newest checkpoint; of a fork that was stopped in its first epoch, the one that it started from."""
    path = own or checkpoint.newest_kept(settings.model_folder)
    if path is None:
        print(f"--resume auto: no checkpoint in {one_line(settings.model_folder)}, starting from scratch", flush=True)
    return path


def _check_not_deleted(paths, model_folder):
    """Refuse --overwrite of a file that the run starts from."""
    deleted = {os.path.realpath(path) for path in checkpoint.written(model_folder)}
    for path in paths:
        if path and os.path.realpath(path) in deleted:
            raise UsageError(f"--overwrite would delete {path}: move it to another folder to start from it")


def _published_best(state):
    """`best_acc1` of a published checkpoint, also after epochs of ours; -1 where the history has the best epoch."""
    best = float(state.get("best_acc1", -1.0))
    return best if all(record["test"]["acc1"] < best for record in state.get("history", [])) else -1.0


def _is_below(path, folder):
    return os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)


def settings_of_checkpoint(state: dict | None, path: str | None) -> Settings | None:
    """The Settings of a checkpoint, None where it records none. Raises DataError for values that no flag takes."""
    if state is None or not state.get("settings"):
        return None
    try:
        theirs = from_record(state["settings"])
        if len(theirs.milestones) != len(theirs.lr_factors):
            raise ValueError(f"milestones is {theirs.milestones!r} and lr_factors is {theirs.lr_factors!r}")
        return theirs
    except ValueError as error:
        raise DataError(f"{path} is not a checkpoint of this repository: in its settings, {error}") from None


# --------------------------------------------------------------------------------------------- comparisons


def differing(mine: Settings, theirs: Settings, names: Sequence[str], recorded: dict) -> str | None:
    """The first of the settings `names` that differs, as text, or None. What `recorded` lacks changed nothing then."""
    for name in sorted(names):
        here, there = getattr(mine, name), getattr(theirs, name)
        if name in recorded and here != there and not (name in ("seed", "num_classes") and here is None):
            return f"{name} is {there!r} there and {here!r} here"
    return None


def plan(settings: Settings, epoch: int) -> dict[str, Any]:
    """All that decides how `epoch` is trained: its Stage, and the constants in force."""
    recipe = Recipe.from_settings(settings)
    return {**dataclasses.asdict(recipe.stage(epoch)), **recipe.constants_at(epoch)}


def _first_difference_in_plan(mine, theirs, epochs):
    for epoch in range(epochs):
        here, there = plan(mine, epoch), plan(theirs, epoch)
        for name in here | there:
            if here.get(name) != there.get(name):
                return f"in epoch {epoch + 1}, {name} is {there.get(name)!r} there and {here.get(name)!r} here"
    return None


def _check_folder(settings, held, state, is_own):
    """Refuse to write over another run, or over this one's progress. True if the folder holds this run, finished.

    `held` is the folder's newest checkpoint, `state` the one to start from.
    """
    if settings.overwrite:
        return False
    log_folder, model_folder = settings.log_folder, settings.model_folder
    summary = _summary(log_folder)
    recorded = (held or summary).get("settings") or {}
    differs = _difference_of_folder(settings, recorded, held)
    if differs is not None and not (is_own and settings.force):
        ways = ["choose another --exp_str", "--overwrite it"]
        if _difference_of_folder(dataclasses.replace(settings, resume="auto"), recorded, held) is None:
            ways.insert(0, "--resume auto makes it longer")
        if is_own:
            ways.append("use --force to continue anyway")
        raise UsageError(f"{log_folder} holds a run with other settings ({differs}): {', or '.join(ways)}")
    # a fork stopped in its first epoch has the logs of the epochs before it and no checkpoint of its own
    done = summary.get("epochs_done", 0)
    if held is None and recorded and done > len((state or {}).get("history", [])):
        if os.path.exists(os.path.join(model_folder, checkpoint.epoch_name(done))):
            raise UsageError(_continue(log_folder, done))
        raise UsageError(
            f"{log_folder} holds the logs of this run after {done} epochs, but {model_folder} holds no checkpoint of "
            "them: --overwrite it"
        )
    if held is None or differs is not None:
        return False
    if _is_trained(settings, held) and _is_complete(log_folder, held):
        return True
    if not is_own and not _is_trained(settings, held):
        raise UsageError(_continue(model_folder, held.get("epoch", 0)))
    return False


def _continue(folder, epochs):
    return f"{folder} holds this run after {epochs} epochs: --resume auto continues it, --overwrite starts anew"


def _difference_of_folder(settings, recorded, held):
    """What sets the run in the folder apart from this one. A longer run with the same plan so far is the same run."""
    if not recorded:
        return None
    theirs = settings_of_checkpoint({"settings": recorded}, settings.log_folder)
    assert theirs is not None  # something is recorded
    longer = held is not None and settings.epochs > theirs.epochs and settings.resume == "auto"
    if not longer:
        return differing(settings, theirs, IDENTITY, recorded)
    other = differing(settings, theirs, SHARED, recorded)
    return other or _first_difference_in_plan(settings, theirs, held.get("epoch", 0))


def _is_trained(settings, held):
    return held.get("epoch", 0) == settings.epochs


def _summary(log_folder):
    """Settings and number of epochs of the run in these logs; empty where no epoch is logged."""
    try:
        with open(os.path.join(log_folder, "summary.json")) as file:
            summary = json.load(file)
        return {"settings": dict(summary["settings"]), "epochs_done": int(summary["epochs_done"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _is_complete(log_folder, held):
    """Whether logs and figures are there for every epoch of the checkpoint."""
    done = _summary(log_folder).get("epochs_done", 0)
    figures = all(os.path.exists(os.path.join(log_folder, name)) for name in FIGURES)
    return done >= len(held.get("history", [])) and (figures or not plots.available())


def _check_same(settings, theirs, state, epoch, path):
    """The checkpoint's run must be this run in every epoch that it has trained; None, with --force the difference."""
    if theirs is None:
        warn(f"{path} records no settings: only its arch can be checked")
        arch = state.get("arch", settings.arch)
        first = None if arch == settings.arch else f"arch is {arch!r} there and {settings.arch!r} here"
    else:
        first = differing(settings, theirs, [*SHARED, "use_norm"], {**state["settings"], "use_norm": None})
        if first is None and "epochs" in state["settings"]:
            first = _first_difference_in_plan(settings, theirs, min(epoch, settings.epochs))
    if first is not None:
        if not settings.force:
            raise UsageError(f"{path} is of another run: {first} (use --force to continue anyway)")
        warn(f"{path} is of another run: {first}; continuing because of --force")
    same = "the same run, but not to the last bit"
    other = "batch norm, if the model has any, is over other images (--sync_bn: over the whole batch)"
    for name, effect in (("threads", same), ("processes", same if settings.sync_bn else other)):
        here, there = getattr(settings, name), (state.get("settings") or {}).get(name)
        if there not in (None, here):
            warn(f"{path} was made with {there} {name}, this run has {here}: {effect}")
    return first


def _criterion_state(settings, theirs, state, epoch):
    """The criterion's state, where the next epoch has the same loss with the same constants."""
    if theirs is None or not 0 < epoch < settings.epochs or not state.get("criterion"):
        return None
    here, there = plan(settings, epoch), plan(theirs, epoch - 1)
    names = ("loss", *LOSSES[here["loss"]].constants)
    return state["criterion"] if all(here[name] == there.get(name) for name in names) else None


# ------------------------------------------------------------------------------------------------- folders


def read_inherited(start: ResumeState) -> dict[str, bytes]:
    """The checkpoints that the run's folder must hold before an epoch is trained, as bytes by file name.

    They are the best one of the epochs before `start.epoch`, and for a fork the one that it starts from.

    Raises:
        DataError: the fork's checkpoint has been written over since it was read, or the best one beside it is damaged.
    """
    best = _read_best(start)
    if not start.is_fork:
        return {checkpoint.BEST: best} if best else {}
    content, state = checkpoint.read(str(start.path))
    if state.get("epoch", start.epoch) != start.epoch:
        raise DataError(f"{start.path} was written over while this run started: start it again")
    files = dict.fromkeys((checkpoint.BEST, checkpoint.best_name(start.epoch)), best) if best else {}
    return {**files, checkpoint.epoch_name(start.epoch): content}  # the last says that the others are there


def _read_best(start):
    """The bytes of the best checkpoint of the epochs before `start.epoch`, or None where there is none."""
    best = best_epoch(start.history) if start.history else None
    if best is None or best["test"]["acc1"] <= start.best_acc1:
        return None
    folder, damaged = os.path.dirname(start.path), None
    for path in [*(os.path.join(folder, n) for n in (checkpoint.best_name(start.epoch), checkpoint.BEST)), start.path]:
        if not os.path.exists(path):
            continue
        try:
            content, state = checkpoint.read(path)
        except DataError as error:
            damaged = error
        else:
            # a name alone says little: another run, or epochs that were given up, may have left the file
            if repr(state.get("history", [])[-1:]) == repr([best]):  # as text, in which NaN equals NaN
                return content
    if damaged is not None and start.is_fork:
        raise damaged
    return None


def take_over(start: ResumeState, inherited: dict[str, bytes], model_folder: str) -> None:
    """Write what `read_inherited` has read to the run's folder.

    A run that continues there from another checkpoint than the newest (which is damaged, or it goes back) makes that
    one the newest, so that it is resumed from it if it is stopped in its first epoch.
    """
    newest = os.path.join(model_folder, checkpoint.NEWEST)
    if start.path is not None and not start.is_fork:
        if os.path.realpath(start.path) == os.path.realpath(os.path.join(model_folder, checkpoint.PREVIOUS)):
            os.replace(start.path, newest)
        elif os.path.exists(newest) and os.path.realpath(start.path) != os.path.realpath(newest):
            checkpoint.write(newest, checkpoint.read(start.path)[0])
        if start.history and not inherited:  # what is there is of epochs that are no longer this run's
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(model_folder, checkpoint.BEST))
    for name, content in inherited.items():
        path = os.path.join(model_folder, name)
        if not os.path.exists(path) or pathlib.Path(path).read_bytes() != content:
            checkpoint.write(path, content)


def clear(log_folder: str, model_folder: str) -> None:
    """Delete what an earlier run left, file by file: nothing that a run does not write."""
    figures = (*FIGURES, "confusion.png")
    evaluation = ("evaluation.json", LOGITS, "class_accuracy.png", "confusion.png", "calibration.png")
    paths = checkpoint.written(model_folder)
    paths += [os.path.join(log_folder, name) for name in (*FILES, *figures)]
    paths += glob.glob(os.path.join(glob.escape(log_folder), "events.out.tfevents.*"))
    evaluations = os.path.join(glob.escape(log_folder), EVALUATION)
    corrected = [*glob.glob(f"{evaluations}/posthoc_la_*/"), *glob.glob(f"{evaluations}/tau_norm_*/")]
    folders = [os.path.join(log_folder, EVALUATION), *corrected]
    paths += [os.path.join(folder, name) for folder in folders for name in evaluation]
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    for folder in corrected:
        with contextlib.suppress(OSError):  # something else is in it
            os.rmdir(folder)


def load_for_evaluation(settings: Settings) -> tuple[Settings, str, dict]:
    """The checkpoint that -e evaluates (auto: this run's newest), with its data, model and name.

    What the checkpoint records about data, model and method holds; flags that contradict it are refused.

    Returns:
        (settings with those of the checkpoint, its path, the checkpoint).

    Raises:
        UsageError, DataError: as `find_start`.
    """
    path, state = settings.resume, None
    if path == "auto":
        found, state = checkpoint.load_newest(settings.model_folder)
        if found is None:
            raise DataError(f"no checkpoint at {os.path.join(settings.model_folder, checkpoint.NEWEST)}")
        path = found
    state = state or checkpoint.load(path)
    theirs = settings_of_checkpoint(state, path)
    if theirs is None:
        wrong = {"arch": state["arch"]} if state.get("arch", settings.arch) != settings.arch else {}
        is_normalised = checkpoint.has_normalised_head(state["state_dict"])
        loss = "LDAM" if is_normalised else "CE" if settings.use_norm else settings.loss_type
        merged = dataclasses.replace(settings, loss_type=loss)
    else:
        there = {name: getattr(theirs, name) for name in OF_CHECKPOINT if name in state["settings"]}
        # older runs of folder_train.py without val/ tested on the part that --val_fraction held out
        compared = {**there, "val_fraction": theirs.val_fraction or theirs.test_fraction}
        wrong = {
            name: value
            for name, value in compared.items()
            if name in settings.given and name in there and value != getattr(settings, name)
        }
        there["exp_str"] = theirs.exp_str
        merged = dataclasses.replace(settings, **there)
    if wrong and not settings.force:
        name, value = next(iter(wrong.items()))
        raise UsageError(
            f"{path} is of another run: {name} is {value!r} there and {getattr(settings, name)!r} here "
            "(use --force to evaluate anyway)"
        )
    merged = dataclasses.replace(merged, **{name: getattr(settings, name) for name in wrong})
    script = SCRIPTS[settings.script]
    if merged.arch not in script.archs() or (script.datasets and merged.dataset not in script.datasets):
        raise UsageError(f"{path} is a {merged.arch} of {merged.dataset}, which {settings.script} does not offer")
    return merged, path, state
