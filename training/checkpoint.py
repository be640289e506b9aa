"""Checkpoints: written whole or not at all, loaded without running code from the file."""

import contextlib
import glob
import os
import pickle
import shutil
import tempfile
import warnings

import torch

from utils import DataError

NEWEST, BEST = "ckpt.pth.tar", "ckpt.best.pth.tar"
TEMPORARY = ".tmp"


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
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.", suffix=TEMPORARY)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # stopped just after it was moved
            os.unlink(temporary)
        raise


def remove_temporary(folder):
    """Delete what a killed `write_atomically` left in `folder`."""
    for path in glob.glob(os.path.join(glob.escape(folder), f".*{TEMPORARY}")):
        os.unlink(path)


def copy(source, path):
    """Copy a file to `path`, atomically."""
    with open(source, "rb") as original:
        write_atomically(path, lambda file: shutil.copyfileobj(original, file))


def save(path, state):
    """Write the dict `state` to `path`, atomically."""
    write_atomically(path, lambda file: torch.save(state, file))


def load(path, bare=False):
    """The dict saved at `path`, on the CPU. The file cannot run code (weights-only loading).

    With `bare`, a file that is a state dict itself, as torchvision's are, comes as the `state_dict` of a dict.

    Raises:
        DataError: missing, truncated, not a checkpoint, or no `state_dict` in it.
    """
    if not os.path.isfile(path):
        raise DataError(f"no checkpoint at {path}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise DataError(f"{path} is no checkpoint, or one that wants to run code, or is damaged: refused") from None
    except Exception as error:  # a damaged file makes torch raise nearly anything
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        raise DataError(f"{path} is damaged or no checkpoint ({reason})") from None
    if bare and isinstance(state, dict) and state and all(isinstance(v, torch.Tensor) for v in state.values()):
        return {"state_dict": state}
    if not isinstance(state, dict) or not isinstance(state.get("state_dict"), dict):
        raise DataError(f"{path} holds no training checkpoint: it has no 'state_dict'")
    _check_parts(state, path)
    return state


def _check_parts(state, path):
    """Refuse a file whose parts are not what a checkpoint's are."""
    epoch, history = state.get("epoch", 0), state.get("history", [])
    parts = {"train", "test", "stage", "epoch", "time", "score"}
    good = {
        "state_dict": all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state["state_dict"].items()),
        "epoch": isinstance(epoch, int) and epoch >= 0,
        "settings": isinstance(state.get("settings", {}), dict),
        "history": isinstance(history, list) and all(isinstance(r, dict) and parts <= r.keys() for r in history),
    }
    bad = [name for name, is_good in good.items() if not is_good]
    if bad:
        raise DataError(f"{path} holds no training checkpoint of ours: its {bad[0]!r} is not one")


def load_weights(model, state_dict, path, new_head=False):
    """Load a state dict into `model`, with or without the 'module.' prefix of DataParallel.

    With `new_head`, a last layer `fc` of another form (1000 classes, LDAM's head) is left as the net has it.

    Raises:
        DataError: names or shapes that do not fit, with the first one.
    """
    weights = {name.removeprefix("module."): tensor for name, tensor in state_dict.items()}
    own = model.state_dict()
    if new_head:
        weights = _with_own_head(own, weights)
    for name in [*own, *weights]:
        if name not in weights or name not in own:
            where = "the checkpoint lacks" if name not in weights else "the net lacks"
            raise DataError(f"{path} does not fit this net: {where} {name}{_head_hint(own, weights)}")
        if own[name].shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)} there, {tuple(own[name].shape)} here"
            raise DataError(f"{path} does not fit this net: {name} has shape {shapes}")
    model.load_state_dict(weights)


def _with_own_head(own, weights):
    def head(state):
        return {name: tensor.shape for name, tensor in state.items() if name.startswith("fc.")}

    if head(own) != head(weights):
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith("fc.")}
        weights |= {name: own[name] for name in head(own)}
    # torchvision's older files lack batch norm's counters
    return {**{name: tensor for name, tensor in own.items() if name.endswith("num_batches_tracked")}, **weights}


def _head_hint(own, weights):
    differ = [name for name in (set(own) ^ set(weights)) if name.endswith(("linear.bias", "fc.bias"))]
    return " (one of the two has LDAM's normalised head)" if differ else ""


def has_normalised_head(state_dict):
    """Whether the weights are of a net with LDAM's head, which has no bias."""
    return not any(name.endswith(("linear.bias", "fc.bias")) for name in state_dict)
