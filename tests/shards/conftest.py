"""Fixtures of the store's tests."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# The same examples in every run, however busy the machine is.
settings.register_profile("shards", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("shards")


@pytest.fixture(scope="session", autouse=True)
def _no_flushing():
    """Hundreds of tiny stores are written here, and none has to outlive a power cut."""
    patch = pytest.MonkeyPatch()
    patch.setattr(os, "fsync", lambda descriptor: None)
    yield
    patch.undo()
