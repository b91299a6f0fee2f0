"""Leases: who is working on what, so that workers do not do the same work twice.

A lease is a small file that its owner keeps rewriting with a growing beat. Nobody compares clocks: a lease counts
as dead when an onlooker has seen the same beat for `patience` seconds of its own time, or when its owner was a
process of this host that no longer runs. Leases only save work; what is correct is decided by the commit records.
"""

import json
import os
import re
import socket
import threading
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Self

from shards import Location, RemoteError, StoreDamagedError, UserError, publish_bytes, read_document
from shards.metadata.layout import WORK_DIR
from shards.storage.location import move, read_object, remove_matching

_LEASE = re.compile(r"[a-z0-9-]+\.json(\.[0-9a-f]{32}\.expired)?")
"""Names of leases, and of dead ones that somebody was taking over when he died too."""
_MOST_PROCESSES = 1 << 31
_WORK = re.compile(rf"leases/{_LEASE.pattern}|failures/\d{{5,}}\.json|linked")


@dataclass(frozen=True)
class Owner:
    """A process that may hold leases.

    Attributes:
        host: Machine and process namespace; process ids can be compared within it.
        pid: Process id on that host.
        born: When the process began, in ticks of the host's kernel; tells it from a later one of the same id.
        name: Name that is shown to people.
    """

    host: str
    pid: int
    born: str
    name: str

    @classmethod
    def this_process(cls, name: str) -> Self:
        """Return the running process."""
        return cls(host=_host(), pid=os.getpid(), born=_born(os.getpid()) or "", name=name)

    def known_dead(self) -> bool:
        """Return whether it was a process of this host and does not run any more."""
        return self.host == _host() and _born(self.pid) != self.born


@dataclass(frozen=True)
class Lease:
    """What the file of a lease says.

    Attributes:
        owner: Who holds it.
        token: Tells this owner's leases from those of any other.
        beat: Grows while the owner lives.
    """

    owner: Owner
    token: str
    beat: int


def require_nobody_at_work(store: Location, wait: float, *, what: str, own: str | None = None) -> None:
    """Refuse to touch a store that somebody is writing.

    Args:
        store: The store.
        wait: Seconds to watch leases of other hosts for a new beat.
        what: What is to be done with it, such as "cleaned".
        own: A lease that the caller holds.

    Raises:
        UserError: Naming the workers that hold leases.
    """
    alive = Leases(store, Owner.this_process("onlooker")).living(wait)
    alive.pop(own or "", None)
    if alive:
        some = ", ".join(f"{name} ({lease})" for lease, name in list(alive.items())[:4])
        raise UserError(f"a store can be {what} when nobody writes it, {some} is at work; stop it or wait")


def remove_work(store: Location) -> None:
    """Remove what workers keep in `WORK_DIR` while they write a store: leases, failures and trials of links."""
    remove_matching(store / WORK_DIR, _WORK)


def remove_if_empty(folder: Location) -> None:
    """Remove the folders of leases and failures in `WORK_DIR`, unless somebody uses them."""
    for path in (folder / "leases", folder / "failures", folder):
        with suppress(OSError):  # somebody came between the look and the removal
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


@cache
def _host() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        namespace = f"{boot}/{Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        namespace = ""  # no Linux: the host's name has to do
    return f"{socket.gethostname()}/{namespace}"


def _born(pid: int) -> str | None:
    try:
        # Field 22 of /proc/PID/stat, counted behind the command in brackets; see proc_pid_stat(5).
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return ""
    return ""


@dataclass
class _Sighting:
    """What an onlooker last saw of another's lease."""

    beat: tuple[str, int]
    since: float


class Leases:
    """The leases that this process holds, and its view of the others'.

    Args:
        store: Folder of the store.
        owner: This process.
        patience: Seconds without a beat after which another's lease counts as dead.
    """

    def __init__(self, store: Location, owner: Owner, *, patience: float = 30.0) -> None:
        self.folder = store / WORK_DIR / "leases"
        self.owner = owner
        self.patience = patience
        self._held: dict[str, Location] = {}
        self._sightings: dict[str, _Sighting] = {}
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._beat = 0
        self._token = uuid.uuid4().hex
        self._heart = threading.Thread(target=self._keep_beating, name="lease-heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._heart.join()
        for name in list(self._held):
            self.release(name)

    def take(self, name: str) -> bool:
        """Take the lease of this name unless somebody alive holds it; says whether it worked."""
        path = self.folder / f"{name}.json"
        if path.exists():
            if not self._looks_dead(name, path):
                return False
            # Of several onlookers one succeeds in moving the dead lease away; on a server, where moving is two
            # steps, rarely two, and a shard is encoded twice.
            expired = f"{path.name}.{uuid.uuid4().hex}.expired"
            try:
                move(self.folder, path.name, expired)
            except FileNotFoundError:
                return False
            (self.folder / expired).unlink(missing_ok=True)
        try:
            if not publish_bytes(path, self._content()):
                return False
        except FileNotFoundError:
            return False  # the store was finished meanwhile, and the folder of leases removed
        with self._lock:
            self._held[name] = path
        self._sightings.pop(name, None)
        return True

    def release(self, name: str) -> None:
        """Give a lease back, unless it has been taken over meanwhile."""
        with self._lock:
            path = self._held.pop(name, None)
            if path is not None and self._is_mine(path):
                path.unlink(missing_ok=True)

    def living(self, wait: float) -> dict[str, str]:
        """Return the leases whose owners are alive, with the owner's name.

        Args:
            wait: Seconds to watch leases of other hosts for a new beat.
        """
        first = {path: _read(path) for path in self.folder.glob("*.json")}
        suspects = {path: lease for path, lease in first.items() if lease is not None}
        if any(lease.owner.host != _host() for lease in suspects.values()):
            time.sleep(wait)
        alive = {}
        for path, before in sorted(suspects.items(), key=lambda item: item[0].name):
            owner, now = before.owner, _read(path)
            beating = owner.host == _host() or now != before
            if now is not None and beating and not owner.known_dead():
                alive[path.stem] = owner.name
        return alive

    def remove_all(self) -> None:
        """Remove every lease; only for a store that nobody alive is writing."""
        remove_matching(self.folder, _LEASE)

    def _looks_dead(self, name: str, path: Location) -> bool:
        lease = _read(path)
        if lease is None and not path.exists():
            return True
        if lease is not None and lease.owner.known_dead():
            return True
        # What cannot be read is being written, or, if it stays so, no lease of ours.
        beat = ("", 0) if lease is None else (lease.token, lease.beat)
        now = time.monotonic()
        seen = self._sightings.get(name)
        if seen is None or seen.beat != beat:
            self._sightings[name] = _Sighting(beat, now)
            return False
        return now - seen.since > self.patience

    def _content(self) -> bytes:
        return json.dumps(asdict(Lease(owner=self.owner, token=self._token, beat=self._beat))).encode()

    def _is_mine(self, path: Location) -> bool:
        lease = _read(path)
        return lease is not None and lease.token == self._token

    def _keep_beating(self) -> None:
        while not self._stopped.wait(self.patience / 6):
            self._beat += 1
            with self._lock:
                for path in self._held.values():
                    # A beat that a server or a disk does not take is missed; the next one may get through.
                    with suppress(RemoteError, OSError):
                        self._renew(path)

    def _renew(self, path: Location) -> None:
        if self._is_mine(path):
            # In place: who reads half a beat looks again, and a kill leaves nothing behind.
            path.write_bytes(self._content())


def _read(path: Location) -> Lease | None:
    """Read a lease; None if there is none, if it is being written or if it is not a lease of ours."""
    try:
        lease = read_document(read_object(path), Lease, name=path, error=StoreDamagedError)
    except (FileNotFoundError, StoreDamagedError):
        return None
    return lease if 0 < lease.owner.pid < _MOST_PROCESSES else None
