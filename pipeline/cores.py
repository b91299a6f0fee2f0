"""The cores of this machine, which decoding and an encoder on the CPU share."""

import os


def usable_cores() -> int:
    """Cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def let_waiting_threads_sleep() -> None:
    """Makes OpenMP's threads sleep while they wait for work; without effect once torch is loaded.

    Otherwise they spin between the encoder's steps, on the cores that decode. A policy that was set stays; worker
    processes inherit it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
