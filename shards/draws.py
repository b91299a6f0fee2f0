"""Random numbers that are a function of where they are used, and of nothing else.

Everything here comes from the raw output of the counter-based generator Philox4x64-10: numpy promises that
stream for all versions, but promises nothing about what its distributions and shuffles make of it.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Philox);
https://numpy.org/doc/stable/reference/random/compatibility.html (what is promised).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_LANES = 4  # 64-bit words Philox4x64 gives for each value of its counter


def raw_bits(start: int, count: int, *, seed: int, stream: str, epoch: int = 0) -> NDArray[np.uint64]:
    """Return words ``start`` to ``start + count`` of one infinite stream of random bits, uint64[count].

    Args:
        start: Position of the first word in the stream, 0 or more.
        count: How many words.
        seed: Any integer; together with ``stream`` it names the stream.
        stream: What the bits are for. Streams of different names are independent.
        epoch: A further part of the name.
    """
    key = np.frombuffer(hashlib.sha256(f"{seed}/{stream}".encode()).digest()[:16], "<u8")
    # numpy steps the counter before each block of words; the epoch in its highest word keeps streams apart.
    generator = np.random.Philox(key=key, counter=np.array([start // _LANES, 0, 0, epoch], np.uint64))
    skipped = start % _LANES
    return generator.random_raw(skipped + count)[skipped:]


def permutation(size: int, *, seed: int, stream: str, epoch: int = 0) -> NDArray[np.int64]:
    """Return a random order of ``range(size)``, int64[size]."""
    return shuffled_within(np.zeros(size, np.uint64), seed=seed, stream=stream, epoch=epoch)


def shuffled_within(
    groups: NDArray[np.uint64], *, seed: int, stream: str, epoch: int = 0
) -> NDArray[np.int64]:
    """Order indices by group, and at random within each group.

    Each index gets a 64-bit word: its group, then random bits, then the index itself. The words are all
    different, so that any correct sort puts them in the same order, and the fastest may be used.

    Args:
        groups: Group of each index, uint64[n]; small numbers, counted from 0.
        seed: Names the order, with ``stream`` and ``epoch``.
        stream: See `raw_bits`.
        epoch: See `raw_bits`.
    """
    size = len(groups)
    index_bits = max(size - 1, 1).bit_length()
    group_bits = int(groups.max()).bit_length() if size else 0
    assert index_bits + group_bits < 48, "too few bits would be left to chance"
    words = raw_bits(0, size, seed=seed, stream=stream, epoch=epoch)
    words >>= np.uint64(group_bits + index_bits)
    words <<= np.uint64(index_bits)
    words |= np.arange(size, dtype=np.uint64)
    if group_bits:
        words |= groups << np.uint64(64 - group_bits)
    words.sort()
    words &= np.uint64((1 << index_bits) - 1)
    return words.view(np.int64)


def integers_below(limits: Sequence[int], *, seed: int, stream: str) -> list[int]:
    """Draw evenly in [0, limit) for each limit: ⌊u · limit / 2³²⌋, u the upper half of the stream's next word."""
    words = raw_bits(0, len(limits), seed=seed, stream=stream).tolist()
    return [((word >> 32) * limit) >> 32 for word, limit in zip(words, limits, strict=True)]


def even_spread(count: int, total: int) -> NDArray[np.int64]:
    """``count`` of the numbers 0 … total − 1, evenly spread, with both ends: ⌊i · (total − 1) / (count − 1)⌋.

    Nothing here is random.

    Args:
        count: How many; more than ``total`` gives all.
        total: Of how many.

    Returns:
        Ascending and different, int64[min(count, total)].
    """
    count = max(0, min(count, total))
    return np.arange(count, dtype=np.int64) * (total - 1) // max(count - 1, 1)


def choices(start: int, count: int, num_options: int, *, seed: int, stream: str) -> NDArray[np.int8]:
    """Return choices ``start`` to ``start + count`` of a stream of even draws, int8[count] in [0, num_options)."""
    upper = raw_bits(start, count, seed=seed, stream=stream) >> np.uint64(32)
    return ((upper * np.uint64(num_options)) >> np.uint64(32)).astype(np.int8)
