"""Numbers of an encoder's blocks as the command line has them."""

import re
from collections.abc import Sequence

from shards import UsageError


def parse_layers(text: str, option: str = "--layers") -> tuple[int, ...]:
    """Return the numbers of blocks in words: `5,8,11`, or `1-23` for all from 1 to 23.

    Raises:
        UsageError: If they are no numbers, or do not ascend.
    """
    layers: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part, re.ASCII)
        if found is None:
            raise UsageError(
                f"{option} takes numbers of blocks counted from 0, got {text!r}; such as 11,13,15 or 1-23"
            )
        first = int(found.group(1))
        layers += range(first, int(found.group(2) or first) + 1)
    check_ascending(layers, option, text)
    return tuple(layers)


def check_ascending(layers: Sequence[int], option: str, text: str) -> None:
    """Refuse blocks that are named twice or out of order.

    Raises:
        UsageError: Naming the order they should have.
    """
    wanted = sorted(set(layers))
    if not layers or list(layers) != wanted:
        remedy = f"use {','.join(map(str, wanted))}" if wanted else "such as 11,13,15"
        raise UsageError(f"{option} must name each block once, in ascending order, got {text}; {remedy}")


def parse_companion(text: str) -> tuple[str, tuple[int, ...], str | None]:
    """Return name, blocks and combination of a companion field: `k23=1-23` or `k1=23:mean+spatial-mean`.

    Raises:
        UsageError: If it is not of that form, or the name is no plain word.
    """
    name, equals, rest = text.partition("=")
    layers, colon, combination = rest.partition(":")
    if not (equals and name.isidentifier() and name.isascii()):
        raise UsageError(f"--also takes NAME=LAYERS, NAME a plain word, got {text!r}; such as k23=1-23")
    return name, parse_layers(layers, f"--also {name}"), combination if colon else None
