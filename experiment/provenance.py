"""Which code, versions and machine have trained which epochs of a run."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from experiment.resume import Start
from experiment.settings import Settings, fields_affecting
from utils import code_version, versions, warn

#: Settings that belong to the process, not to the run.
OF_PROCESS = fields_affecting("rounding")


def of_this_process(settings: Settings, device: torch.device) -> dict[str, Any]:
    """Device, versions, commit, and the settings that change a run by rounding only."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "versions": versions(),
        "code": code_version(),
        **{name: getattr(settings, name) for name in OF_PROCESS},
    }


def trained_on(start: Start, process: dict[str, Any], epochs: int) -> list[dict[str, Any]]:
    """What trains the epochs of a run that `process` continues, in order; a new part where something changes.

    Returns:
        dicts as `process`, each with `from_epoch`, its first epoch, counted from 0. The first one begins later than the
        run where an older checkpoint does not tell. A process that has nothing to train adds none.
    """
    parts = [dict(part) for part in start.checkpoint.get("trained_on") or ()]
    if parts and (start.epoch >= epochs or {**parts[-1], "from_epoch": 0} == {**process, "from_epoch": 0}):
        return parts
    if parts and parts[-1].get("device") != process["device"]:
        devices = f"was made on {parts[-1].get('device')}, this run is on {process['device']}"
        warn(f"{start.path} {devices}: the same run, but not bit for bit")
    return [*parts, {"from_epoch": start.epoch, **process}]


def lengths(parts: Sequence[dict[str, Any]], name: str, epochs: int) -> list[tuple[Any, int]]:
    """(value, epochs) for each part of `trained_on` that has another value of `name`; None where it is not recorded."""
    of_epoch: list[Any] = [None] * epochs
    for part in parts:
        of_epoch[part["from_epoch"] :] = [part.get(name)] * (epochs - part["from_epoch"])
    return [(value, len([*same])) for value, same in itertools.groupby(of_epoch)]
