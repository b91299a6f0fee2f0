"""The log of a command: lines on standard error, above a progress line if one is shown."""

import sys
from collections.abc import Collection, Sequence

from tqdm import tqdm

from shards import printable_text

_NAMED_AT_MOST = 10


def log(line: str) -> None:
    """Print one line; what a terminal would act on is escaped."""
    tqdm.write(printable_text(line), file=sys.stderr)


def show(text: str) -> None:
    """Print what a command was asked for, on standard output; what a terminal would act on is escaped."""
    sys.stdout.write("".join(printable_text(line) + "\n" for line in text.split("\n")))


def named(names: Collection[str]) -> str:
    """Return the first names of a list, and how many more it has."""
    some = ", ".join(repr(name) for name in list(names)[:_NAMED_AT_MOST])
    return some if len(names) <= _NAMED_AT_MOST else f"{some} and {len(names) - _NAMED_AT_MOST} more"


def few(names: Sequence[str], most: int) -> str:
    """Return the first names of a list as they are, with dots for the rest."""
    return ", ".join(names[:most]) + ", …" * (len(names) > most)
