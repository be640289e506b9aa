"""Checkpoints: written whole or not at all, loaded without running code from the file."""

import os
import pickle
import tempfile

import torch

from utils import DataError

NEWEST, BEST = "ckpt.pth.tar", "ckpt.best.pth.tar"


def epoch_name(epoch):
    """File name of the checkpoint kept after `epoch` completed epochs.

    >>> epoch_name(20)
    'ckpt.epoch020.pth.tar'
    """
    return f"ckpt.epoch{epoch:03d}.pth.tar"


def best_name(epoch):
    """File name of the best checkpoint of the first `epoch` epochs, kept beside `epoch_name`, for forks."""
    return f"ckpt.epoch{epoch:03d}.best.pth.tar"


def write_atomically(path, write):
    """Call `write(file)` on a temporary file beside `path`, flush it to the disk, and move it to `path`."""
    folder = os.path.dirname(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=os.path.basename(path) + ".")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def save(path, state):
    """Write the dict `state` to `path`, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path):
    """The dict saved at `path`, on the CPU. The file cannot run code (weights-only loading).

    Raises:
        DataError: missing, truncated, not a checkpoint, or no `state_dict` in it.
    """
    if not os.path.isfile(path):
        raise DataError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(f"{path} is no checkpoint, or one that wants to run code, or is damaged: refused") from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path} is damaged or no checkpoint ({str(error).splitlines()[0][:120]})") from None
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise DataError(f"{path} holds no training checkpoint: it has no 'state_dict'")
    return state


def load_weights(model, state_dict, path):
    """Load a state dict into `model`, with or without the 'module.' prefix of DataParallel.

    Raises:
        DataError: names or shapes that do not fit, with the first one.
    """
    weights = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    own = model.state_dict()
    for name in [*own, *weights]:
        if name not in weights or name not in own:
            where = "the checkpoint lacks" if name not in weights else "the net lacks"
            raise DataError(f"{path} does not fit this net: {where} {name}{_head_hint(own, weights)}")
        if own[name].shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)} there, {tuple(own[name].shape)} here"
            raise DataError(f"{path} does not fit this net: {name} has shape {shapes}")
    model.load_state_dict(weights)


def _head_hint(own, weights):
    differ = [name for name in (set(own) ^ set(weights)) if name.endswith(("linear.bias", "fc.bias"))]
    return " (one of the two has LDAM's normalised head)" if differ else ""


def has_normalised_head(state_dict):
    """Whether the weights are of a net with LDAM's head, which has no bias."""
    return not any(name.endswith(("linear.bias", "fc.bias")) for name in state_dict)
