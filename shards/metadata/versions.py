"""Which version of the store format a recipe's store has, and which ones this program reads.

Version 2 differs from version 1 in one thing: its shards' objects are listed by BLAKE3 instead of SHA-256.
"""

from __future__ import annotations

from shards.errors import StoreDamagedError
from shards.metadata.identity import Recipe
from shards.storage.digests import BLAKE3, SHA256

_BY_DIGEST = {SHA256: 1, BLAKE3: 2}


def format_version(recipe: Recipe) -> int:
    """Return the lowest version that can hold a recipe's store."""
    return _BY_DIGEST[recipe.object_digest]


def require_format_version(path: object, found: object, recipe: Recipe | None = None) -> None:
    """Refuse a version that this program does not read, or that is not the recipe's.

    Raises:
        StoreDamagedError: Naming ``path``.
    """
    readable = list(_BY_DIGEST.values()) if recipe is None else [format_version(recipe)]
    if found not in readable:
        known = " and ".join(str(version) for version in readable)
        reads = f"this program reads {known}" if recipe is None else f"its recipe is one of version {known}"
        raise StoreDamagedError(f"{path} has format version {found}; {reads}")
