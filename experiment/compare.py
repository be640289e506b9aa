"""What two runs share: the settings of this one against those of a checkpoint."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from experiment.settings import SHARED, Settings, from_record
from training.recipe import Recipe
from training.registry import LOSSES
from utils import DataError, UsageError, warn


def differing(mine: Settings, theirs: Settings, names: tuple[str, ...]) -> str | None:
    """The settings among `names` that differ, as text, or None.

    A `seed` or `num_classes` of None, here or there, agrees with any value.
    """
    found = []
    for name in sorted(names):
        here, there = getattr(mine, name), getattr(theirs, name)
        if here != there and not (name in ("seed", "num_classes") and None in (here, there)):
            found.append(f"{name} is {there!r} there and {here!r} here")
    return "; ".join(found) or None


def plan(settings: Settings, epoch: int) -> dict[str, Any]:
    """All that decides how `epoch` is trained: its Stage, and the constants in force."""
    recipe = Recipe(settings)
    return {**dataclasses.asdict(recipe.stage(epoch)), **recipe.constants_at(epoch)}


def differing_plan(mine: Settings, theirs: Settings, epochs: int) -> str | None:
    """The first difference between two recipes in their first `epochs` epochs, as text, or None."""
    for epoch in range(epochs):
        here, there = plan(mine, epoch), plan(theirs, epoch)
        for name in here | there:
            if here.get(name) != there.get(name):
                return f"in epoch {epoch + 1}, {name} is {there.get(name)!r} there and {here.get(name)!r} here"
    return None


def settings_of_checkpoint(state: Mapping[str, Any], path: str) -> Settings | None:
    """The Settings of a checkpoint, None where it records none. Raises DataError for values that no flag takes."""
    if not state.get("settings"):
        return None
    try:
        return from_record(state["settings"])
    except ValueError as error:
        raise DataError(f"{path} is not a checkpoint of this repository: in its settings, {error}") from None


def difference(
    settings: Settings, theirs: Settings | None, state: Mapping[str, Any], epoch: int, path: str
) -> str | None:
    """What sets the run of a checkpoint after `epoch` epochs, with these settings, apart from this one, or None."""
    if theirs is None:
        warn(f"{path} records no settings: only its arch can be checked")
        arch = state.get("arch", settings.arch)
        return None if arch == settings.arch else f"arch is {arch!r} there and {settings.arch!r} here"
    of_plan = differing_plan(settings, theirs, min(epoch, settings.epochs))
    found = differing(settings, theirs, (*SHARED, "use_norm")), of_plan
    return "; ".join(text for text in found if text) or None


def refuse_or_force(settings: Settings, what: str) -> None:
    """Raise UsageError, or warn with --force."""
    if not settings.force:
        raise UsageError(f"{what} (use --force to continue anyway)")
    warn(f"{what}; continuing because of --force")


def warn_of_rounding(settings: Settings, state: Mapping[str, Any], path: str) -> None:
    """Warn where a checkpoint was made with other threads or processes."""
    same = "the same run, but not bit for bit"
    other = "batch norm, if any, is over other images (with --sync_bn: over the whole batch)"
    for name, effect in (("threads", same), ("processes", same if settings.sync_bn else other)):
        here, there = getattr(settings, name), (state.get("settings") or {}).get(name)
        if there not in (None, here):
            warn(f"{path} was made with {there} {name}, this run has {here}: {effect}")


def keeps_criterion(settings: Settings, theirs: Settings | None, epoch: int) -> bool:
    """Whether the next epoch has the loss of the one before, with the same constants: its state is kept."""
    if theirs is None or not 0 < epoch < settings.epochs:
        return False
    here, there = plan(settings, epoch), plan(theirs, epoch - 1)
    return all(here[name] == there.get(name) for name in ("loss", *LOSSES[here["loss"]].constants))
