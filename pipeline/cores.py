"""How decoding and an encoder on the CPU share the cores."""

import os


def let_waiting_threads_sleep() -> None:
    """Make OpenMP's threads sleep while they wait for work; without effect once torch is loaded.

    Otherwise they spin between the encoder's steps, on the cores that decode. A policy that was set stays; worker
    processes inherit it.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
