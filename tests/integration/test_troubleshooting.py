"""Every error that docs/troubleshooting.md explains is still said, in these words, by the code."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("shards", "pipeline", "train", "eval")


def texts_of(path):
    """Every string of a module, with … for each value that is put into it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def quoted():
    """The first column of every table of the page."""
    page = (ROOT / "docs/troubleshooting.md").read_text()
    return re.findall(r"^\| `(.+?)` \|", page, flags=re.MULTILINE)


@pytest.fixture(scope="module")
def said():
    texts = (
        text for package in PACKAGES for path in (ROOT / package).rglob("*.py") for text in texts_of(path)
    )
    return "\n".join(re.sub("…+", "…", text) for text in texts)


@pytest.mark.parametrize("message", quoted())
def test_a_message_of_the_page_is_said_in_these_words(message, said):
    assert len(message) > 8
    assert message in said


def test_a_message_that_nobody_says_is_noticed(said):
    assert "the cat sat on the keyboard" not in said
    assert len(quoted()) > 40
