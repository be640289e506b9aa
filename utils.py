"""Errors that a user sees, random generators, the device, numbers as users read them.

torch is imported where it is used: `reproduce.py list` needs the errors only, and torch takes seconds.
"""

import argparse
import contextlib
import errno
import functools
import io
import math
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    import torch


class UsageError(ValueError):
    """A wrong value, or values that cannot be used together. A command prints one line and exits with status 2."""


class DataError(Exception):
    """Data, a checkpoint or a folder that cannot be used. A command prints one line and exits with status 1."""


class NothingToDo(Exception):
    """Nothing is left to do. A command prints one line on standard output and exits with status 0."""


def warn(message: str) -> None:
    """Print 'warning: message' as one line on standard error. Under torchrun only rank 0 prints."""
    if os.environ.get("RANK", "0") != "0" and os.environ.get("WORLD_SIZE", "1") != "1":
        return
    print(f"warning: {one_line(message)}", file=sys.stderr, flush=True)


def command(main: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a script's main(argv): errors become one line on standard error and an exit status.

    NothingToDo exits with status 0, UsageError with 2, DataError, an OSError or too little memory with 1. Ctrl-C exits
    with 130, SIGTERM with 143, SIGHUP (a closed terminal) with 129, a closed pipe with 141. Other errors are raised.
    """

    @functools.wraps(main)
    def run(argv=None):
        name = os.path.basename(sys.argv[0]) if argv is None else f"{main.__module__}.py"
        signal.signal(signal.SIGTERM, _raise_terminated)
        hung_up = getattr(signal, "SIGHUP", None)  # the terminal was closed; Windows has none
        if hung_up and signal.getsignal(hung_up) == signal.SIG_DFL:  # nohup ignores it
            signal.signal(hung_up, _raise_terminated)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # print what the terminal's encoding lacks as escapes
                stream.reconfigure(errors="backslashreplace")
        try:
            result = main(argv)
            sys.stdout.flush()  # here, where a reader that has gone is seen
            return result
        except NothingToDo as done:
            print(one_line(done), flush=True)
            return None
        except UsageError as error:
            status, message = 2, f"error: {one_line(error)}"
        except DataError as error:
            status, message = 1, f"error: {one_line(error)}"
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush fails again
            raise SystemExit(141) from None
        except OSError as error:
            is_disk = error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT)
            where = error.filename or ("standard output, or an open file" if is_disk else None)
            text = f"{os.fspath(where)}: {error.strerror}" if where and error.strerror else error
            status, message = 1, f"error: {one_line(text)}"
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            status, message = 1, "error: out of memory: a smaller --batch-size or a smaller model needs less"
        except Terminated as stop:
            status, message = 128 + stop.signal, f"stopped by {stop.signal.name}{one_line(stop)}"
        except KeyboardInterrupt as stop:
            status, message = 130, f"stopped by Ctrl-C{one_line(stop)}"
        print(f"{name}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(status)

    return run


def _is_out_of_memory(error):
    import torch

    # of torch's allocator on the CPU, of CUDA where a context or cuBLAS needs memory
    says_so = any(text in str(error) for text in ("can't allocate memory", "out of memory", "ALLOC_FAILED"))
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or says_so


class Terminated(KeyboardInterrupt):
    """SIGTERM, or SIGHUP, raised where the program was, so that files are closed on the way out."""

    signal: signal.Signals


def _raise_terminated(signum, frame):
    stop = Terminated()
    stop.signal = signal.Signals(signum)
    raise stop


def one_line(text: object) -> str:
    """`text` with control characters escaped, so that it stays one line and moves no cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def named(names: Sequence[str], separator: str = ", ") -> str:
    """The first five names, joined and safe to print, and the number of the others.

    >>> named("abcdefg")
    'a, b, c, d, e and 2 more'
    """
    limit = 5
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return separator.join(one_line(name) for name in names[:limit]) + more


#: Keeps the layout of a script's docstring.
HelpFormatter = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=28)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {one_line(message)} (--help lists the flags)", file=sys.stderr)
        raise SystemExit(2)


def number(
    kind: type, low: float = -math.inf, high: float = math.inf, above: float = -math.inf
) -> Callable[[str], Any]:
    """An argparse type: a finite number within bounds.

    Args:
        kind: int or float.
        low, high: smallest and largest number allowed.
        above: a bound that is not allowed itself.
    """

    def convert(text):
        value = kind(text)
        if not (low <= value <= high and above < value < math.inf):
            bounds = {"over": above, "at least": low, "at most": high}
            wanted = " and ".join(f"{word} {bound}" for word, bound in bounds.items() if abs(bound) < math.inf)
            raise argparse.ArgumentTypeError(f"{text} is not allowed: it must be {wanted}")
        return value

    convert.__name__ = kind.__name__
    return convert


@contextlib.contextmanager
def network_timeout() -> Iterator[None]:
    """For downloads by libraries that set none: a blocked network would hang for minutes, a stalled one for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)  # seconds
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def path(text: str) -> str:
    """An argparse type: a path. An empty value is an error, such as that of an unset shell variable."""
    if not text:
        raise argparse.ArgumentTypeError("an empty value")
    return text


# ---------------------------------------------------------------------------------------------- randomness


def epoch_seed(seed: int, epoch: int) -> int:
    """A 63-bit seed for epoch `epoch` of a run with `seed`; different pairs give unrelated seeds."""
    words = np.random.SeedSequence([seed, epoch]).generate_state(2)
    return (int(words[0]) << 31) ^ int(words[1])


def epoch_generator(seed: int, epoch: int) -> "torch.Generator":
    """The CPU generator of everything drawn in that epoch."""
    import torch

    return torch.Generator().manual_seed(epoch_seed(seed, epoch))


# -------------------------------------------------------------------------------------------------- device


def choose_device(gpu: int | None = None) -> "torch.device":
    """`--gpu N`: that CUDA device. None: the first CUDA device, else the CPU.

    Returns the CPU for an index on a machine without CUDA (the script warns).

    Raises:
        UsageError: a negative index, or one that is not below the number of CUDA devices; MPS without a device.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is not None and (gpu < 0 or 0 < count <= gpu):
        raise UsageError(f"--gpu {gpu}: this machine has {count} CUDA device{'s' * (count != 1)}, counted from 0")
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")
    if not count and os.environ.get("CUDA_MPS_PIPE_DIRECTORY") and not is_hidden:
        raise UsageError("CUDA_MPS_PIPE_DIRECTORY is set, but CUDA finds no device: see the logs of MPS, or unset it")
    return torch.device("cuda", gpu or 0) if count else torch.device("cpu")


def versions() -> dict[str, str]:
    """Versions and machine facts that a run records; with a GPU also CUDA's, and whether convolutions use TF32."""
    import torch
    import torchvision

    facts = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which checkpoints may not hold
        "torchvision": str(torchvision.__version__),
        "numpy": str(np.__version__),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        has_tf32 = torch.cuda.get_device_capability() >= (8, 0)  # older cards compute in float32 whatever is allowed
        tf32 = "on" if has_tf32 and torch.backends.cudnn.allow_tf32 else "off"
        cuda, cudnn = str(torch.version.cuda), str(torch.backends.cudnn.version())
        facts |= {"cuda": cuda, "cudnn": cudnn, "tf32": tf32}
    return facts


def code_version() -> dict[str, str | bool] | None:
    """Git commit of this checkout and whether its tracked files are unchanged; None without git or a checkout."""
    import subprocess

    def git(*arguments):
        command = ["git", "-C", os.path.dirname(os.path.abspath(__file__)), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("rev-parse", "HEAD")
        return {"commit": commit, "clean": not git("status", "--porcelain", "--untracked-files=no")}
    except (OSError, subprocess.CalledProcessError):
        return None


def format_metric(value: float | None) -> str:
    """A figure as text: 'n/a' for None.

    >>> format_metric(78.256), format_metric(None)
    ('78.26', 'n/a')
    """
    return "n/a" if value is None else f"{value:.2f}"
