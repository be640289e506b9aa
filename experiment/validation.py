"""What a checkpoint must look like before anything uses it: names, types and sizes, in one place.

A checkpoint may come from anywhere. Published ones have 'state_dict', 'epoch', 'arch', 'best_acc1' and 'optimizer';
ours have the settings, the history and checksums as well.
"""

import math
from typing import Any

import torch

from utils import DataError

#: More epochs than any run trains, and than a history is read for.
MAX_EPOCHS = 10**6
RECORD_PARTS = ("train", "test", "stage")
TEST_FIGURES = ("acc1", "acc5", "loss", "class_mean", "many", "medium", "few", "per_class", "seconds")
TRAIN_FIGURES = ("acc1", "acc5", "loss", "seconds")
NOT_IN_PERCENT = ("loss", "seconds")
STAGE_PARTS = {"lr": float, "loss": str, "class_weights": str, "sampler": str}


def check_state(state: Any, path: str) -> None:
    """Check the dict that a file holds.

    Raises:
        DataError: with the first part that is not what a checkpoint's is.
    """
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise DataError(f"{path} is not a training checkpoint: it has no 'state_dict'")
    check_weights(state["state_dict"], path)
    epoch, history = state.get("epoch", 0), state.get("history", [])
    good = {
        "epoch": _is_count(epoch),
        "arch": isinstance(state.get("arch", ""), str),
        "best_acc1": _is_number(state.get("best_acc1", 0.0)),
        "optimizer": isinstance(state.get("optimizer", {}), dict),
        "criterion": _is_tensors(state.get("criterion") or {}),
        "scaler": isinstance(state.get("scaler") or {}, dict),
        "settings": _is_settings(state.get("settings") or {}),
        "classes": _is_list(state.get("classes"), str),
        "class_counts": _is_list(state.get("class_counts"), int),
        "split_sha256": isinstance(state.get("split_sha256"), (str, type(None))),
        "files_sha256": isinstance(state.get("files_sha256"), (str, type(None))),
        "trained_on": _is_parts(state.get("trained_on", [])),
        "forced": _is_list(state.get("forced", []), str),
        "history": _is_history(history, epoch),
    }
    bad = [name for name, is_good in good.items() if not is_good]
    if bad:
        raise DataError(f"{path} is not a training checkpoint of this repository: its {bad[0]!r} is malformed")
    numbers = [record["epoch"] for record in history]
    if history and numbers != list(range(epoch - len(history), epoch)):
        raise DataError(f"{path} is not a training checkpoint of this repository: its 'history' skips epochs")


def check_weights(weights: dict, path: str) -> None:
    """Check that a state dict has names and plain, dense, real tensors."""
    for name, tensor in weights.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not _is_plain(tensor):
            raise DataError(f"{path} is not a training checkpoint: {name!r} is not a plain tensor")


def _is_plain(tensor):
    return tensor.layout is torch.strided and tensor.device.type == "cpu" and not tensor.is_complex()


def _is_tensors(part):
    return isinstance(part, dict) and all(isinstance(v, torch.Tensor) and _is_plain(v) for v in part.values())


def _is_history(history, epoch):
    """Whether it is a list of at most `epoch` records, whose number is read before they are."""
    return isinstance(history, list) and _is_count(epoch) and len(history) <= epoch and all(map(_is_record, history))


def _is_count(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_EPOCHS


def _is_number(value):
    if isinstance(value, torch.Tensor):  # the official code stores a 0-d tensor
        return value.numel() == 1 and _is_plain(value)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(part, kind):
    return part is None or (isinstance(part, list) and all(isinstance(value, kind) for value in part))


def _is_parts(parts):
    """Whether it is what `provenance.trained_on` makes."""
    kinds: dict[str, Any] = {"from_epoch": int, "device": str, "versions": dict, "code": (dict, type(None))}
    is_list = isinstance(parts, list) and all(isinstance(part, dict) for part in parts)
    return is_list and all(isinstance(part.get(name), kind) for part in parts for name, kind in kinds.items())


def _is_settings(settings):
    """Names with values as JSON has them. Whether a value fits its setting, `settings.from_record` says."""
    return isinstance(settings, dict) and all(isinstance(name, str) for name in settings)


def _is_record(record):
    """Whether it has what logs, figures and the choice of the best epoch read."""
    if not isinstance(record, dict) or not all(isinstance(record.get(part), dict) for part in RECORD_PARTS):
        return False
    stage, train, test = record["stage"], record["train"], record["test"]
    return (
        _is_count(record.get("epoch"))
        and all(_is_number(record.get(name)) for name in ("time", "seconds", "score"))
        and all(isinstance(stage.get(name), kind) for name, kind in STAGE_PARTS.items())
        and all(_is_figure(train.get(name), name) for name in TRAIN_FIGURES)
        and all(name in test for name in TEST_FIGURES)
        and isinstance(test["per_class"], list)
        and all(_is_figure(test[name], name) for name in TEST_FIGURES if name != "per_class")
        and all(_is_figure(accuracy, "per_class") for accuracy in test["per_class"])
        and test["acc1"] is not None
        and isinstance(record.get("val"), (dict, type(None)))
        and isinstance(record.get("ib_factor"), (list, type(None)))
        and all(_is_figure(factor, "loss") for factor in record.get("ib_factor") or [])
    )


def _is_figure(value, name):
    """Whether it is None or a number; an accuracy in percent, where it is finite, lies in 0 to 100."""
    if value is None or not isinstance(value, (int, float)) or isinstance(value, bool):
        return value is None
    return name in NOT_IN_PERCENT or not math.isfinite(value) or 0 <= value <= 100.001
