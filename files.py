"""Files that are written whole or not at all, and the locks of folders. No torch."""

import contextlib
import fcntl
import glob
import hashlib
import json
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from utils import DataError, one_line, warn

TEMPORARY = ".tmp"
LOCK = ".lock"
#: Permissions that this process does not give; reading them means setting them.
UMASK = os.umask(0o077)
os.umask(UMASK)
#: Seconds that a process waits for one that is about to end, or for the last children of one that was killed.
PATIENCE = 5.0


# ------------------------------------------------------------------------------------------------- writing


def write_atomically(
    path: str | os.PathLike, write: Callable[[IO[bytes]], Any], check: Callable[[str], None] | None = None
) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to the disk, and move it to `path`.

    `check(name of the temporary file)` is called in between. An OSError names `path`.
    """
    folder = os.path.dirname(os.path.abspath(path))
    with errors_name(path):
        handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{os.path.basename(path)}.", suffix=TEMPORARY)
    try:
        with errors_name(path), os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(temporary)
        with errors_name(path):
            os.chmod(temporary, 0o666 & ~UMASK)  # a temporary file is the owner's alone
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # stopped just after it was moved
            os.unlink(temporary)
        raise


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8, atomically."""
    write_atomically(path, lambda file: file.write(text.encode(errors="surrogateescape")))


@contextlib.contextmanager
def errors_name(path: str | os.PathLike) -> Iterator[None]:
    """A full disk raises an OSError without a file: name the one that was to be written."""
    try:
        yield
    except OSError as error:
        if error.filename is None or str(error.filename).endswith(TEMPORARY):
            error.filename = os.fspath(path)
        raise


def remove_temporary(folder: str | os.PathLike) -> None:
    """Delete what a killed `write_atomically` left in `folder`."""
    for path in glob.glob(os.path.join(glob.escape(os.fspath(folder)), f".*{TEMPORARY}")):
        os.unlink(path)


def files_sha256(samples: Iterable[tuple[str, int]]) -> str:
    """Hex sha256 of a line for each (image file, class): folder and name, class, size in bytes.

    An image that was renamed, replaced by one of another size, added or cut short changes it; moving the whole folder
    does not.
    """
    digest = hashlib.sha256()
    for path, label in samples:
        name = "/".join(os.path.normpath(path).split(os.sep)[-2:])
        digest.update(f"{name}\0{label}\0{os.path.getsize(path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- locks


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Hold the lock of a folder that is there; another process waits. It ends with the process and leaves no file.

    On a file system without locks it does nothing.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def run_lock(*folders: str | os.PathLike, patience: float = PATIENCE) -> Iterator[None]:
    """Make the folders of a run and hold them against other processes; folders that stay empty are removed at the end.

    The lock is one of the operating system on the file LOCK in each folder. It ends with its process, however that
    ends; the process id and the host in the file are for the message. Half-written files of a killed process
    are removed.

    Raises:
        DataError: another process holds one of the folders, still after `patience` seconds. OSError: a folder that
            cannot be made.
    """
    with contextlib.ExitStack() as stack:
        for folder in {os.path.realpath(folder): os.fspath(folder) for folder in folders}.values():
            path = pathlib.Path(folder)
            for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
                missing.mkdir(exist_ok=True)
                stack.callback(_remove_if_empty, missing)
            path.mkdir(exist_ok=True)  # a file in the way
            stack.enter_context(_locked(folder, patience))
            remove_temporary(folder)
        yield


def _remove_if_empty(folder):
    with contextlib.suppress(OSError):
        os.rmdir(folder)


@contextlib.contextmanager
def _locked(folder, patience):
    path = os.path.join(folder, LOCK)
    with _take(folder, path, patience) as file:
        left = _owner(file)
        if left:
            print(f"took over the lock that {one_line(left)} left in {one_line(folder)}", flush=True)
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": platform.node(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}, file)
        file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


def _take(folder, path, patience):
    """The lock file, open and held."""
    give_up = time.monotonic() + patience
    while True:
        os.makedirs(folder, exist_ok=True)  # whoever made it may have removed it just now
        file = open(path, "a+")  # noqa: SIM115
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = _owner(file) or "another process"
            file.close()
            if time.monotonic() > give_up:
                raise DataError(f"{folder} is in use by {owner}: a run has one writer") from None
            time.sleep(0.05)
            continue
        except OSError as error:
            warn(f"{path} cannot be locked ({error.strerror}): a second process on this run would not be noticed")
            return file
        if os.path.exists(path) and os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
        file.close()  # the one that held it has removed it


def _owner(file):
    """Who wrote the lock file, as text; empty for nobody."""
    file.seek(0)
    try:
        owner = json.loads(file.read(1000))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return ""
