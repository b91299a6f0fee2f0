"""Writing one shard of one view, from the first row to the commit record."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreError
from shards.formats import format_of, object_path
from shards.metadata.commit import CommitRecord, ObjectRecord
from shards.metadata.identity import Recipe
from shards.metadata.layout import commit_path, fields_of, moments_path
from shards.metadata.plan import Plan
from shards.storage.checksum import crc32c_rows
from shards.storage.location import Location, publish_bytes, read_object
from shards.values.moments import Moments, RowSums, TokenSums
from shards.values.quantize import Int8Code
from shards.writing.published import describe_shard

Linked = Callable[[], CommitRecord]
"""Puts a shard's links to another store's images where they belong; gives that store's record of the shard."""


class ShardWriter:
    """Takes the rows of one shard of one view in order of slot and publishes them.

    Use as a context manager; leaving it without `publish` removes what was written.
    """

    def __init__(
        self,
        root: Location,
        recipe: Recipe,
        plan: Plan,
        view: str,
        shard: int,
        attempts: int,
        code: Int8Code | None = None,
        linked: Linked | None = None,
        sums: TokenSums | None = None,
    ) -> None:
        """Begin a shard; see `StoreWriter.shard`."""
        self._root = root
        self._recipe = recipe
        self._plan = plan
        self.view = view
        self.shard = shard
        self._attempts = attempts
        self._linked = linked
        fields = fields_of(recipe, view)
        self._fields = tuple(f for f in fields if linked is None or f.name != "image")
        self._begun = time.monotonic()
        self._next_slot = 0
        self._bad: dict[int, str] = {}
        self._crc32c = {field.name: np.zeros(recipe.capacity, np.uint32) for field in self._fields}
        self._written = np.zeros(recipe.capacity, np.bool_)
        self._sums = sums or RowSums(self._fields[0].row_shape, self._fields[0].dtype, code)
        self._square_error: NDArray[np.float64] | None = None
        self._error_unknown = False

    def __enter__(self) -> Self:
        self._pool = ThreadPoolExecutor(3, thread_name_prefix="shard-writer")
        try:
            self._outputs = format_of(self._recipe).open_outputs(
                self._root,
                self._recipe,
                self._plan,
                self.view,
                self.shard,
                self._pool,
                awaited=() if self._linked is None else ("image",),
            )
        except BaseException:
            self._pool.shutdown()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        for file in self._outputs.files:
            file.discard()
        if isinstance(error, OSError):
            remedy = "free space or repair the disk, and run the same command again"
            raise StoreError(
                f"shard {self.shard} of {self._root} cannot be written: {error}; {remedy}"
            ) from error

    @property
    def takes_images(self) -> bool:
        """Whether rows must have the field ``image``."""
        return any(field.name == "image" for field in self._fields)

    @property
    def disk_seconds(self) -> float:
        """Time that the disk has taken so far to write and flush the objects."""
        return sum(file.disk_seconds for file in self._outputs.files)

    def write(self, place: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write one row: by field, an array of the field's row shape and storage type."""
        self.write_block(place, {name: array[None] for name, array in arrays.items()})

    def write_block(self, first_place: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write rows of consecutive slots.

        Args:
            first_place: Slot of the first row; slots must ascend from call to call.
            arrays: By field, the rows, an array [k, *row_shape] of the storage type. They may be reused when
                this returns.

        Raises:
            ValueError: If a field is missing, has another shape or type, or a slot is not to be written.
        """
        first_slot = first_place
        rows = {field.name: self._checked(field.name, arrays) for field in self._fields}
        count = len(rows["tokens"])
        end = first_slot + count
        if first_slot < self._next_slot or end > self._plan.shard_size(self.shard):
            limits = f"{self._next_slot} to {self._plan.shard_size(self.shard)}"
            raise ValueError(f"slots must ascend and stay within {limits}, got {first_slot} to {end}")
        if set(arrays) != set(rows) or any(len(array) != count for array in rows.values()):
            raise ValueError(f"a block needs the same number of rows of each of {sorted(rows)}")
        self._next_slot = end
        self._written[first_slot:end] = True
        side_work = self._pool.submit(self._account, first_slot, rows)
        try:
            self._outputs.write(first_slot, rows)
        finally:
            side_work.result()

    def _checked(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        field = next(field for field in self._fields if field.name == name)
        if name not in arrays:
            raise ValueError(f"a row of view {self.view!r} needs the field {name!r}")
        array = arrays[name]
        if array.shape[1:] != field.row_shape or array.dtype != field.dtype.numpy:
            expected = f"rows of {field.row_shape} {field.dtype.numpy}"
            raise ValueError(f"{field.path} takes {expected}, got {array.shape[1:]} {array.dtype}")
        return np.ascontiguousarray(array)

    def _account(self, first_slot: int, rows: Mapping[str, NDArray[Any]]) -> None:
        for name, array in rows.items():
            self._crc32c[name][first_slot : first_slot + len(array)] = crc32c_rows(array)
        self._sums.update(rows["tokens"])

    def quarantine(self, place: int, reason: str) -> None:
        """Say why the image at a slot has no row."""
        if not 0 <= place < self._plan.shard_size(self.shard):
            raise ValueError(f"shard {self.shard} has no image at slot {place}")
        self._bad[place] = " ".join(reason.split())

    def add_square_error(self, square_error: NDArray[np.float64]) -> None:
        """Add the error of int8 tokens; once or more often before `publish`, row by row in order.

        Args:
            square_error: Sum over some rows' tokens of each channel's squared error, float64[D].
        """
        if self._square_error is None:
            self._square_error = np.zeros(len(square_error))
        self._square_error += square_error

    def leave_error_unknown(self) -> None:
        """Say that nobody knows what int8 tokens have lost, in the place of `add_square_error`."""
        self._error_unknown = True

    def publish(self) -> CommitRecord:
        """Give the objects their names and record it; if another worker was first, its shard stands.

        Returns:
            The record of what is published, whoever wrote it.

        Raises:
            ValueError: If a slot was neither written nor quarantined, or both, or int8 tokens came without
                their error.
            StoreError: If the tokens hold NaN or infinity, which no later step could use.
        """
        self._require_complete()
        square_error = self._checked_error()
        if not (self._sums.finite and (self._square_error is None or np.isfinite(self._square_error).all())):
            raise StoreError(f"tokens of shard {self.shard} of view {self.view} hold {self._not_finite()}")
        moments = self._sums.moments()
        digests = self._outputs.finish()
        won = [file.publish() for file in self._outputs.files]
        linked = None if self._linked is None else self._linked()
        if self._all_new() and all(won) and (linked is None or linked.bad.keys() == self._bad.keys()):
            record = self._own_record(digests, moments, square_error, linked)
        else:
            record, moments = describe_shard(
                self._root,
                self._recipe,
                self._plan,
                self.view,
                self.shard,
                reasons=self._bad,
                square_error=square_error,
            )
            record = dataclasses.replace(record, seconds=self._seconds(), attempts=self._attempts)
        path = self._root / commit_path(self.view, self.shard)
        try:
            publish_bytes(self._root / record.moments.path, moments.to_bytes())
            publish_bytes(path, record.to_bytes())
        except FileNotFoundError:
            # Whoever finishes the store removes the partial sums, also while a worker that slept until then adds some.
            if not path.exists():
                raise
        return CommitRecord.from_bytes(read_object(path), path=path)

    def _not_finite(self) -> str:
        logical = self._fields[0].dtype.logical
        if logical == "float16" and not self._sums.has_nan:
            return "infinity as float16, which ends at 65504; store bfloat16 or float32"
        return f"NaN or infinity as {logical}; check the weights they come from, or compute with --precision float32"

    def _all_new(self) -> bool:
        """Return whether no object that this writer was to write had been published before."""
        if self._linked is None:
            return self._outputs.all_new
        own = [self._root / object_path(self._recipe, field, self.shard) for field in self._fields]
        return [file.final for file in self._outputs.files] == own

    def _require_complete(self) -> None:
        size = self._plan.shard_size(self.shard)
        missing = [p for p in range(size) if self._written[p] == (p in self._bad)]
        if missing:
            raise ValueError(
                f"each of the {size} images of shard {self.shard} must be either written or quarantined; "
                f"slot {missing[0]} is not"
            )

    def _checked_error(self) -> NDArray[np.float64] | None:
        """Return the error of int8 tokens, NaN where nobody knows it; None for other storage types."""
        known = self._square_error is not None or self._error_unknown
        if known != (self._recipe.dtype == "int8" and bool(self._written.any())):
            raise ValueError(
                f"int8 tokens, and they alone, need add_square_error; these are {self._recipe.dtype}"
            )
        if self._error_unknown or (self._square_error is None and self._recipe.dtype == "int8"):
            return np.full(self._recipe.encoder.width, np.nan)
        return self._square_error

    def _own_record(
        self,
        digests: list[str],
        moments: Moments,
        square_error: NDArray[np.float64] | None,
        linked: CommitRecord | None,
    ) -> CommitRecord:
        paths = dict.fromkeys(object_path(self._recipe, field, self.shard) for field in self._fields)
        by_path = {record.path: record for record in (linked.objects if linked else ())}
        for path, file, digest in zip(paths, self._outputs.files, digests, strict=True):
            by_path[path] = ObjectRecord(path, file.position, digest, self._recipe.object_digest)
        fields = fields_of(self._recipe, self.view)
        stored = dict.fromkeys(object_path(self._recipe, field, self.shard) for field in fields)
        checksums = {**(linked.crc32c if linked else {}), **self._crc32c}
        return CommitRecord(
            view=self.view,
            shard=self.shard,
            num_rows=moments.count,
            objects=tuple(by_path[path] for path in stored),
            moments=ObjectRecord.of(moments_path(self.view, self.shard), moments.to_bytes()),
            bad=self._bad,
            crc32c={field.name: checksums[field.name] for field in fields},
            offsets=self._outputs.offsets,
            square_error=square_error,
            seconds=self._seconds(),
            attempts=self._attempts,
        )

    def _seconds(self) -> float:
        return round(time.monotonic() - self._begun, 3)
