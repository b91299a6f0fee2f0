"""Class names out of what tables and label files hold: numbers are numbers, and what cannot be a class is refused."""

import math
import re
from collections.abc import Collection, Sequence
from typing import Any

from shards.errors import UsageError
from shards.sources.found import SourceOptions, some

LABEL_COLUMNS = (
    "label", "labels", "class", "cls", "class_name", "class_label", "class_id", "label_id", "label_name", "category",
    "target", "fine_label", "coarse_label",
)  # fmt: skip
"""Names of columns, and keys of `.json` files, that say a class, in lower case."""

_WHOLE_NUMBER = re.compile(r"([+-]?\d+)(\.0*)?")


def chosen_column(names: Sequence[str], options: SourceOptions, where: str) -> str | None:
    """Return the column, or key, that says the class; None if there is none.

    `label` comes first; of several others one has to be named.

    Raises:
        UsageError: If several could be it, or the one asked for is not there.
    """
    if options.label_column is not None:
        if options.label_column not in names:
            raise UsageError(
                f"--label-column must be a column of {where}, {options.label_column!r} is not; columns are "
                f"{some(names, 20)}"
            )
        return options.label_column
    known = [name for name in names if folded(name) in LABEL_COLUMNS]
    exact = [name for name in known if folded(name) == "label"]
    if len(exact) == 1:
        return exact[0]
    if len(known) > 1:
        raise UsageError(
            f"{where} has several columns of labels: {some(known)}; name one with --label-column"
        )
    return known[0] if known else None


def column_text(chosen: str, names: Sequence[str]) -> str:
    """Return how the column of classes is named to the user, with the others that could have been it."""
    others = [name for name in names if name != chosen and folded(name) in LABEL_COLUMNS]
    return f"column {chosen}" + f" and not {some(others)}" * bool(others)


def folded(name: object) -> str:
    """Return a column's name as it is compared: in lower case, without spaces around it."""
    return str(name).strip().lower()


def class_of(value: Any, options: SourceOptions, where: str) -> str | None:
    """Return the class a label names; None, NaN, an empty text and −1 are none, 2.0 is 2.

    Raises:
        UsageError: If it is a list, unless the first of it was asked for, or is no text and no whole number.
    """
    if isinstance(value, list | tuple):
        if not options.first_label:
            raise UsageError(
                f"a label must be one class, {where} has a list ({str(value)[:60]}); take the first of each "
                "list with "
                "--first-label"
            )
        value = value[0] if value else None
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float):
        if not value.is_integer():
            raise UsageError(
                f"a label must be a text or a whole number, {where} has {value}; name another --label-column"
            )
        value = int(value)
    if isinstance(value, bool | int | str):
        text = str(value).strip()
        return None if text in ("", "-1") else text
    raise UsageError(
        f"a label must be a text or a whole number, {where} has {type(value).__name__}; name another "
        "--label-column"
    )


def as_numbers(names: Sequence[str | None]) -> list[str | None]:
    """Return class names that came as text: if all of them are whole numbers, as `2.0` and `10.0` are, in one spelling.

    Numbers with zeros in front stay as they are, because only text has those.
    """
    matches = {name: _WHOLE_NUMBER.fullmatch(name) for name in set(names) - {None} if name is not None}
    if not all(matches.values()) or not any(match and match[2] for match in matches.values()):
        return list(names)
    plain = {name: match[1].removeprefix("+") for name, match in matches.items() if match is not None}
    return [None if name is None or plain[name] == "-1" else plain[name] for name in names]


def odd_numbering(names: Collection[str]) -> list[str]:
    """Return lines about numbered classes that look as if they were counted otherwise than from 0 without gaps."""
    if not names or not all(name.isascii() and name.isdigit() for name in names):
        return []
    numbers = sorted(int(name) for name in names)
    if numbers[0] == 1 and len(numbers) == numbers[-1]:
        return [f"classes are numbered from 1 to {numbers[-1]}: no image has label 0"]
    missing = numbers[-1] + 1 - len(numbers)
    return (
        [f"classes are numbered up to {numbers[-1]}, and {missing} numbers have no image"]
        if missing > 0
        else []
    )
