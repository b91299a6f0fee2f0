"""Rows of one field, out of a store of any format, straight into a buffer of the caller's."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.formats import RowLocator, object_path
from shards.metadata.compression import field_codec
from shards.metadata.layout import Field
from shards.reading.open_files import OpenFiles
from shards.reading.row_window import MOST_ROW_NBYTES, RowWindow
from shards.reading.shard_file import ReadMode, ShardFile
from shards.storage.checksum import crc32c

Verify = Literal["first", "always", "never"]
"""When a row's CRC32C is checked: the first time this reader delivers it, every time, or never."""


Numbers = NDArray[np.int64] | Sequence[int]
"""Whole numbers, one a row."""

_MANY = 16  # rows from which on numpy's fixed cost a call is less than Python's a row


class RowReader(Protocol):
    """Reads rows of one view of one field."""

    @property
    def row_shape(self) -> tuple[int, ...]:
        """Shape of a row."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type in which numpy sees the stored numbers; bfloat16 is ``uint16``."""

    @property
    def logical_dtype(self) -> str:
        """What the stored numbers are, for instance ``bfloat16``."""

    def read(self, rows: Numbers, out: NDArray[Any], at: Numbers | None = None) -> None:
        """Read rows into a buffer.

        Args:
            rows: Rows of the store, int64[b], in any order.
            out: C-contiguous buffer [k, *row_shape] of `dtype`.
            at: Index in ``out`` for each row; by default 0, 1, 2...

        Raises:
            StoreDamagedError: Naming shard, row and file, if the bytes are missing, truncated or not the ones
                that were written.
        """


def listed(numbers: Numbers) -> Sequence[int]:
    """Return numbers as Python's own, which loops handle faster than numpy's."""
    return numbers.tolist() if isinstance(numbers, np.ndarray) else numbers


class CheckedReader(ABC):
    """What reading a stored field has in common, wherever it is; safe to be used by several threads at once.

    Args:
        field: The field.
        capacity: Rows of a shard.
        checksums: Gives the CRC32C of each row, uint32[num_rows].
        verify: When they are compared.
    """

    def __init__(
        self, field: Field, capacity: int, *, checksums: Callable[[], NDArray[np.uint32]], verify: Verify
    ) -> None:
        self.row_shape = field.row_shape
        self.dtype = field.dtype.numpy
        self.logical_dtype = field.dtype.logical
        self._field = field
        self._capacity = capacity
        self._row_nbytes = field.row_nbytes
        self._verify = verify
        self._checksums = None if verify == "never" else checksums()
        self._unverified = None if self._checksums is None else bytearray(b"\1") * len(self._checksums)

    @abstractmethod
    def _fill(self, rows: Sequence[int], targets: Sequence[int], flat: NDArray[np.uint8]) -> None:
        """Put each row's bytes into its slot of the buffer, a uint8 vector."""

    @abstractmethod
    def _where(self, shard: int) -> str:
        """Return the object that a shard is in, in brackets, as far as it is known."""

    def read(self, rows: Numbers, out: NDArray[Any], at: Numbers | None = None) -> None:
        """See `RowReader.read`."""
        targets = range(len(rows)) if at is None else at
        if out.dtype != self.dtype or out.shape[1:] != self.row_shape or not out.flags.c_contiguous:
            expected = f"a C-contiguous {self.dtype} buffer [k, {', '.join(map(str, self.row_shape))}]"
            raise ValueError(f"{self._field.path} reads into {expected}, got {out.dtype} {out.shape}")
        flat = np.frombuffer(out, np.uint8)  # the cheapest way to a flat view; single rows feel it
        if not self._gather(rows, flat, at):
            self._fill(listed(rows), listed(targets), flat)
        if self._checksums is not None:
            self._check(rows, targets, out)

    def _gather(self, rows: Numbers, flat: NDArray[np.uint8], at: Numbers | None) -> bool:
        """Put all rows into the buffer in one go, where that can be done; returns whether it was."""
        return False

    def _check(self, rows: Numbers, targets: Numbers, out: NDArray[Any]) -> None:
        assert self._checksums is not None
        assert self._unverified is not None
        if self._verify == "first" and len(rows) >= _MANY:
            pending = np.flatnonzero(np.frombuffer(self._unverified, np.bool_)[rows])
            if not len(pending):
                return
            rows, targets = np.asarray(rows)[pending], np.asarray(targets)[pending]
        for row, target in zip(listed(rows), listed(targets), strict=True):
            if self._verify == "first" and not self._unverified[row]:
                continue
            if crc32c(out[target]) != self._checksums[row]:
                raise StoreDamagedError(f"{self._at(row)} fails its checksum; run `pipeline verify`")
            self._unverified[row] = 0

    def _at(self, row: int) -> str:
        shard = row // self._capacity
        return f"row {row} of shard {shard} of {self._field.path}{self._where(shard)}"


class ShardOpener:
    """Opens a field's shards that are on this machine.

    Args:
        root: The store.
        locator: Finds the rows in an object.
        mode: How bytes are read.
    """

    def __init__(self, root: Path, locator: RowLocator, mode: ReadMode) -> None:
        self._root = root
        self._locator = locator
        self._mode = mode

    def __call__(self, shard: int) -> ShardFile:
        """Open one shard.

        Raises:
            StoreDamagedError: If its own index is damaged.
        """
        path = self._root / object_path(self._locator.recipe, self._locator.field, shard)
        return ShardFile(path, lambda source: self._locator(source, shard), self._mode)


class StoredReader(CheckedReader):
    """Reads a field from files of this machine."""

    def __init__(
        self,
        field: Field,
        capacity: int,
        open_shard: Callable[[int], ShardFile],
        *,
        checksums: Callable[[], NDArray[np.uint32]],
        verify: Verify,
        open_files: OpenFiles,
        mode: ReadMode = "auto",
        num_shards: int = 0,
    ) -> None:
        super().__init__(field, capacity, checksums=checksums, verify=verify)
        self._open_shard = open_shard
        self._num_shards = num_shards
        self._mapped = mode == "mmap"
        self._gathers = (
            mode != "pread"
            and field.compression is None
            and field.row_nbytes <= MOST_ROW_NBYTES
            and RowWindow.is_supported()
        )
        self._codec = field_codec(field)
        self._open_files = open_files
        self._files: dict[int, ShardFile] = {}
        self._lock = threading.Lock()
        open_files.join(self)

    @cached_property
    def _window(self) -> RowWindow:
        return RowWindow(self._num_shards, self._capacity, self._row_nbytes)

    def _shard_of_window(self, shard: int) -> tuple[Path, int, NDArray[np.int64]]:
        file = self._files.get(shard) or self._opened(shard, shard * self._capacity)
        return file.path, file.size, file.extents.offsets

    def _gather(self, rows: Numbers, flat: NDArray[np.uint8], at: Numbers | None) -> bool:
        if not self._gathers or len(rows) < _MANY:
            return False
        wanted = np.asarray(rows, np.int64)
        try:
            entries = self._window.entries(wanted, self._shard_of_window)
        except (OSError, StoreDamagedError):
            return False  # reading row by row finds the one that cannot be read
        if entries is None or not (self._mapped or self._window.is_cached(wanted)):
            return False
        targets = None if at is None else np.asarray(at, np.int64)
        self._window.gather(entries, flat.reshape(-1, self._row_nbytes), targets)
        return True

    def _fill(self, rows: Sequence[int], targets: Sequence[int], flat: NDArray[np.uint8]) -> None:
        first = 0
        while first < len(rows):
            first += self._read_run(rows, targets, first, flat)

    def _read_run(
        self, rows: Sequence[int], targets: Sequence[int], first: int, flat: NDArray[np.uint8]
    ) -> int:
        """Read ``rows[first]`` and those after it that are its neighbours in the file and in the buffer."""
        row, target, nbytes = rows[first], targets[first], self._row_nbytes
        shard, slot = divmod(row, self._capacity)
        file = self._files.get(shard) or self._opened(shard, row)
        offset, size = file.extent(slot)
        if offset < 0:
            raise StoreDamagedError(f"{self._at(row)} holds no image: it is spare or quarantined, or damaged")
        if self._codec is not None:
            self._decode(file, row, offset, size, flat[target * nbytes : (target + 1) * nbytes])
            return 1
        length = 1
        if first + 1 < len(rows):
            most = min(len(rows) - first, self._capacity - slot)
            while (
                length < most
                and rows[first + length] == row + length
                and targets[first + length] == target + length
            ):
                length += 1
            if length > 1:
                length = file.run_length(slot, length)
        try:
            file.read_into(offset, flat[target * nbytes : (target + length) * nbytes])
        except (StoreDamagedError, OSError) as error:
            raise StoreDamagedError(f"{self._at(row)} cannot be read: {error}") from error
        return length

    def _decode(self, file: ShardFile, row: int, offset: int, size: int, out: NDArray[np.uint8]) -> None:
        assert self._codec is not None
        stored = np.empty(size, np.uint8)
        try:
            file.read_into(offset, stored)
            self._codec.decode(stored, out)
        except (StoreDamagedError, OSError, RuntimeError, ValueError) as error:
            raise StoreDamagedError(f"{self._at(row)} cannot be decoded: {error}") from error

    def _opened(self, shard: int, row: int) -> ShardFile:
        with self._lock:
            file = self._files.get(shard)
            if file is None:
                try:
                    file = self._open_shard(shard)
                except (StoreDamagedError, OSError) as error:
                    raise StoreDamagedError(f"{self._at(row)} cannot be opened: {error}") from error
                self._close_oldest(self._open_files.share() - 1)
                self._files[shard] = file
        return file

    def keep(self, most: int) -> None:
        """Close the shards that were opened first until at most ``most`` are open."""
        with self._lock:
            self._close_oldest(most)

    def _close_oldest(self, most: int) -> None:
        while len(self._files) > most:
            # A thread that is reading from it holds it open until it is done.
            del self._files[next(iter(self._files))]

    def _where(self, shard: int) -> str:
        file = self._files.get(shard)
        return f" ({file.path})" if file is not None else ""


class MirroredReader:
    """Reads images and mirrors them left to right, for views whose image is not stored a second time."""

    def __init__(self, source: RowReader) -> None:
        self.row_shape = source.row_shape
        self.dtype = source.dtype
        self.logical_dtype = source.logical_dtype
        self._source = source

    def read(self, rows: Numbers, out: NDArray[Any], at: Numbers | None = None) -> None:
        """See `RowReader.read`."""
        self._source.read(rows, out, at)
        for target in range(len(rows)) if at is None else listed(at):
            out[target] = out[target, :, ::-1].copy()
