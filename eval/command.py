"""What the evaluation commands share: arguments in, one line of error and an exit code out. Loads no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from shards import printable_text, run_command

_Settings = TypeVar("_Settings")


def parse(arguments: Sequence[str], kind: type[_Settings], script: str, *, flags: bool = False) -> _Settings:
    """Parse settings from a command line; `--help` prints their docstrings and exits.

    Args:
        arguments: What stands after the script's name.
        kind: Dataclass of the settings.
        script: Name of the script, for the help text.
        flags: Whether a setting that is true or false is a flag, `--json`, as for `pipeline`, or takes its value,
            `--compile True`, as for the trainers.
    """
    import tyro

    return tyro.cli(
        kind,
        prog=script,
        description=kind.__doc__,
        args=list(arguments),
        config=() if flags else (tyro.conf.FlagConversionOff,),
    )


def run(main: Callable[[Sequence[str]], int]) -> None:
    """Run a script's main function and end the process with its exit code."""
    on_interrupt = "interrupted; run the same command again to continue"
    sys.exit(run_command(lambda: main(sys.argv[1:]), on_interrupt=lambda: on_interrupt))


def warn(caution: str) -> None:
    """Say something that makes a number mean less than its name; what a terminal would act on is escaped."""
    sys.stderr.write(f"warning: {printable_text(caution)}\n")
