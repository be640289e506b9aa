"""Files that are written whole or not at all, and the locks of folders. No torch."""

import contextlib
import glob
import hashlib
import os
import pathlib
import platform
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from filelock import FileLock, Timeout

from utils import DataError, one_line

TEMPORARY = ".tmp"
#: Of a folder that is held: the file that is locked, and who holds it.
LOCK, OWNER = ".lock", ".owner"
#: Seconds that a process waits for one that is about to end.
PATIENCE = 5.0


# ------------------------------------------------------------------------------------------------- writing


def write_atomically(path: str | os.PathLike, write: Callable[[IO[bytes]], Any]) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to the disk, and move it to `path`.

    An OSError names `path`.
    """
    folder, name = os.path.split(os.path.abspath(path))
    temporary = os.path.join(folder, f".{name}.{os.getpid()}{TEMPORARY}")
    try:
        with errors_name(path):
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
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


def files_sha256(samples: Iterable[tuple[str, int]]) -> str:
    """Hex sha256 of a line for each (image file, class): folder and name, class, size in bytes.

    An image that was renamed, replaced by one of another size, added or cut short changes it; moving or renaming the
    folder that holds them all does not.
    """
    images, digest = [(os.path.abspath(path), label) for path, label in samples], hashlib.sha256()
    root = os.path.commonpath([os.path.dirname(path) for path, _ in images])
    for path, label in images:
        name = "/".join(path.removeprefix(root).strip(os.sep).split(os.sep)[-2:])
        digest.update(f"{name}\0{label}\0{os.path.getsize(path)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------- locks


@contextlib.contextmanager
def folder_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Hold the lock of a folder, which is made where it is missing; another process waits. It does nothing in a folder
    that is read-only."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(FileLock(os.path.join(folder, LOCK)))
            stack.callback(_remove, os.path.join(folder, LOCK))
        yield


@contextlib.contextmanager
def run_lock(*folders: str | os.PathLike, patience: float = PATIENCE) -> Iterator[None]:
    """Make the folders of a run and hold them against other processes; folders that stay empty are removed at the end.

    The lock ends with its process, however that ends; the process id and the host in OWNER are for the message.
    Temporary files of a killed process are removed.

    Raises:
        DataError: another process holds one of the folders, still after `patience` seconds. OSError: a folder that
            cannot be made.
    """
    with contextlib.ExitStack() as stack:
        for folder in {os.path.realpath(folder): pathlib.Path(folder) for folder in folders}.values():
            for missing in reversed([path for path in (folder, *folder.parents) if not path.exists()]):
                missing.mkdir(exist_ok=True)
                stack.callback(_remove, missing)
            folder.mkdir(exist_ok=True)  # a file in the way
            lock, owner = folder / LOCK, folder / OWNER
            try:
                with errors_name(lock):
                    stack.enter_context(FileLock(lock).acquire(timeout=patience))
            except Timeout:
                raise DataError(f"{folder} is in use by {_read(owner)}: only one process may write to a run") from None
            stack.callback(_remove, lock)  # while it is held: whoever waits for this file sees that it is gone
            since = time.strftime("%Y-%m-%d %H:%M:%S")
            owner.write_text(f"process {os.getpid()} on {platform.node()}, since {since}")
            stack.callback(_remove, owner)
            for path in glob.glob(f".*{TEMPORARY}", root_dir=folder):
                (folder / path).unlink()
        yield


def _read(owner):
    try:
        return one_line(owner.read_text()) or "another process"
    except OSError:
        return "another process"


def _remove(path):
    """Delete a file, or a folder that is empty."""
    with contextlib.suppress(OSError):
        os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
