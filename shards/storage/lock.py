"""A lock on an output folder, so that two commands do not write into it at once.

`FOLDER/.lock` holds the host and the process that write there, as JSON; it is empty when nobody does. Where the file
system offers flock (2), the kernel keeps the lock and gives it up when its process ends, however it ends. Where it does
not, and between hosts that may not see each other's flock, the holder touches the file every few seconds: a lock
that nobody touches is stale and is taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from shards.documents import read_document
from shards.errors import UserError
from shards.storage.entries import require_own_files

NAME = ".lock"
BEAT = 5.0
"""Seconds between two touches of a lock."""
STALE_AFTER = 6
"""Beats without a touch after which another host's lock is stale."""
_KEPT_BY_OTHERS = ("wandb/",)
"""Folders in which libraries that follow a run make links of their own."""
_MOST_BYTES = 4096
"""Bytes of a lock file that are read; ours have some hundred."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that holds a lock."""

    host: str
    """Name of its machine."""
    pid: int
    """Its number there."""
    started: str
    """Boot of the machine and start of the process, which tell it from a later process of the same number."""


class FolderLock:
    """Within this context no other process that takes the lock writes into a folder, which must be there.

    Raises:
        UserError: another process writes there, or a link in it leads elsewhere.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / NAME
        self._own = this_process()
        self._descriptor = -1
        self._released = threading.Event()
        self._beating: threading.Thread | None = None

    def __enter__(self) -> Self:
        require_own_files(self._path.parent, foreign=_KEPT_BY_OTHERS)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._descriptor = os.open(self._path, flags, 0o644)
        try:
            self._take()
        except BaseException:
            os.close(self._descriptor)
            raise
        self._beating = threading.Thread(target=self._beat, daemon=True)
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._released.set()
        assert self._beating is not None
        self._beating.join()
        if self.is_held():
            os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)

    def is_held(self) -> bool:
        """Return whether the lock is still this process's: another host may have taken it from a process that slept."""
        return self._holder() == self._own

    def require_held(self) -> None:
        """Make sure, before something is published in the folder, that the lock is still this process's.

        Raises:
            UserError: another host has taken it over.
        """
        holder = self._holder()
        if holder != self._own:
            raise UserError(
                f"{self._path.parent} was taken over by {_named(holder)} while this process stood still; nothing "
                "more is written, let that one finish"
            )

    def _take(self) -> None:
        """Take the lock, or raise `UserError` if its holder lives."""
        kernel_grants = True
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(self._refusal(self._holder())) from None
        except OSError:
            kernel_grants = False  # not offered by this file system
        holder = self._holder()
        if holder is not None and self._lives(holder, kernel_grants=kernel_grants):
            raise UserError(self._refusal(holder))
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, json.dumps(asdict(self._own)).encode(), 0)

    def _lives(self, holder: Holder, *, kernel_grants: bool) -> bool:
        if holder.host == self._own.host:
            return not kernel_grants and is_running(holder)
        # The hosts' clocks may differ, so the time of the last touch is compared with itself alone.
        touched = os.fstat(self._descriptor).st_mtime_ns
        for _ in range(STALE_AFTER):
            time.sleep(BEAT)
            if os.fstat(self._descriptor).st_mtime_ns != touched:
                return True
        return False

    def _holder(self) -> Holder | None:
        content = os.pread(self._descriptor, _MOST_BYTES, 0)
        # What is no holder was cut short by a crash, or is not ours.
        with contextlib.suppress(UserError):
            return read_document(content, Holder, name=self._path)
        return None

    def _refusal(self, holder: Holder | None) -> str:
        return f"{self._path.parent} is being written by {_named(holder)}; wait for it, stop it, or name another --out"

    def _beat(self) -> None:
        while not self._released.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._descriptor)


def _named(holder: Holder | None) -> str:
    return "another process" if holder is None else f"process {holder.pid} on {holder.host}"


def this_process() -> Holder:
    """Return this process as the holder of a lock."""
    return Holder(host=socket.gethostname(), pid=os.getpid(), started=_started(os.getpid()))


def is_running(holder: Holder) -> bool:
    """Return whether a process of this machine still runs."""
    try:
        os.kill(holder.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs, as another user
    return _started(holder.pid) == holder.started


def _started(pid: int) -> str:
    """Boot and start time of a process; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # What follows the program's name, which may hold blanks and brackets; the start is field 22 of the line.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return f"{boot} {fields[19]}"
