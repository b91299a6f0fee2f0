"""Check what runs have written: `python -m train.verify RUN [RUN or SNAPSHOT ...]`.

Reads settings, metrics, checkpoints and snapshots, compares every file with the digest that was kept when it was
written, and prints a line a file. Exit code 0 if all are as they were written, 1 if one is not.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import tyro

from shards import UsageError, UserError, printable_text
from train.settings.commandline import run

Check = Callable[[], bool]
"""Checks a file; whether there was a digest to compare it with. Raises `UserError` if it is damaged."""


@dataclass(frozen=True, kw_only=True)
class VerifySettings:
    """Check what runs have written against the digests that were kept."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs, or snapshots."""

    def __post_init__(self) -> None:
        """Refuse an empty command."""
        if not self.paths:
            raise UsageError("name a run's folder or a snapshot: python -m train.verify RUN")


def parse(arguments: Sequence[str]) -> VerifySettings:
    """Parse settings from a command line."""
    return tyro.cli(VerifySettings, prog="python -m train.verify", description=__doc__, args=list(arguments))


def main(arguments: Sequence[str]) -> int:
    """Check and print; returns the exit code."""
    settings = parse(arguments)
    damaged = 0
    for path, check in chain.from_iterable(map(checks, settings.paths)):
        try:
            line = (
                f"ok          {path}" if check() else f"no digest   {path}, written before digests were kept"
            )
        except UserError as error:
            damaged += 1
            line = f"DAMAGED     {error}"
        sys.stdout.write(f"{printable_text(line)}\n")
    return 1 if damaged else 0


def checks(path: Path) -> Iterator[tuple[Path, Check]]:
    """Return what there is to check at a path, and how.

    Args:
        path: a run's folder or a snapshot.

    Raises:
        UsageError: there is neither.
    """
    from train.engine.checkpoint import checkpoints
    from train.report.metrics_file import read_metrics
    from train.settings.saved_settings import load_settings
    from train.weights.snapshot import verify_snapshot
    from train.weights.tensor_files import require_intact

    if path.is_file():
        yield path, partial(verify_snapshot, path)
        return
    config, metrics, normalizer = (
        path / name for name in ("config.json", "metrics.jsonl", "normalizer.safetensors")
    )
    if not config.is_file():
        raise UsageError(f"{path} is not the folder of a run, which has a config.json, and not a snapshot")
    yield config, lambda: load_settings(config) is not None
    yield metrics, lambda: read_metrics(metrics) is not None
    if normalizer.is_file():
        yield normalizer, partial(require_intact, normalizer)
    for checkpoint in checkpoints(path / "checkpoints"):
        yield checkpoint, partial(_verify_checkpoint, checkpoint)
    for snapshot in sorted((path / "snapshots").glob("*.safetensors")):
        yield snapshot, partial(verify_snapshot, snapshot)


def _verify_checkpoint(path: Path) -> bool:
    from train.engine.checkpoint import read_state, require_intact

    state = read_state(path)
    require_intact(path, state)
    return bool(state.sha256)


if __name__ == "__main__":
    run(main, remedy="nothing was changed")
