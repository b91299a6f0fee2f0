"""Decode a store's tokens and compare the pictures with their originals.

accelerate launch eval/reconstruction.py STORE --decoder SNAPSHOT --out DIR
"""

from __future__ import annotations

from collections.abc import Sequence

from eval.command import parse, run
from eval.settings import ReconstructionSettings


def main(arguments: Sequence[str]) -> int:
    """Reconstruct; returns the exit code."""
    settings = parse(arguments, ReconstructionSettings, "eval/reconstruction.py")
    from eval.reconstruction_run import reconstruct

    reconstruct(settings)
    return 0


if __name__ == "__main__":
    run(main)
