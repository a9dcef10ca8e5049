"""The lock of a run directory: one training in it at a time; one that a kill has left behind is taken over.

It has host, pid and when that process began, so that a process that has the number again is not taken for it.
"""

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lsep import files
from lsep.errors import UserError, one_line, shown
from lsep.voice import heard


@contextlib.contextmanager
def locked(path: Path, lock_file: Path) -> Iterator[None]:
    """Around a training: no other one can run in the directory `path`. A lock left behind by a kill is taken over.

    Raises UserError where the directory is in use, may be so on another host, or cannot be written.
    """
    made = not path.exists()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with _alone(path):
            _end_stale(path, lock_file)
            _write(lock_file)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    try:
        yield
    finally:
        lock_file.unlink(missing_ok=True)
        if made:
            with contextlib.suppress(OSError):  # what was refused leaves nothing behind
                path.rmdir()


def _write(lock_file: Path) -> None:
    entry = {**_this_process(), "since": time.strftime("%Y-%m-%d %H:%M:%S %Z")}
    with lock_file.open("x") as file:
        try:
            file.write(json.dumps(entry) + "\n")
            file.flush()
        except OSError:
            lock_file.unlink()
            raise


def _end_stale(path: Path, lock_file: Path) -> None:
    """Remove the lock of a process that is gone; raises UserError where it is there, or where nobody can tell."""
    if not lock_file.exists():
        return
    try:
        holder = json.loads(files.read_plain(lock_file))
        host, pid, since = holder["host"], int(holder["pid"]), holder["since"]
        start = holder["start"]
        if not (isinstance(since, str) and one_line(since) and abs(pid) < 2**62):
            raise ValueError("since")
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        raise UserError(f"{lock_file}: not a lock of this program; remove it if no training runs in {path}") from None
    who = f"process {pid} on host {shown(host)} since {since[:80]}"
    if host != socket.gethostname():
        raise UserError(
            f"{path} is in use by {who}: choose another --run-dir, or remove {lock_file} if that training is over"
        )
    if start == _start_of(pid):
        raise UserError(f"{path} is in use by {who}: wait for it, stop it, or choose another --run-dir")
    if heard("warning"):
        print(f"{path}: taking over the lock of {who}, which is gone", flush=True)
    lock_file.unlink()


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "start": _start_of(os.getpid())}


def _start_of(pid: int) -> int | None:
    """When a process of this host began, in clock ticks since boot, so that one with its number again is not it.

    None where there is none; 0 for one of a system without /proc.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        return int(text.rpartition(")")[2].split()[19])  # the name before may hold spaces
    except OSError:
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return 0


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """No other process of this host is in here for `folder`: two that find the same stale lock come one by one."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # not every file system has it
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
