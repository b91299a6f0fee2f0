"""Fixtures shared by every test: the recorded reference numbers and one thread a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

# Tests run in several processes on few cores; more threads a process would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def rae_fixtures() -> Path:
    """Folder of the recorded reference numbers, `$RAE_FIXTURES` or the repository's copy."""
    folder = Path(os.environ.get("RAE_FIXTURES", Path(__file__).parent / "fixtures" / "rae"))
    if not folder.is_dir():
        pytest.fail(f"RAE_FIXTURES must name a folder of recorded reference numbers, got {folder}")
    return folder
