"""The webdataset format: one tar a shard and view, whose members are plain files that ``webdataset`` decodes.

A row is the members ``ROW.tokens.npy``, ``ROW.image.npy`` (where the view has images), ``ROW.cls.npy`` (where the
store has class tokens), ``ROW.cls``, which is the label, and ``ROW.json``, ROW being the row's number in nine digits:
a key with a dot in it would silently merge samples. Every byte follows from the rows and the plan: no times, no owners.
The arrays are uncompressed npy, so a row's numbers are one extent.

Source: POSIX.1-1988 ustar,
https://pubs.opengroup.org/onlinepubs/9699919799/utilities/pax.html#tag_20_92_13_06; npy 1.0,
https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.formats.format import EntryCheck, Extents
from shards.metadata.identity import Recipe
from shards.metadata.index import ABSENT
from shards.metadata.layout import Field, fields_of
from shards.metadata.plan import Plan
from shards.storage.location import Location, begin_object
from shards.storage.object_reader import ObjectReader
from shards.storage.output import Buffer, OutputFile

_BLOCK = 512
_KEY_DIGITS = 9


class WebdatasetFormat:
    """See `shards.formats.format.Format`."""

    shares_objects = True
    has_row_index = False

    def object_path(self, field: Field, shard: int) -> str:
        """See `Format.object_path`: the tar of the field's view."""
        return f"{field.view}/{shard:05d}.tar"

    def documents(self, recipe: Recipe) -> dict[str, bytes]:
        """See `Format.documents`: a tar needs none."""
        return {}

    def open_outputs(
        self,
        root: Location,
        recipe: Recipe,
        plan: Plan,
        view: str,
        shard: int,
        pool: Executor,
        awaited: Collection[str] = (),
    ) -> TarShardFile:
        """See `Format.open_outputs`."""
        assert not awaited, "the fields of a tar are written together"
        fields = fields_of(recipe, view)
        path = root / self.object_path(fields[0], shard)
        return TarShardFile(fields, plan, shard, begin_object(path, pool, recipe.object_digest))

    def read_extents(self, source: ObjectReader, field: Field, shard: int, capacity: int) -> Extents:
        """See `Format.read_extents`: what the headers of all members say."""
        return _scan_extents(source, field, shard, capacity)

    def entry_check(self, fields: Sequence[Field], plan: Plan, shard: int) -> EntryCheck:
        """See `Format.entry_check`: headers, label and description of a row follow from its numbers and the plan."""
        members = RowMembers(fields, plan, shard)

        def check(source: ObjectReader, slot: int, rows: Mapping[str, NDArray[Any]], start: int) -> bool:
            parts = [bytes(part) for _, parts in members.of_row(slot, rows) for part in parts]
            written = b"".join(parts)
            return source.read(len(written), start - len(parts[0]) - len(parts[1])) == written

        return check


def row_key(row: int) -> str:
    """Return the webdataset key of a row."""
    return f"{row:0{_KEY_DIGITS}d}"


class RowMembers:
    """The members that make up each row of one shard, byte for byte."""

    def __init__(self, fields: Sequence[Field], plan: Plan, shard: int) -> None:
        self._headers = {field.name: npy_header(field) for field in fields}
        self._records = plan.records_of(shard)
        self._first_row = shard * plan.capacity
        self._class_names = plan.class_names

    def of_row(self, slot: int, arrays: Mapping[str, NDArray[Any]]) -> list[tuple[str, list[Buffer]]]:
        """Return field or suffix, and the bytes in parts, of each member of a row."""
        row = self._first_row + slot
        record = self._records[slot]
        facts: dict[str, Any] = {"row": row, "key": record.key, "label": record.label}
        if 0 <= record.label < len(self._class_names):
            facts["class_name"] = self._class_names[record.label]
        key = row_key(row)
        members = [
            (name, _member(f"{key}.{name}.npy", [header, arrays[name].data]))
            for name, header in self._headers.items()
        ]
        members.append(("label", _member(f"{key}.cls", [b"%d" % record.label])))
        members.append(("json", _member(f"{key}.json", [json.dumps(facts, ensure_ascii=False).encode()])))
        return members


class TarShardFile:
    """Writes one shard of one view: all members of a row together, rows by ascending slot."""

    def __init__(self, fields: Sequence[Field], plan: Plan, shard: int, output: OutputFile) -> None:
        self._fields = fields
        self._members = RowMembers(fields, plan, shard)
        self._output = output
        self.files = [self._output]
        self.all_new = True  # one object: whoever has published it has won all of it
        self.offsets = {field.name: np.full(plan.capacity, ABSENT, np.int64) for field in fields}

    def write(self, first_slot: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Append the members of consecutive slots: C-contiguous arrays [k, *row_shape] by field."""
        buffers: list[Buffer] = []
        position = self._output.position
        for index in range(len(arrays[self._fields[0].name])):
            slot = first_slot + index
            rows = {name: array[index] for name, array in arrays.items()}
            for name, parts in self._members.of_row(slot, rows):
                if name in self.offsets:
                    # header of the member, header of the npy, then the numbers
                    self.offsets[name][slot] = position + sum(len(part) for part in parts[:2])
                buffers += parts
                position += sum(memoryview(part).nbytes for part in parts)
        self._output.write(buffers)

    def finish(self) -> list[str]:
        """Append the two empty blocks that end a tar, flush and close."""
        self._output.write([bytes(2 * _BLOCK)])
        return [self._output.finish()]


def npy_header(field: Field) -> bytes:
    """Return the header of an npy file holding one row of a field, a multiple of 64 bytes long."""
    header = io.BytesIO()
    descr = {"descr": field.dtype.numpy.str, "fortran_order": False, "shape": field.row_shape}
    np.lib.format.write_array_header_1_0(header, descr)
    return header.getvalue()


def _member(name: str, parts: list[Buffer]) -> list[Buffer]:
    size = sum(memoryview(part).nbytes for part in parts)
    return [_tar_header(name, size), *parts, bytes(-size % _BLOCK)]


def _tar_header(name: str, size: int) -> bytes:
    """Return a ustar header whose owner, group and time are zero, so that equal rows give equal bytes."""
    encoded = name.encode("ascii")
    assert len(encoded) <= 100, name
    fields = [
        encoded.ljust(100, b"\0"),
        b"0000644\0",
        b"0000000\0",
        b"0000000\0",
        b"%011o\0" % size,
        b"%011o\0" % 0,
        b" " * 8,  # the checksum is computed as if it were blank
        b"0",
        bytes(100),
        b"ustar\x0000",
    ]
    header = b"".join(fields).ljust(_BLOCK, b"\0")
    return header[:148] + b"%06o\0 " % sum(header) + header[156:]


def _scan_extents(source: ObjectReader, field: Field, shard: int, capacity: int) -> Extents:
    """Find the rows of a field by walking the headers of an open tar.

    Raises:
        StoreDamagedError: Naming the file, if a header is damaged, a member is not one of this shard, or the end is
            missing.
    """
    offsets = np.full(capacity, ABSENT, np.int64)
    header = npy_header(field)
    suffix = f".{field.name}.npy"
    path = source.path
    for name, offset, size in _members(source):
        key, dot, _ = name.partition(".")
        if not dot or len(key) < _KEY_DIGITS or not (key.isascii() and key.isdigit()):
            raise StoreDamagedError(f"{path}: member {name!r} is not named by a row; run `pipeline verify`")
        slot = int(key) - shard * capacity
        if not 0 <= slot < capacity:
            raise StoreDamagedError(
                f"{path}: member {name!r} belongs to another shard; run `pipeline verify`"
            )
        if name == key + suffix:
            if size != len(header) + field.row_nbytes or source.read(len(header), offset) != header:
                raise StoreDamagedError(f"{path}: member {name!r} is not an array of {field.row_shape}")
            if offsets[slot] != ABSENT:
                raise StoreDamagedError(f"{path}: member {name!r} comes twice")
            offsets[slot] = offset + len(header)
    sizes = np.where(offsets == ABSENT, 0, field.row_nbytes)
    return Extents(offsets, sizes.astype(np.int64))


def _octal(digits: bytes) -> int:
    """Return a number of a tar header; no sign, no blanks, as Python's own reading would take.

    Raises:
        ValueError: If it is none.
    """
    if not digits.isdigit():
        raise ValueError("not an octal number")
    return int(digits, 8)


def _members(source: ObjectReader) -> Iterator[tuple[str, int, int]]:
    """Yield name, first byte and length of each member."""
    path, position = source.path, 0
    while True:
        header = source.read(_BLOCK, position)
        if len(header) < _BLOCK:
            raise StoreDamagedError(f"{path}: the tar ends at byte {position} without an end mark")
        if not any(header):
            return
        blank = header[:148] + b" " * 8 + header[156:]
        try:
            name = header[:100].rstrip(b"\0").decode("ascii")
            size = _octal(header[124:135])
            # In Python's integers, which do not wrap.
            intact = _octal(header[148:154]) == sum(blank) and position + _BLOCK + size <= source.size
        except ValueError:
            intact = False
        if not intact:
            raise StoreDamagedError(f"{path}: the tar header at byte {position} is damaged")
        yield name, position + _BLOCK, size
        position += _BLOCK + size + -size % _BLOCK
