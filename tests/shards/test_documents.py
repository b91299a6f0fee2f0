"""JSON that does not fit its schema is one line that names the file and the key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest

from shards import UserError, read_document


@dataclass(frozen=True)
class Document:
    """A schema."""

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}
    name: str
    sizes: dict[str, int]
    grid: tuple[int, int] = (1, 1)


def read(text):
    return read_document(text, Document, name="run/state.json", remedy="remove it")


def test_what_fits_is_read_with_tuples_and_defaults():
    assert read('{"name": "a", "sizes": {"b": 3}, "grid": [2, 3]}') == Document("a", {"b": 3}, (2, 3))
    assert read(b'{"name": "a", "sizes": {}}').grid == (1, 1)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "the text: Invalid JSON"),
        ('{"name": "a", ', "the text: Invalid JSON"),
        ("[" * 200_000, "recursion limit"),
        ('{"name": 7, "sizes": {}}', "name: "),
        ('{"name": "a", "sizes": {"b": "3"}}', "sizes.b: "),
        ('{"name": "a", "sizes": {"b": 1.5}}', "sizes.b: "),
        ('{"name": "a"}', "sizes: "),
        ('{"name": "a", "sizes": {}, "colour": 1}', "colour: "),
        ("[1]", "the text: "),
        ("\xff".encode("latin-1"), "the text: "),
        ('{"name": "a", "sizes": {"b": ' + "9" * 5000 + "}}", "number out of range"),
        ('{"name": "a", "sizes": {"b\\n' + "c" * 500 + '": "3"}}', "sizes.'b\\n"),
    ],
    ids=[
        "empty",
        "cut",
        "deep",
        "number",
        "text",
        "fraction",
        "missing",
        "unknown",
        "list",
        "latin",
        "huge",
        "odd key",
    ],
)
def test_what_does_not_fit_is_one_line_with_file_and_key(text, named):
    with pytest.raises(UserError) as refused:
        read(text)
    message = str(refused.value)
    assert message.startswith("run/state.json does not hold what it must: ")
    assert named in message
    assert message.endswith("; remove it")
    assert "\n" not in message
    assert len(message) < 500
