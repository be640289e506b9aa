"""Checkpoints: dicts that are written whole or not at all, and loaded without running code from the file.

    epoch, arch, state_dict, best_acc1, optimizer   the published names
    criterion, scaler, ema, ...                     the state of each further part of a run, by its name
    settings, history, ...                          what the run is, and its figures so far

A file is what torch.save makes. Its checksums are those of the zip archive.
"""

import argparse
import copy
import io
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
import torch

from files import write_atomically
from utils import DataError

NEWEST, BEST = "ckpt.pth.tar", "ckpt.best.pth.tar"

#: What others keep beside their weights and what cannot run code: numpy's numbers, text and arrays, argparse's flags.
SAFE: list[Any] = [
    argparse.Namespace, np.ndarray, np.dtype, *{type(np.dtype(code)) for code in "?bhilqBHILQefdU"},
    *((np.float64().__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
]  # fmt: skip
#: Where a file may keep its weights, if not at the top; of a run with --ema those that were tested.
WEIGHTS = ("ema", "state_dict", "model_state_dict", "model")


def epoch_name(epoch: int) -> str:
    """File name of the checkpoint kept after `epoch` completed epochs.

    >>> epoch_name(20)
    'ckpt.epoch020.pth.tar'
    """
    return f"ckpt.epoch{epoch:03d}.pth.tar"


def best_name(epoch: int) -> str:
    """File name of the best checkpoint of the first `epoch` epochs, kept beside `epoch_name`, for forks."""
    return f"ckpt.epoch{epoch:03d}.best.pth.tar"


def exists(folder: str) -> bool:
    """Whether a run's folder holds a checkpoint to continue from."""
    return os.path.exists(os.path.join(folder, NEWEST))


def save(path: str, state: dict) -> None:
    """Write the dict `state` to `path`, atomically."""
    content = io.BytesIO()  # a full disk makes torch.save raise what is no OSError
    torch.save(state, content)
    write_atomically(path, lambda file: file.write(content.getbuffer()))


def load(path: str) -> dict:
    """The checkpoint at `path`, on the CPU. The file cannot run code (weights-only loading).

    Raises:
        DataError: missing, damaged, or not a checkpoint.
    """
    state = _load(path)
    weights = state.get("state_dict") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not weights or not all(map(torch.is_tensor, weights.values())):
        raise DataError(f"{path} is not a training checkpoint: it has no 'state_dict' of tensors")
    return state


def load_foreign(path: str) -> dict[str, torch.Tensor]:
    """The weights in a file that any program has saved: at the top, or below one of WEIGHTS. Loaded as by `load`.

    Entries that are not tensors, and the counter of torch's AveragedModel, are left out.

    Raises:
        DataError: missing, damaged, or without weights.
    """
    state = _load(path)
    if isinstance(state, dict):
        state = next((state[name] for name in WEIGHTS if isinstance(state.get(name), dict)), state)
        weights = {name: part for name, part in state.items() if torch.is_tensor(part) and name != "n_averaged"}
        if weights:
            return weights
    raise DataError(f"{path} holds no weights: a state dict is wanted, or a dict with one as {' or '.join(WEIGHTS)}")


def _load(path):
    if not os.path.isfile(path):
        raise DataError(f"no checkpoint at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _check_sums(path)
            with torch.serialization.safe_globals(SAFE):
                return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        unknown = re.search(r"GLOBAL (\S+) was not an allowed global", str(error))
        if unknown:
            raise DataError(
                f"{path} holds a {unknown[1]}, which is not loaded, as it may run code: save the weights alone, "
                "torch.save(model.state_dict(), PATH)"
            ) from None
        raise DataError(f"{path} is not a checkpoint, or tries to run code, or is damaged: refused") from None
    except Exception as error:  # a damaged file makes torch and zipfile raise nearly anything
        if isinstance(error, OSError) and error.filename:  # one that may not be read
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise DataError(f"{path} is damaged or not a checkpoint ({reason})") from None


def _check_sums(path):
    """Compare the parts of a zip archive with their checksums, which torch.load does not."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"the checksum of {damaged} does not match")


def load_weights(model: torch.nn.Module, state_dict: dict, path: str, new_head: str | None = None) -> bool:
    """Load a state dict into `model`, whatever wrapped the model that it is of, see `plain_names`.

    `new_head` is the name of a layer that is left as the model has it where the weights have another form of it (1000
    classes, LDAM's head). Returns whether it was left.

    Raises:
        DataError: names or shapes that do not fit.
    """
    own = model.state_dict()
    weights, is_left = plain_names(state_dict, own), False
    if new_head is not None:
        head, theirs = ({k: t for k, t in of.items() if k.startswith(f"{new_head}.")} for of in (own, weights))
        is_left = {name: t.shape for name, t in head.items()} != {name: t.shape for name, t in theirs.items()}
        if is_left:
            weights = {name: tensor for name, tensor in weights.items() if name not in theirs} | head
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # after a title, a line of missing names, one of others, one a shape
        differs = str(error).splitlines()[1].strip()
        has_ldam_head = has_normalised_head(own) != has_normalised_head(weights)
        hint = " (one of the two has LDAM's normalised head)" if has_ldam_head else ""
        raise DataError(f"{path} does not fit this model: {differs[:200]}{hint}") from None
    return is_left


def plain_names(state_dict: Mapping[str, Any], own: Container[str]) -> dict[str, Any]:
    """A state dict without the prefixes of torch.compile and DataParallel, or one that all names share.

    >>> plain_names({"module._orig_mod.m.fc.bias": 0, "module._orig_mod.m.fc.weight": 1}, ["fc.bias", "fc.weight"])
    {'fc.bias': 0, 'fc.weight': 1}
    """
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in state_dict.items()}
    while plain and not any(name in own for name in plain):
        heads = {name.partition(".")[0] for name in plain}
        if len(heads) > 1 or not all("." in name for name in plain):
            break
        plain = {name.partition(".")[2]: tensor for name, tensor in plain.items()}
    return plain


def has_normalised_head(state_dict: dict) -> bool:
    """Whether the weights are of a model with LDAM's head: the last matrix has no bias."""
    matrices = [name for name, tensor in state_dict.items() if tensor.ndim == 2 and name.endswith("weight")]
    return bool(matrices) and matrices[-1].removesuffix("weight") + "bias" not in state_dict


def on_cpu(value: Any) -> Any:
    """A deep copy, with every tensor in nested dicts and lists on the CPU."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {name: on_cpu(item) for name, item in value.items()}
    return [on_cpu(item) for item in value] if isinstance(value, list) else copy.deepcopy(value)
