"""Files that are written whole or not at all, and the locks of folders. No torch."""

import contextlib
import errno
import glob
import hashlib
import os
import pathlib
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from filelock import FileLock, Timeout

from utils import DataError, one_line, warn

TEMPORARY = ".tmp"
#: Of a folder that is held: the file that is locked, and who holds it.
LOCK, OWNER = ".lock", ".owner"
#: What a file system says that has no locks.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
#: Permissions that this process does not give; reading them means setting them.
UMASK = os.umask(0o077)
os.umask(UMASK)
#: Seconds that a process waits for one that is about to end.
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
    """Hold the lock of a folder that is there; another process waits. It ends with the process, however that ends.

    In a folder that cannot be written, or on a file system without locks, it does nothing.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, NotImplementedError):
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
        for folder in {os.path.realpath(folder): os.fspath(folder) for folder in folders}.values():
            path = pathlib.Path(folder)
            for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
                missing.mkdir(exist_ok=True)
                stack.callback(_remove, missing)
            path.mkdir(exist_ok=True)  # a file in the way
            stack.enter_context(_locked(folder, patience))
            remove_temporary(folder)
        yield


@contextlib.contextmanager
def _locked(folder, patience):
    lock, owner = (os.path.join(folder, name) for name in (LOCK, OWNER))
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(FileLock(lock).acquire(timeout=patience))
            stack.callback(_remove, lock)  # while it is held: whoever waits for this file sees that it is gone
        except Timeout:
            raise DataError(f"{folder} is in use by {_read_owner(owner)}: a run has one writer") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            warn(f"{lock} cannot be locked ({error.strerror}): a second process on this run would not be noticed")
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        pathlib.Path(owner).write_text(f"process {os.getpid()} on {platform.node()}, since {since}")
        stack.callback(_remove, owner)
        yield


def _read_owner(path):
    try:
        return one_line(pathlib.Path(path).read_text(errors="replace")[:200]) or "another process"
    except OSError:
        return "another process"


def _remove(path):
    """Delete a file, or a folder that is empty."""
    with contextlib.suppress(OSError):
        os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
