"""What the evaluation commands share: arguments in, one line of error and an exit code out. Loads no torch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

from shards.errors import UserError

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
    """Run a script's main function: a user's error becomes one line and an exit code, not a traceback."""
    try:
        code = main(sys.argv[1:])
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        code = error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; run the same command again to continue\n")
        code = 130
    sys.exit(code)


def warn(caution: str) -> None:
    """Say something that makes a number mean less than its name."""
    sys.stderr.write(f"warning: {caution}\n")
