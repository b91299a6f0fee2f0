"""Many requests in flight: threads that wait for answers and that nobody waits for when the program ends."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import cache, partial
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

IN_FLIGHT = 64
"""Requests a process has under way at once: enough for 64 × 400 kB rows every 50 ms, 500 MB/s."""


class _Crew:
    """Daemon threads that work off a queue; an executor's threads would hold up the end of the program."""

    def __init__(self, size: int) -> None:
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)
        self._size = size
        self._started = 0
        self._lock = threading.Lock()

    def submit(self, call: Callable[[], R]) -> Future[R]:
        """Have a call made by the next thread that is free."""
        future: Future[R] = Future()
        self._work.put((call, future))
        if not self._idle.acquire(blocking=False):
            with self._lock:
                if self._started < self._size:
                    self._started += 1
                    threading.Thread(target=self._serve, name=f"remote-{self._started}", daemon=True).start()
        return future

    def _serve(self) -> None:
        while True:
            call, future = self._work.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # raised again by whoever waits for the future
                    future.set_exception(error)
            self._idle.release()


@cache
def _crew(process: int) -> _Crew:
    return _Crew(IN_FLIGHT)


def submit(call: Callable[[], R]) -> Future[R]:
    """Have a call made by one of this process's request threads."""
    return _crew(os.getpid()).submit(call)


def gather(futures: Sequence[Future[R]]) -> list[R]:
    """Return results in order; of the errors the first, once no call is under way any more."""
    try:
        return [future.result() for future in futures]
    except BaseException:
        for future in futures:
            future.cancel()
        for future in futures:
            if not future.cancelled():
                future.exception()
        raise


def in_parallel(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """``[function(item) for item in items]``, many at once; must not be called by such a function itself."""
    return gather([submit(partial(function, item)) for item in items])


def ahead(function: Callable[[T], R], items: Iterable[T], most: int = 8) -> Iterator[R]:
    """``map(function, items)`` with up to ``most`` calls under way before their results are asked for."""
    waiting: deque[Future[R]] = deque()
    for item in items:
        waiting.append(submit(partial(function, item)))
        if len(waiting) > most:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
