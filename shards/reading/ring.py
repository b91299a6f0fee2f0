"""A ring of reused batch buffers, filled by threads in order and handed out in order.

A batch is cut into pieces of a few rows, so that all threads work on the batch that is wanted next.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass
class Job(Generic[T]):
    """One batch on its way through the ring.

    Attributes:
        number: Position in the stream of batches.
        slot: Buffer it is filled into.
        content: What to fill in.
        size: Rows of the batch.
    """

    number: int
    slot: int
    content: T
    size: int
    taken: int = 0
    done: int = 0


@dataclass
class Ring(Generic[T]):
    """Threads that fill batches ahead of the consumer.

    Attributes:
        plan: Gives content and number of rows of the n-th batch; called once a batch, in order.
        fill: Fills rows [first, last) of a job's buffer.
        num_slots: Buffers; as many batches can be ready or in use at once.
        num_threads: Threads that fill.
        piece: Rows a thread takes at a time.
    """

    plan: Callable[[int], tuple[T, int]]
    fill: Callable[[Job[T], int, int], None]
    num_slots: int
    num_threads: int
    piece: int
    waited: float = 0.0
    _state: threading.Condition = field(default_factory=threading.Condition, init=False)
    _jobs: deque[Job[T]] = field(default_factory=deque, init=False)
    _error: BaseException | None = field(default=None, init=False)
    _closed: bool = field(default=False, init=False)
    _threads: list[threading.Thread] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._free = list(range(self.num_slots))
        self._planned = 0

    def start(self) -> None:
        """Start the threads."""
        for index in range(self.num_threads):
            # Daemons: an interpreter that is leaving must not wait for a disk.
            thread = threading.Thread(target=self._work, name=f"loader-{index}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def take(self) -> Job[T]:
        """Wait for the next batch; what a thread raised while filling is raised here."""
        begun = time.perf_counter()
        with self._state:
            while (
                not self._closed and self._error is None and not (self._jobs and self._is_full(self._jobs[0]))
            ):
                self._state.wait()
            self.waited += time.perf_counter() - begun
            if self._error is not None:
                raise self._error
            if self._closed:
                raise RuntimeError("the loader was closed")
            return self._jobs.popleft()

    def give_back(self, slot: int) -> None:
        """Let a slot be filled again."""
        with self._state:
            self._free.append(slot)
            self._state.notify_all()

    def close(self) -> None:
        """Stop the threads and wait until none touches a buffer any more."""
        with self._state:
            self._closed = True
            self._state.notify_all()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()

    @staticmethod
    def _is_full(job: Job[T]) -> bool:
        return job.done == job.size

    def _work(self) -> None:
        while (piece := self._next_piece()) is not None:
            job, first, last = piece
            try:
                self.fill(job, first, last)
            except BaseException as error:  # raised again in the consumer
                self._fail(error)
                return
            with self._state:
                job.done += last - first
                if self._is_full(job):
                    self._state.notify_all()

    def _next_piece(self) -> tuple[Job[T], int, int] | None:
        with self._state:
            while not self._closed and self._error is None:
                job = self._jobs[-1] if self._jobs else None
                if job is None or job.taken == job.size:
                    job = self._begin_job()
                if job is not None:
                    first = job.taken
                    job.taken = min(first + self.piece, job.size)
                    return job, first, job.taken
                self._state.wait()
        return None

    def _begin_job(self) -> Job[T] | None:
        if not self._free:
            return None
        try:
            content, size = self.plan(self._planned)
        except BaseException as error:
            self._error = error
            self._state.notify_all()
            return None
        job = Job(self._planned, self._free.pop(), content, size)
        self._planned += 1
        self._jobs.append(job)
        return job

    def _fail(self, error: BaseException) -> None:
        with self._state:
            self._error = self._error or error
            self._state.notify_all()
