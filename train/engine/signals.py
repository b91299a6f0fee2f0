"""Ask a running training to stop, and be told when its launcher dies."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from types import FrameType, TracebackType
from typing import Self

_PR_SET_PDEATHSIG = 1
LAUNCHER_VARIABLES = ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID")
"""Set for their children by `accelerate launch` and by torchrun."""


class StopRequest:
    """Within this context SIGTERM and SIGINT are remembered rather than obeyed at once.

    Args:
        patience: Seconds after which a second Ctrl-C no longer waits for a checkpoint. A launcher repeats the first one
            at once.

    Attributes:
        signal: the first signal that came, or None.
    """

    def __init__(self, patience: float = 5.0) -> None:
        self._patience = patience
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]  # what signal.signal itself returned

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._since > self._patience:
            raise KeyboardInterrupt


def die_with_launcher() -> None:
    """Let the kernel send this process SIGTERM when its launcher dies.

    A SIGTERM to `accelerate launch` with one process ends the launcher alone; without this the training would live on
    as an orphan. A process that no launcher started (nohup python train/dit.py) is left as it is. Linux only; elsewhere
    there is no such request, and nothing is done.
    """
    if not any(name in os.environ for name in LAUNCHER_VARIABLES) or not hasattr(os, "sched_getaffinity"):
        return
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
