"""docs/api.md says what the docstrings of the package's names say."""

from __future__ import annotations

import re
from pathlib import Path

import shards
from shards.testing.api_page import GROUPS, api_page

PAGE = Path(__file__).parents[2] / "docs" / "api.md"


def test_the_page_is_made_from_the_docstrings():
    assert PAGE.read_text(encoding="utf-8") == api_page(), "run `make api`"


def test_every_name_on_it_is_offered_once_and_documented():
    names = [name for group in GROUPS.values() for name in group]
    assert len(names) == len(set(names))
    assert set(names) <= set(shards.__all__)
    assert all(getattr(shards, name).__doc__ for name in names)


def test_the_package_s_docstring_lists_every_name_once_by_task():
    by_task = shards.__doc__.partition("By task:")[2]
    names = re.findall(r"[^\s,]+", re.sub(r"- [^:]+:", "", by_task))
    assert sorted(names) == shards.__all__


def test_every_name_that_is_offered_can_be_loaded():
    for name in shards.__all__:
        assert getattr(shards, name) is not None
