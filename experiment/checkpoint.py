"""Checkpoints: written whole or not at all, with a checksum, loaded without running code from the file.

A file is what torch.save makes, and any torch.load reads it. As the comment that a zip archive may end with, it
carries the sha256 of all bytes before that comment. Files without one (published, torchvision's) are loaded too.
"""

import contextlib
import hashlib
import io
import os
import pickle
import re
import struct
import warnings
from collections.abc import Iterable

import torch

from experiment.validation import check_state, check_weights
from files import write_atomically
from utils import DataError, warn

NEWEST, PREVIOUS, BEST = "ckpt.pth.tar", "ckpt.previous.pth.tar", "ckpt.best.pth.tar"

#: The name of a run's checkpoint; the group is the number of epochs of one that is kept for forks.
NAME = re.compile(r"ckpt(?:\.previous|\.best|\.epoch\d+\.best|\.epoch(\d+))?\.pth\.tar")

#: The comment: these words and 64 hexadecimal digits.
SEAL, DIGITS = b"\nsha256 of all bytes before this line: ", 64
#: How a zip archive begins, how its last record begins, and how long that is without the comment.
ZIP_START, ZIP_END, ZIP_END_SIZE = b"PK\x03\x04", b"PK\x05\x06", 22


def epoch_name(epoch: int) -> str:
    """File name of the checkpoint kept after `epoch` completed epochs.

    >>> epoch_name(20)
    'ckpt.epoch020.pth.tar'
    """
    return f"ckpt.epoch{epoch:03d}.pth.tar"


def best_name(epoch: int) -> str:
    """File name of the best checkpoint of the first `epoch` epochs, kept beside `epoch_name`, for forks."""
    return f"ckpt.epoch{epoch:03d}.best.pth.tar"


def written(folder: str) -> list[str]:
    """Paths of the checkpoints in a run's folder, by the names that a run gives them."""
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    return [os.path.join(folder, name) for name in names if NAME.fullmatch(name)]


def _seal(content):
    """The bytes of a zip archive without a comment, with its checksum as the comment."""
    content = content[:-2] + struct.pack("<H", len(SEAL) + DIGITS)
    return content + SEAL + hashlib.sha256(content).hexdigest().encode()


def _check_seal(content, path):
    """Compare the bytes of a file with their checksum, if they carry one.

    Raises:
        DataError: they carry a wrong one, or what is left of one.
    """
    body, seal = content[: -len(SEAL) - DIGITS], content[-len(SEAL) - DIGITS :]
    if seal.startswith(SEAL):
        if seal[len(SEAL) :] != hashlib.sha256(body).hexdigest().encode():
            raise DataError(f"{path} is damaged: its checksum does not match")
        return
    end = content.rfind(ZIP_END, -(2**16)) if content.startswith(ZIP_START) else -1
    if end >= 0 and content[end + ZIP_END_SIZE - 2 :] != b"\0\0":
        raise DataError(f"{path} is damaged: it does not end where it should")


def _read(path):
    with open(path, "rb") as file:
        return file.read()


def write(path: str, content: bytes) -> None:
    """Write a checkpoint's bytes beside `path`, read them back from there, and move them to `path`.

    The newest checkpoint is kept under the name PREVIOUS.

    Raises:
        DataError: they cannot be read back as they were written.
    """
    folder, name = os.path.split(path)

    def read_back(temporary):
        if _read(temporary) != content:
            raise DataError(f"{path} cannot be read back as it was written: nothing was replaced")
        if name == NEWEST and os.path.exists(path):
            os.replace(path, os.path.join(folder, PREVIOUS))

    write_atomically(path, lambda file: file.write(content), read_back)


def save(folder: str, names: Iterable[str], state: dict) -> None:
    """Write the dict `state` to files of these names, one after the other, each atomically."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = _seal(buffer.getvalue())
    for name in names:
        write(os.path.join(folder, name), content)


def exists(folder: str) -> bool:
    """Whether a run's folder holds a checkpoint to continue from; between two writes it is the previous one."""
    return any(os.path.exists(os.path.join(folder, name)) for name in (NEWEST, PREVIOUS))


def newest_kept(folder: str) -> str | None:
    """The path of the newest checkpoint that `epoch_name` names in a run's folder, or None."""
    named = [(NAME.fullmatch(os.path.basename(path)), path) for path in written(folder)]
    return max(((int(match[1]), path) for match, path in named if match and match[1]), default=(0, None))[1]


def load_newest(folder: str) -> tuple[str, dict] | tuple[None, None]:
    """The newest good checkpoint of a run's folder as (path, dict), or (None, None) where there is none.

    The previous one is taken, with a warning, where the newest is damaged or gone.

    Raises:
        DataError: the newest is damaged, and the previous one too.
    """
    newest, previous = os.path.join(folder, NEWEST), os.path.join(folder, PREVIOUS)
    if not os.path.exists(previous):
        return (newest, load(newest)) if os.path.exists(newest) else (None, None)
    try:
        return newest, load(newest)
    except DataError as error:
        with contextlib.suppress(DataError):
            state = load(previous)
            warn(f"{error}; continuing from the previous one, {previous}, after {state.get('epoch')} epochs")
            return previous, state
        raise


def load(path: str, bare: bool = False) -> dict:
    """The dict saved at `path`, on the CPU. The file cannot run code (weights-only loading).

    With `bare`, a file that is a state dict itself, as torchvision's are, comes as the `state_dict` of a dict.

    Raises:
        DataError: missing, damaged, or not a checkpoint, see validation.py.
    """
    return read(path, bare)[1]


def read(path: str, bare: bool = False) -> tuple[bytes, dict]:
    """The bytes of a checkpoint, to be copied by `write`, and the dict in them. As `load`."""
    if not os.path.isfile(path):
        raise DataError(f"no checkpoint at {path}")
    content = _read(path)
    _check_seal(content, path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(f"{path} is not a checkpoint, or tries to run code, or is damaged: refused") from None
    except Exception as error:  # a damaged file makes torch raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise DataError(f"{path} is damaged or not a checkpoint ({reason})") from None
    if bare and isinstance(state, dict) and state and all(isinstance(v, torch.Tensor) for v in state.values()):
        state = {"state_dict": state}
        check_weights(state["state_dict"], path)
    else:
        check_state(state, path)
    return content, state


def load_weights(model: torch.nn.Module, state_dict: dict, path: str, new_head: str | None = None) -> None:
    """Load a state dict into `model`, with or without the 'module.' prefix of DataParallel.

    `new_head` is the name of a layer that is left as the model has it where the weights have another form of it (1000
    classes, LDAM's head).

    Raises:
        DataError: names or shapes that do not fit, with the first one.
    """
    weights = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    own = model.state_dict()
    if new_head:
        weights = _with_own_head(own, weights, new_head + ".")
    for name in [*own, *weights]:
        if name not in weights or name not in own:
            where = "the checkpoint lacks" if name not in weights else "the model lacks"
            raise DataError(f"{path} does not fit this model: {where} {name}{_head_hint(own, weights)}")
        if own[name].shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)} there, {tuple(own[name].shape)} here"
            raise DataError(f"{path} does not fit this model: {name} has shape {shapes}")
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # a type of numbers that cannot be copied
        raise DataError(f"{path} does not fit this model: {str(error).splitlines()[-1].strip()}") from None


def _with_own_head(own, weights, prefix):
    def head(state):
        return {name: tensor.shape for name, tensor in state.items() if name.startswith(prefix)}

    if head(own) != head(weights):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(prefix)}
        weights |= {name: own[name] for name in head(own)}
    # torchvision's older files lack batch norm's counters
    return {**{name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")}, **weights}


def _head_hint(own, weights):
    differ = set(own) ^ set(weights)
    is_head = bool(differ) and all(name.endswith(("linear.bias", "fc.bias")) for name in differ)
    return " (one of the two has LDAM's normalised head)" if is_head else ""


def has_normalised_head(state_dict: dict) -> bool:
    """Whether the weights are of a model with LDAM's head, which has no bias."""
    return not any(name.endswith(("linear.bias", "fc.bias")) for name in state_dict)
