"""The cores of this machine, as far as this process may use them."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return the number of cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1
