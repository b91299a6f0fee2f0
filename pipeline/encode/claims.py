"""Which shard comes next: the unfinished ones that nobody alive works on.

The commit records are the only truth about what is finished; leases and failures are kept beside them, in
`.work/`, to save work and to set a shard aside that fails again and again.
"""

import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from pipeline.encode.leases import Leases
from shards import Location, StoreDamagedError, read_document, replace_atomically
from shards.metadata.layout import WORK_DIR
from shards.storage.location import read_object, remove_matching

_FAILURES = re.compile(r"\d{5,}\.json", re.ASCII)
"""Names of the files of `Failures`, by shard."""


@dataclass(frozen=True)
class Task:
    """A shard to encode, in the views that are still missing.

    Attributes:
        shard: Its number.
        views: The views without a commit record.
        attempt: Which try this is, counted from 1.
    """

    shard: int
    views: tuple[str, ...]
    attempt: int = 1


class Failures:
    """How often each shard has failed, and why.

    Args:
        store: Folder of the store.
        max_attempts: A shard that has failed this often is parked: nobody takes it again in this run.
    """

    def __init__(self, store: Location, max_attempts: int) -> None:
        self.folder = store / WORK_DIR / "failures"
        self.max_attempts = max_attempts

    def add(self, shard: int, reason: str) -> None:
        """Note one more failure; only the holder of the shard's lease does so."""
        reasons = [*self.reasons(shard), reason]
        with suppress(FileNotFoundError):  # the store was finished meanwhile, and the folder removed
            replace_atomically(self._path(shard), json.dumps(reasons).encode())

    def reasons(self, shard: int) -> list[str]:
        """Return why a shard has failed, oldest first."""
        try:
            content = read_object(self._path(shard))
        except FileNotFoundError:
            return []
        return read_document(
            content,
            list[str],
            name=self._path(shard),
            error=StoreDamagedError,
            remedy="run `pipeline clean`",
        )

    def parked(self) -> dict[int, str]:
        """Return the shards that have failed too often, with the last reason."""
        found = {}
        for shard in sorted(
            int(path.stem) for path in self.folder.glob("*.json") if _FAILURES.fullmatch(path.name)
        ):
            reasons = self.reasons(shard)
            if len(reasons) >= self.max_attempts:
                found[shard] = reasons[-1]
        return found

    def clear(self) -> None:
        """Forget all failures: a new run tries every shard again."""
        remove_matching(self.folder, _FAILURES)

    def _path(self, shard: int) -> Location:
        return self.folder / f"{shard:05d}.json"


class Claims:
    """Hands out tasks to one worker.

    Args:
        pending: Gives the (view, shard) pairs without a commit record.
        leases: This worker's leases.
        failures: Failures of all workers.
        rank: Place of this worker among its equals; it begins with the shards of its own share.
        world_size: How many equals there are.
        poll: Seconds between two looks while all open shards are in other hands.
    """

    def __init__(
        self,
        pending: Callable[[], Sequence[tuple[str, int]]],
        leases: Leases,
        failures: Failures,
        *,
        rank: int = 0,
        world_size: int = 1,
        poll: float = 1.0,
    ) -> None:
        self._pending = pending
        self._leases = leases
        self._failures = failures
        self._rank, self._world_size = rank, world_size
        self._poll = poll
        self._mine: set[int] = set()
        self._failed_here: set[int] = set()

    def next(self) -> Task | None:
        """Return a task that is now this worker's, or None if there is none to be had at the moment."""
        tasks = self._open()
        tasks.sort(key=self._priority)
        for task in tasks:
            if self._leases.take(_lease_name(task.shard)):
                missing = tuple(view for view, shard in self._pending() if shard == task.shard)
                if not missing:  # committed between the look and the lease
                    self._leases.release(_lease_name(task.shard))
                    continue
                self._mine.add(task.shard)
                return Task(task.shard, missing, 1 + len(self._failures.reasons(task.shard)))
        return None

    def finished(self) -> bool:
        """Return whether no shard is left that anybody could still finish."""
        return not self._mine and not self._open()

    def wait(self) -> None:
        """Pause until it makes sense to ask again."""
        time.sleep(self._poll)

    def done(self, task: Task) -> None:
        """Give back a task that is committed, or that is left to others."""
        self._mine.discard(task.shard)
        self._leases.release(_lease_name(task.shard))

    def give_back(self) -> None:
        """Leave all shards in hand to whoever comes next."""
        for shard in list(self._mine):
            self.done(Task(shard, ()))

    def failed(self, task: Task, reason: str) -> None:
        """Give back a task that could not be done; this worker tries it again when there is nothing else to do."""
        self._failures.add(task.shard, reason)
        self._failed_here.add(task.shard)
        self.done(task)

    def _priority(self, task: Task) -> tuple[bool, int, int]:
        return task.shard in self._failed_here, (task.shard - self._rank) % self._world_size, task.shard

    def _open(self) -> list[Task]:
        parked = self._failures.parked()
        views: dict[int, list[str]] = {}
        for view, shard in self._pending():
            if shard not in parked and shard not in self._mine:
                views.setdefault(shard, []).append(view)
        return [Task(shard, tuple(names)) for shard, names in views.items()]


def _lease_name(shard: int) -> str:
    return f"shard-{shard:05d}"
