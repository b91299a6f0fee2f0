"""Digests of whole objects, by the name that records and manifests know each algorithm by.

Source: BLAKE3, https://github.com/BLAKE3-team/BLAKE3-specs; SHA-256, FIPS 180-4. On one core BLAKE3 takes a fraction of
the time (`benchmarks/writing.py`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol

from blake3 import blake3

SHA256, BLAKE3 = "sha256", "blake3"


class Hasher(Protocol):
    """A digest that is being computed, from front to back."""

    def update(self, data: bytes | memoryview, /) -> object:
        """Take the next bytes."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes taken so far, 64 hexadecimal digits."""


ALGORITHMS: dict[str, Callable[[], Hasher]] = {SHA256: hashlib.sha256, BLAKE3: blake3}
"""What begins a digest, by name."""


def digest_of_bytes(content: bytes, algorithm: str = SHA256) -> str:
    """Return the digest of one object's content in hexadecimal digits."""
    hasher = ALGORITHMS[algorithm]()
    hasher.update(content)
    return hasher.hexdigest()
