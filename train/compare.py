"""Lay runs beside each other: `python -m train.compare RUN RUN ... --out comparison.html`.

Reads the files that runs write, also while they run, and writes one page without further files: the settings in which
the runs differ, curves over steps, images, hours and FLOPs, scores of eval's results, sample sheets; and the table as
CSV and Markdown.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from train.settings.commandline import run


@dataclass(frozen=True, kw_only=True)
class CompareSettings:
    """What to compare."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of runs."""
    out: Path = Path("comparison.html")
    """The page; the table is written beside it as .csv and .md."""
    results: tuple[Path, ...] = ()
    """results.json files of eval, or folders that hold one, besides those inside the runs' folders."""


def parse(arguments: Sequence[str]) -> CompareSettings:
    """Parse settings from a command line."""
    return tyro.cli(
        CompareSettings,
        prog="python -m train.compare",
        description=__doc__,
        args=list(arguments),
        config=(tyro.conf.FlagConversionOff,),
    )


def main(arguments: Sequence[str]) -> int:
    """Compare; returns the exit code."""
    settings = parse(arguments)
    from shards import UsageError, printable_text
    from train.report.comparison import write_comparison
    from train.report.finished_runs import add_scores, read_runs

    runs, unreadable = read_runs(settings.runs)
    notes = [f"{path} is left out: {reason}" for path, reason in unreadable.items()]
    if not runs:
        raise UsageError(
            f"RUN must be folders of runs, got none that can be read: {'; '.join(notes) or 'nothing'}"
        )
    notes += add_scores(runs, settings.results)
    for line in notes:
        sys.stderr.write(f"{printable_text(line)}\n")
    settings.out.parent.mkdir(parents=True, exist_ok=True)
    write_comparison(runs, settings.out, notes)
    sys.stderr.write(printable_text(f"{len(runs)} runs compared in {settings.out}") + "\n")
    return 0


if __name__ == "__main__":
    run(main)
