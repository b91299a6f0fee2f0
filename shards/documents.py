"""JSON from outside, read against a schema: what does not fit is one line that names the file and the key."""

from __future__ import annotations

import json
from functools import cache
from typing import Any, TypeVar

from shards.errors import UserError

T = TypeVar("T")

_MOST_NAMED = 3
"""Faults that an error names."""
_MOST_CHARACTERS = 60
"""Characters of a key that an error shows."""


def read_document(
    text: str | bytes, kind: type[T], *, name: object, error: type[UserError] = UserError, remedy: str = ""
) -> T:
    """Return a JSON text as an instance of `kind`; types must be exactly those of the schema.

    Keys that `kind` does not know are passed over, unless it sets `__pydantic_config__ = {"extra": "forbid"}`. Texts
    of any depth and size are safe to read: nesting is limited.

    Args:
        text: the JSON text.
        kind: a dataclass, a typed dictionary, or any type that pydantic takes.
        name: what to call the text in an error, such as its path.
        error: the error to raise.
        remedy: what to do about it, for the end of the error.

    Raises:
        UserError: (or `error`) naming the file, each key that does not fit, and why.
    """
    from pydantic import ValidationError

    try:
        schema: Any = kind
        found: T = _adapter(schema).validate_json(text, strict=True)
    except RecursionError:
        raise error(f"{name} does not hold what it must: it is nested too deeply") from None
    except UserError as refused:  # by the type's own check of its values
        raise error(
            f"{name} does not hold what it must: {refused}{f'; {remedy}' if remedy else ''}"
        ) from None
    except ValidationError as invalid:
        faults = invalid.errors(include_url=False, include_context=False, include_input=False)
        named = [f"{'.'.join(map(_shown, fault['loc'])) or 'the text'}: {fault['msg']}" for fault in faults]
        more = f" and {len(named) - _MOST_NAMED} more" if len(named) > _MOST_NAMED else ""
        what = "; ".join(named[:_MOST_NAMED]) + more
        raise error(f"{name} does not hold what it must: {what}{f'; {remedy}' if remedy else ''}") from None
    return found


def read_values(
    values: Any, kind: type[T], *, name: object, error: type[UserError] = UserError, remedy: str = ""
) -> T:
    """Read plain JSON values that are a part of a text, as `read_document` does."""
    try:
        text = json.dumps(values, allow_nan=False)
    except ValueError:
        raise error(f"{name} holds a number that is not finite{f'; {remedy}' if remedy else ''}") from None
    return read_document(text, kind, name=name, error=error, remedy=remedy)


@cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


def _shown(key: str | int) -> str:
    """Return a key as an error shows it: short, and without characters that move the cursor."""
    text = str(key)
    return (text if text.isprintable() else repr(text))[:_MOST_CHARACTERS]
