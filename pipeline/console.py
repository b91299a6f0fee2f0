"""The log of a command: lines on standard error, above a progress line if one is shown."""

import sys
from collections.abc import Collection

from tqdm import tqdm

_NAMED_AT_MOST = 10


def log(line: str) -> None:
    """Print one line."""
    tqdm.write(line, file=sys.stderr)


def named(names: Collection[str]) -> str:
    """The first names of a list, and how many more it has."""
    some = ", ".join(repr(name) for name in list(names)[:_NAMED_AT_MOST])
    return some if len(names) <= _NAMED_AT_MOST else f"{some} and {len(names) - _NAMED_AT_MOST} more"
