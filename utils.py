"""Errors that a user sees, random generators, the device, meters.

torch is imported where it is used: `reproduce.py list` needs the errors only, and torch takes seconds.
"""

import contextlib
import functools
import hashlib
import os
import platform
import signal
import struct
import sys

import numpy as np


class UsageError(Exception):
    """A wrong flag or a combination that cannot work: one line, exit status 2."""


class DataError(Exception):
    """Missing, damaged or foreign data, a checkpoint or a folder that cannot be used: one line, exit status 1."""


def warn(message):
    """A line on standard error that starts with 'warning:'; of torchrun's ranks the first one says it."""
    if os.environ.get("RANK", "0") != "0":
        return
    print(f"warning: {one_line(message)}", file=sys.stderr, flush=True)


def command(main):
    """Decorate a script's main(argv): errors become one line on standard error and an exit status.

    UsageError ends with status 2, DataError, a refused write and too little memory with 1, SIGTERM with 143, Ctrl-C
    with 130.
    """

    @functools.wraps(main)
    def run(argv=None):
        name = os.path.basename(sys.argv[0]) if argv is None else f"{main.__module__}.py"
        previous = _raise_on_sigterm()
        try:
            return main(argv)
        except UsageError as error:
            status, message = 2, f"error: {one_line(error)}"
        except DataError as error:
            status, message = 1, f"error: {one_line(error)}"
        except OSError as error:
            reason = f"{error.filename}: {error.strerror}" if error.filename else str(error)
            status, message = 1, f"error: {one_line(reason)}"
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            status, message = 1, "error: out of memory: a smaller --batch-size needs less (so does a smaller net)"
        except Terminated as stop:
            status, message = 143, f"stopped by SIGTERM{one_line(stop)}"
        except KeyboardInterrupt as stop:
            status, message = 130, f"stopped by Ctrl-C{one_line(stop)}"
        finally:
            if previous is not None:
                with contextlib.suppress(Terminated):  # one that comes just now
                    signal.signal(signal.SIGTERM, previous)
        print(f"{name}: {message}", file=sys.stderr, flush=True)
        raise SystemExit(status)

    return run


def _is_out_of_memory(error):
    import torch

    says_so = "can't allocate memory" in str(error)  # torch's allocator on the CPU
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or says_so


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program was, so that files are closed on the way out."""


def _raise_on_sigterm():
    def stop(signum, frame):
        raise Terminated

    try:
        return signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread
        return None


def one_line(text):
    """`text` with control characters escaped, so that it stays one line and moves no cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def files_sha256(samples):
    """Hex sha256 of a line for each picture file: folder and name, class, size in bytes.

    A picture that was renamed, replaced, added or cut short shows, in a folder that was moved too.
    """
    digest = hashlib.sha256()
    for path, label in samples:
        name = "/".join(os.path.normpath(path).split(os.sep)[-2:])
        digest.update(f"{name}\0{label}\0{os.path.getsize(path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


@contextlib.contextmanager
def locked(folder):
    """Hold the lock of a folder; another process waits. It ends with the process, and leaves no file.

    On a file system without locks it does nothing.
    """
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def open_picture(path):
    """A picture file as an RGB PIL image; greyscale becomes RGB.

    Raises:
        DataError: it cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded ({str(error).replace(repr(path), 'the file')})") from None


# ---------------------------------------------------------------------------------------------- randomness


def epoch_seed(seed, epoch):
    """A 63-bit seed for epoch `epoch` of a run with `seed`; different pairs give unrelated seeds."""
    words = np.random.SeedSequence([seed, epoch]).generate_state(2)
    return (int(words[0]) << 31) ^ int(words[1])


def epoch_generator(seed, epoch):
    """The CPU generator of everything drawn in that epoch."""
    import torch

    return torch.Generator().manual_seed(epoch_seed(seed, epoch))


def draw_seed():
    """A seed from the operating system, in [0, 2 ** 31)."""
    return int.from_bytes(os.urandom(4), "little") >> 1


# -------------------------------------------------------------------------------------------------- device


def choose_device(gpu=None):
    """`--gpu N`: that CUDA device. None: the first CUDA device, else the CPU.

    Returns the CPU for an index on a machine without CUDA (the script warns).

    Raises:
        UsageError: an index beyond the cards that are there, or a negative one.
    """
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpu is not None and (gpu < 0 or 0 < count <= gpu):
        raise UsageError(f"--gpu {gpu}: this machine has {count} CUDA device{'s' * (count != 1)}, counted from 0")
    return torch.device("cuda", gpu or 0) if count else torch.device("cpu")


def versions():
    """Versions and machine facts that a run records."""
    import torch
    import torchvision

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def code_version():
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


def duration(seconds):
    """Seconds as '1:02:03'.

    >>> duration(3723.4)
    '1:02:03'
    """
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
