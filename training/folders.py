"""The folders of a run: made all or none, and written by one process at a time."""

import contextlib
import fcntl
import json
import os
import pathlib
import platform
import time

from training import checkpoint
from utils import DataError, one_line, warn

LOCK = ".lock"
#: Seconds that a process waits for one that is about to end, or for the last children of one that was killed.
PATIENCE = 5.0


@contextlib.contextmanager
def claimed(*folders, patience=PATIENCE):
    """Make the folders of a run and hold them against other processes; what stays empty is removed at the end.

    A folder's lock is a lock of the operating system on the file LOCK in it, which ends with its process, however
    that ends; the process id and the host in the file are for the message. Half-written files of a killed process
    are removed.

    Raises:
        DataError: another process holds one of the folders, still after `patience` seconds. OSError: a folder that
            cannot be made.
    """
    with contextlib.ExitStack() as stack:
        for folder in {os.path.realpath(folder): folder for folder in folders}.values():
            path = pathlib.Path(folder)
            for missing in reversed([p for p in (path, *path.parents) if not p.exists()]):
                missing.mkdir(exist_ok=True)
                stack.callback(_remove_if_empty, missing)
            path.mkdir(exist_ok=True)  # a file in the way
            stack.enter_context(_locked(folder, patience))
            checkpoint.remove_temporary(folder)
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
            print(f"taken over: the lock that {one_line(left)} left in {one_line(folder)}", flush=True)
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
                raise DataError(f"{folder} is in use by {owner}: one run, one writer") from None
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
