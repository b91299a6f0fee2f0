"""Decode a store's tokens and compare the images with their originals.

accelerate launch eval/reconstruction.py STORE --decoder SNAPSHOT --out DIR
"""

from __future__ import annotations

from collections.abc import Sequence

from eval.command import parse, run
from eval.settings import ReconstructionSettings, require_decoder, require_reference
from shards import as_location
from shards.metadata.root import read_recipe


def require_inputs(settings: ReconstructionSettings) -> None:
    """Refuse missing files before anything heavy is loaded.

    Raises:
        UsageError: One of them is not there.
    """
    read_recipe(as_location(settings.store))
    require_decoder(settings.decoder)
    require_reference(settings.reference)


def main(arguments: Sequence[str]) -> int:
    """Reconstruct; returns the exit code."""
    settings = parse(arguments, ReconstructionSettings, "eval/reconstruction.py")
    require_inputs(settings)
    from eval.reconstruct.run import reconstruct

    reconstruct(settings)
    return 0


if __name__ == "__main__":
    run(main)
