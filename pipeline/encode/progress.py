"""News of the workers: the progress line, progress.jsonl, and the naming of a worker that stalls."""

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from tqdm import tqdm

from pipeline.console import log
from pipeline.encode.limits import STAGES, Limits

_WINDOW_SECONDS = 30.0  # what the limit is judged by
_TELL_SECONDS = 10.0  # between two lines of it in the log


@dataclass(frozen=True)
class WorkerStarted:
    """A worker has loaded its encoder."""

    worker: str
    device: str
    decode_threads: int


@dataclass(frozen=True)
class BatchEncoded:
    """A batch has been through the encoder, in all views; seconds of reading and decoding are summed over threads."""

    worker: str
    shard: int
    rows: int
    bad: int
    read_seconds: float
    decode_seconds: float
    wait_seconds: float
    encode_seconds: float


@dataclass(frozen=True)
class BatchWritten:
    """One view of a batch has been written; `published` with the last batch of a shard.

    The disk's seconds are part of the writer's; the device's are those it took to compute the view.
    """

    worker: str
    shard: int
    view: str
    write_seconds: float
    device_seconds: float
    disk_seconds: float
    published: bool


@dataclass(frozen=True)
class WritersAdded:
    """A worker whose device has waited for its writers for some share of the time writes one more shard at once.

    `nbytes` is the memory of all its token buffers.
    """

    worker: str
    shards: int
    nbytes: int
    waited: float


@dataclass(frozen=True)
class ShardFailed:
    """A shard could not be finished; it will be tried again until its attempts are used up."""

    worker: str
    shard: int
    reason: str


@dataclass(frozen=True)
class WorkerGaveUp:
    """A worker has ended because nothing works where it is; others may go on."""

    worker: str
    reason: str


Event = WorkerStarted | BatchEncoded | BatchWritten | WritersAdded | ShardFailed | WorkerGaveUp


class Progress:
    """One progress line for a run and its machine-readable history.

    Args:
        log_dir: Folder of `progress.jsonl`; lines of later runs are appended.
        num_rows: Rows of the whole store.
        rows_done: Counts the rows that anybody has finished.
        quiet: Show no line; the log is written all the same.
        stall_seconds: A worker silent for so long is named.
    """

    def __init__(
        self,
        log_dir: Path,
        *,
        num_rows: int,
        rows_done: Callable[[], int],
        quiet: bool = False,
        stall_seconds: float = 120.0,
    ) -> None:
        self._stall_seconds = stall_seconds
        log_dir.mkdir(parents=True, exist_ok=True)
        self._log: IO[str] = (log_dir / "progress.jsonl").open("a", encoding="utf-8")
        self._began = time.monotonic()
        self._num_rows = num_rows
        self._rows_done = rows_done
        self._shown = rows_done()
        self._bar = tqdm(
            total=num_rows,
            initial=self._shown,
            unit="img",
            desc="encode",
            file=sys.stderr,
            smoothing=0.1,
            disable=quiet,
        )
        self._seconds = dict.fromkeys(("read", "decode", "device", "write", "disk"), 0.0)
        self._threads: dict[str, int] = {}
        self._heard: dict[str, float] = {}
        self._ended: set[str] = set()
        self._last: dict[str, str] = {}
        self._views: set[str] = set()
        self._recent: deque[tuple[float, int, dict[str, float]]] = deque(
            [(self._began, 0, dict.fromkeys(STAGES, 0.0))]
        )
        self._limits_told = self._began
        self._shards_at_once: dict[str, int] = {}
        self._bad = 0
        self.rows = 0
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        self._log.close()

    def __call__(self, event: Event) -> None:
        """Take one piece of news, from any thread."""
        with self._lock:
            self._take(event)

    def _take(self, event: Event) -> None:
        if isinstance(event, WorkerStarted):
            self._ended.discard(event.worker)
        if event.worker not in self._ended:  # its last news may come after its end
            self._heard[event.worker] = time.monotonic()
        if isinstance(event, WorkerStarted):
            self._threads[event.worker] = event.decode_threads
        elif isinstance(event, BatchEncoded):
            self._last[event.worker] = f"shard {event.shard}"
            self._seconds["read"] += event.read_seconds
            self._seconds["decode"] += event.decode_seconds
            self._bad += event.bad
            self.rows += event.rows
            limits = self._limits()
            self._bar.set_postfix_str(f"{limits}, {self._bad} bad", refresh=False)
            self._advance(self._shown + event.rows)
        elif isinstance(event, BatchWritten):
            self._seconds["write"] += event.write_seconds
            self._seconds["device"] += event.device_seconds
            self._seconds["disk"] += event.disk_seconds
            self._views.add(event.view)
            if event.published:  # others may have been at work as well
                self._advance(self._rows_done())
        elif isinstance(event, WritersAdded):
            self._shards_at_once[event.worker] = event.shards
            log(
                f"{event.worker} writes {event.shards} shards at once from now on, from {event.nbytes / 1e6:,.0f} MB "
                f"of buffers: its device has waited {event.waited:.0%} of the time for the writers"
            )
        elif isinstance(event, WorkerGaveUp):
            self.warn(event.reason)
        else:
            self.warn(f"shard {event.shard} failed on {event.worker}: {event.reason}")
        self._record({"event": type(event).__name__, **asdict(event)})

    def warn(self, line: str) -> None:
        """Print a warning above the progress line."""
        log(f"warning: {line}")

    def name_stalled(self) -> None:
        """Say which workers have been silent for too long, once a silence."""
        now = time.monotonic()
        for worker, heard in list(self._heard.items()):
            if now - heard > self._stall_seconds:
                doing = self._last.get(worker, "its first shard")
                self.warn(f"{worker} has said nothing for {now - heard:.0f} s, last at {doing}")
                self._record({"event": "WorkerStalled", "worker": worker, "seconds": round(now - heard, 1)})
                self._heard[worker] = now

    def finished(self, worker: str) -> None:
        """Expect no more news from a worker."""
        self._heard.pop(worker, None)
        self._ended.add(worker)

    def _advance(self, rows: int) -> None:
        """Move the line forward to `rows`, never back and never beyond the end."""
        rows = min(max(rows, self._shown), self._num_rows)
        self._bar.update(rows - self._shown)
        self._shown = rows

    def _limits(self) -> Limits:
        """Return the rate each stage could reach, by its work of the last half minute; log it now and then."""
        threads = max(sum(self._threads.values()), 1)
        workers = max(len(self._threads), 1)
        shards = sum(self._shards_at_once.get(worker, 1) for worker in self._threads) or 1
        writers = shards * max(len(self._views), 1)  # a thread a view
        reading = "decode" if self._seconds["decode"] else "read"
        busy = {
            reading: (self._seconds["read"] + self._seconds["decode"]) / threads,
            "device": self._seconds["device"] / workers,
            "writer": self._seconds["write"] / writers,
            "disk": self._seconds["disk"] / writers,
        }
        now = time.monotonic()
        self._recent.append((now, self.rows, busy))
        while len(self._recent) > 2 and now - self._recent[0][0] > _WINDOW_SECONDS:
            self._recent.popleft()
        _, rows, before = self._recent[0]
        limits = Limits.of_busy(self.rows - rows, {name: busy[name] - before.get(name, 0.0) for name in busy})
        if limits.limit is not None and now - self._limits_told > _TELL_SECONDS:
            self._limits_told = now
            self._record({"event": "Limits", "limit": limits.limit, "images_per_second": limits.rates})
        return limits

    def _record(self, values: dict[str, object]) -> None:
        # One write of one short line: lines of several processes do not mix.
        self._log.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")
        self._log.flush()
