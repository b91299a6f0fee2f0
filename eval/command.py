"""What the evaluation commands share: arguments in, one line of error and an exit code out. Loads no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import train.settings.commandline

_Settings = TypeVar("_Settings")


def parse(arguments: Sequence[str], kind: type[_Settings], script: str) -> _Settings:
    """Settings from a command line; `--help` prints their docstrings and leaves."""
    import tyro

    return tyro.cli(
        kind,
        prog=script,
        description=kind.__doc__,
        args=list(arguments),
        config=(tyro.conf.FlagConversionOff,),
    )


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run a script's main function, as the trainers' are run."""
    train.settings.commandline.run(main, remedy="run the same command again to continue")


def warn(caution: str) -> None:
    """Say something that makes a number mean less than its name."""
    sys.stderr.write(f"warning: {caution}\n")
