"""Where a run starts.

- Empty folders: from scratch, or from another run's checkpoint with --resume PATH (a fork).
- Folders that hold this run: from its newest checkpoint, whatever --resume says. With --resume auto more --epochs too.
- A checkpoint is continued only if its run and this one train every epoch before it in the same way, so that the
  result is that of a run that was never stopped or forked.
- All else is refused in one line. --overwrite empties the folders; --force continues although something differs.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

from experiment import checkpoint, compare, plots
from experiment.parser import SCRIPTS
from experiment.settings import IDENTITY, OF_CHECKPOINT, Settings
from utils import DataError, UsageError

#: Entries of a checkpoint that are no part's state.
FACTS = {
    "epoch", "arch", "best_acc1", "settings", "split_sha256", "files_sha256", "classes", "class_names", "class_counts",
    "preprocessing", "trained_on", "forced", "history",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts: the number of epochs done, and the checkpoint that they are in, if there is one.

    is_own: the run's folder holds that checkpoint as its newest. is_finished: nothing is left to do. states: of each
    part, by name. forced: what --force has passed over.
    """

    epoch: int = 0
    path: str | None = None
    checkpoint: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_own: bool = False
    is_finished: bool = False
    states: Mapping[str, dict] = dataclasses.field(default_factory=dict)
    forced: tuple[str, ...] = ()

    @property
    def history(self) -> list[dict]:
        return self.checkpoint.get("history") or []


def find_start(settings: Settings) -> Start:
    """Where the run starts, see above.

    Raises:
        UsageError: another run's folder, or a checkpoint of a run that differs. DataError: a bad checkpoint.
    """
    newest = os.path.join(settings.model_folder, checkpoint.NEWEST)
    asked = "" if settings.resume == "auto" else settings.resume
    goes_back = _is_below(asked, settings.model_folder) and os.path.realpath(asked) != os.path.realpath(newest)
    held = None
    if settings.overwrite:
        _check_not_deleted([asked, settings.pretrained], settings)
    elif not (goes_back and settings.force):
        held = _load_own(newest)
        _check_folders(settings, held)
        if goes_back and held and checkpoint.load(asked).get("epoch") != held.get("epoch"):
            raise UsageError(
                f"{asked} is older than {newest}, after {held.get('epoch', 0)} epochs: leave --resume out to continue "
                "that one, fork with another --exp_str, or use --force to train the epochs between them again"
            )
    if held is None and not asked:
        return Start(epoch=settings.start_epoch)
    path, state = (newest, held) if held is not None else (asked, checkpoint.load(asked))
    return _start_from(settings, path, state, is_own=held is not None)


def _start_from(settings, path, state, is_own):
    epoch, theirs = state.get("epoch", settings.start_epoch), compare.settings_of_checkpoint(state, path)
    differs = compare.difference(settings, theirs, state, epoch, path)
    if differs is not None:
        compare.refuse_or_force(settings, f"{path} belongs to another run: {differs}")
    compare.warn_of_rounding(settings, state, path)
    if epoch > settings.epochs or (epoch == settings.epochs and not (is_own and differs is None)):
        raise UsageError(f"{path} has {epoch} epochs done: --epochs {settings.epochs} leaves nothing to train")
    if theirs is not None and not state.get("optimizer"):
        lacking = "holds weights without the optimizer's state, for -e and --pretrained"
        compare.refuse_or_force(settings, f"{path} {lacking}")
        differs = differs or lacking
    states = {name: part for name, part in state.items() if name not in FACTS and isinstance(part, dict) and part}
    if not compare.keeps_criterion(settings, theirs, epoch):
        states.pop("criterion", None)
    if theirs is not None and theirs.optimizer != settings.optimizer:
        states.pop("optimizer", None)
    forced = (*state.get("forced", ()), *([differs] if differs else []))
    is_finished = epoch == settings.epochs and _is_reported(settings)
    return Start(epoch, path, state, is_own, is_finished, states, forced)


# ------------------------------------------------------------------------------------------------- folders


def _load_own(path):
    try:
        return checkpoint.load(path) if os.path.exists(path) else None
    except DataError as error:
        raise DataError(f"{error}; --overwrite starts again, --resume PATH --force continues another one") from None


def _check_folders(settings, held):
    """Refuse to write over another run, or over logs whose checkpoints are gone."""
    summary = _summary(settings)
    recorded = held.get("settings") if held is not None else summary.get("settings")
    if recorded:
        theirs = compare.settings_of_checkpoint({"settings": recorded}, settings.log_folder)
        assert theirs is not None
        is_longer = held is not None and settings.resume == "auto" and settings.epochs > theirs.epochs
        differs = None if is_longer else compare.differing(settings, theirs, IDENTITY)
        continues = settings.resume == "auto" or _is_below(settings.resume, settings.model_folder)
        if differs is not None and not (settings.force and continues):
            seed = f" (--exp_str seed{settings.seed}, say)" if differs.startswith("seed") else ""
            longer = dataclasses.replace(settings, epochs=theirs.epochs)
            ways = [f"choose another --exp_str{seed}", "--overwrite it"]
            same = not compare.differing(longer, theirs, IDENTITY)
            if held is not None and settings.epochs > theirs.epochs and same:
                ways.insert(0, "--resume auto makes it longer")
            raise UsageError(f"{settings.log_folder} holds a run with other settings ({differs}): {', or '.join(ways)}")
    if held is None and summary.get("epochs_done"):
        raise UsageError(
            f"{settings.log_folder} holds the logs of a run after {summary['epochs_done']} epochs, but "
            f"{settings.model_folder} holds no checkpoint of it: --overwrite it"
        )


def _summary(settings):
    """What summary.json records of the run in the log folder; empty where there is none."""
    try:
        with open(os.path.join(settings.log_folder, "summary.json")) as file:
            return json.load(file)
    except (OSError, ValueError):
        return {}


def _is_reported(settings):
    """Whether logs and figures of all epochs are there."""
    drawn = all(os.path.exists(os.path.join(settings.log_folder, name)) for name in plots.FIGURES)
    history = _summary(settings).get("history") or [{}]
    return history[-1].get("epoch") == settings.epochs - 1 and (drawn or not plots.available())


def _check_not_deleted(paths, settings):
    """Refuse --overwrite of a file that the run starts from."""
    for path in paths:
        if any(_is_below(path, folder) for folder in (settings.model_folder, settings.log_folder)):
            raise UsageError(f"--overwrite would delete {path}: move it to another folder to start from it")


def _is_below(path, folder):
    return bool(path) and os.path.realpath(path).startswith(os.path.realpath(folder) + os.sep)


# ---------------------------------------------------------------------------------------------- evaluation


def find_evaluated(settings: Settings) -> tuple[Settings, Start]:
    """The checkpoint that -e evaluates (auto: this run's newest), and the settings with its data and model.

    Raises:
        UsageError: flags that contradict the checkpoint. DataError: a bad checkpoint.
    """
    path = os.path.join(settings.model_folder, checkpoint.NEWEST) if settings.resume == "auto" else settings.resume
    state = checkpoint.load(path)
    theirs = compare.settings_of_checkpoint(state, path)
    if theirs is None:
        wrong = {"arch": state["arch"]} if state.get("arch", settings.arch) != settings.arch else {}
        is_normalised = checkpoint.has_normalised_head(state["state_dict"])
        loss = "LDAM" if is_normalised else "CE" if settings.use_norm else settings.loss_type
        merged = dataclasses.replace(settings, loss_type=loss)
    else:
        own = settings.given & {"train_list", "val_list", "skip_damaged"}  # it may test on other images
        there = {name: getattr(theirs, name) for name in OF_CHECKPOINT if name in state["settings"] and name not in own}
        gone = theirs.train_list and not os.path.isfile(theirs.train_list)
        if "val_list" in own and (gone or settings.val_list != theirs.val_list) and "train_list" not in own:
            there.pop("train_list", None)
        wrong = {name: of for name, of in there.items() if name in settings.given and of != getattr(settings, name)}
        merged = dataclasses.replace(settings, **there, exp_str=theirs.exp_str)
    for name, value in wrong.items():
        here = getattr(settings, name)
        what = f"{name} is {value!r} there and {here!r} here"
        compare.refuse_or_force(settings, f"{path} belongs to another run: {what}")
        merged = dataclasses.replace(merged, **{name: here})
    script = SCRIPTS[settings.script]
    if merged.arch not in script.archs() or (script.datasets and merged.dataset not in script.datasets):
        raise UsageError(f"{path} is a {merged.arch} of {merged.dataset}, which {settings.script} does not offer")
    states = {name: part for name, part in state.items() if name not in FACTS and isinstance(part, dict)}
    return merged, Start(state.get("epoch", 0), path, state, states=states)
