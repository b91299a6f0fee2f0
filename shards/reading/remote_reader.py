"""Rows of one field from a server: the rows of a call are asked for all at once, neighbours together.

A request covers neighbouring rows as far as the bytes between them are no more than a quarter of the rows' own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.formats.format import Extents
from shards.metadata.commit import ObjectRecord
from shards.metadata.compression import unpack_row
from shards.metadata.index import ABSENT
from shards.metadata.layout import Field
from shards.reading.reader import CheckedReader, Verify
from shards.storage.checksum import crc32c
from shards.storage.location import Location, open_object
from shards.storage.object_reader import ObjectReader
from shards.storage.parallel import gather, submit
from shards.storage.range_cache import RangeCache

_MOST_EXTRA = 0.25  # bytes of a request that nobody asked for, as a share of those somebody did
_LARGEST = (
    1 << 23
)  # bytes of a request; more would wait behind one another where they could come side by side


@dataclass(frozen=True)
class RemoteShard:
    """One shard's object of a field.

    Attributes:
        source: The object.
        digest: Its digest.
        extents: Where the rows are in it.
    """

    source: ObjectReader
    digest: str
    extents: Extents


@dataclass(frozen=True)
class _Wanted:
    """A row that is to be fetched, and where it is and goes."""

    row: int
    shard: RemoteShard
    offset: int
    nbytes: int
    target: int


class RemoteReader(CheckedReader):
    """Reads a field from a server.

    Args:
        field: The field.
        capacity: Rows of a shard.
        root: The store.
        record: Gives the manifest's entry of the object that holds a shard.
        locate: Finds the rows in a shard's object.
        checksums: Gives the CRC32C of each row, uint32[num_rows].
        verify: When they are compared.
        cache: Where rows are kept.
    """

    def __init__(
        self,
        field: Field,
        capacity: int,
        root: Location,
        record: Callable[[int], ObjectRecord],
        locate: Callable[[ObjectReader, int], Extents],
        *,
        checksums: Callable[[], NDArray[np.uint32]],
        verify: Verify,
        cache: RangeCache | None,
    ) -> None:
        super().__init__(field, capacity, checksums=checksums, verify=verify)
        self._root = root
        self._record = record
        self._locate = locate
        self._cache = cache
        # What the cache keeps has to be right whatever this reader verifies.
        self._known = checksums() if cache is not None else None
        self._shards: dict[int, RemoteShard] = {}
        self._lock = threading.Lock()

    def _fill(self, rows: Sequence[int], targets: Sequence[int], flat: NDArray[np.uint8]) -> None:
        shards = self._opened({row // self._capacity for row in rows})
        wanted = []
        for row, target in zip(rows, targets, strict=True):
            shard, slot = divmod(row, self._capacity)
            extents = shards[shard].extents
            offset = int(extents.offsets[slot])
            if offset == ABSENT:
                raise StoreDamagedError(
                    f"{self._at(row)} holds no image: it is spare or quarantined, or damaged"
                )
            piece = _Wanted(row, shards[shard], offset, int(extents.sizes[slot]), target)
            if not self._kept(piece, flat):
                wanted.append(piece)
        gather([submit(partial(self._fetch, group, flat)) for group in _coalesced(wanted)])

    def _opened(self, numbers: set[int]) -> dict[int, RemoteShard]:
        """Return some shards, after reading the indices of those not used before, all at once."""
        with self._lock:
            unknown = sorted(numbers - self._shards.keys())
        found = gather([submit(partial(self._open, number)) for number in unknown])
        with self._lock:
            self._shards.update(zip(unknown, found, strict=True))
            return {number: self._shards[number] for number in numbers}

    def _open(self, number: int) -> RemoteShard:
        record = self._record(number)
        path = self._root / record.path
        source = open_object(path, size=record.nbytes, read_ahead=False)
        extents = self._locate(source, number)
        if extents.end > record.nbytes:
            raise StoreDamagedError(
                f"{path} ends at byte {record.nbytes}, its rows at {extents.end}: truncated"
            )
        return RemoteShard(source, record.digest, extents)

    def _kept(self, piece: _Wanted, flat: NDArray[np.uint8]) -> bool:
        """Return whether the cache had the row; then it is in its slot."""
        if self._cache is None:
            return False
        out = self._place(piece, flat)
        stored = out if self._field.compression is None else np.empty(piece.nbytes, np.uint8)
        if not self._cache.read_into(piece.shard.digest, piece.offset, stored):
            return False
        if self._field.compression is not None:
            unpack_row(self._field, stored, out)
        return True

    def _fetch(self, group: list[_Wanted], flat: NDArray[np.uint8]) -> None:
        """Run in a request thread."""
        shard, start = group[0].shard, group[0].offset
        end = max(piece.offset + piece.nbytes for piece in group)
        content = np.frombuffer(shard.source.read(end - start, start), np.uint8)
        for piece in group:
            stored = content[piece.offset - start : piece.offset - start + piece.nbytes]
            out = self._place(piece, flat)
            try:
                unpack_row(self._field, stored, out)
            except (RuntimeError, ValueError) as error:
                raise StoreDamagedError(f"{self._at(piece.row)} cannot be decoded: {error}") from error
            if self._cache is not None and self._known is not None and crc32c(out) == self._known[piece.row]:
                self._cache.add(shard.digest, piece.offset, stored)

    def _place(self, piece: _Wanted, flat: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return flat[piece.target * self._row_nbytes : (piece.target + 1) * self._row_nbytes]

    def _where(self, shard: int) -> str:
        return f" ({self._root / self._record(shard).path})"


def _coalesced(wanted: list[_Wanted]) -> Iterator[list[_Wanted]]:
    """Yield the rows in groups that are each worth one request."""
    group: list[_Wanted] = []
    asked = end = 0
    for piece in sorted(wanted, key=lambda piece: (str(piece.shard.source.path), piece.offset)):
        if group and piece.shard is group[0].shard:
            new_end = max(end, piece.offset + piece.nbytes)
            new_asked = asked + new_end - max(end, piece.offset)
            span = new_end - group[0].offset
            if span <= _LARGEST and span <= new_asked * (1 + _MOST_EXTRA):
                group.append(piece)
                asked, end = new_asked, new_end
                continue
        if group:
            yield group
        group, asked, end = [piece], piece.nbytes, piece.offset + piece.nbytes
    if group:
        yield group
