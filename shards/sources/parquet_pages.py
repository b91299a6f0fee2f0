"""What the pages of a parquet file say of themselves, read before one of them is decoded.

pyarrow reserves for a page what its header says, whatever the footer says; and a value in a dictionary page costs some
bits for each row that repeats it.

Source: github:apache/parquet-format, README.md ("Data Pages") and src/main/thrift/parquet.thrift (PageHeader); the
encoding of its structs: github:apache/thrift, doc/specs/thrift-compact-protocol.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_KIND, _UNFOLDED, _STORED, _DATA, _DATA_V2 = 1, 2, 3, 5, 8
"""Numbers of PageHeader's fields."""
_DICTIONARY = 2
"""PageType.DICTIONARY_PAGE."""
_NUM_VALUES = 1
_FIRST_READ, _LONGEST_HEADER = 1 << 12, 1 << 24
_DEEPEST = 16

Struct = dict[int, Any]
"""Fields of a thrift struct by number: integers and structs; what else it holds is left out."""


@dataclass(frozen=True)
class PageSizes:
    """Bytes of the pages of a column in a row group, as their headers say.

    Attributes:
        unfolded: Of all of them, decompressed.
        dictionary: Of the dictionary page, decompressed; 0 where there is none.
    """

    unfolded: int
    dictionary: int


def page_sizes(read: Callable[[int, int], bytes], chunk: Any) -> PageSizes:
    """Return the sizes of a column's pages, by their headers alone.

    Args:
        read: Gives a number of bytes from an offset, both in this order; fewer at the file's end.
        chunk: pyarrow's description of the column in the row group.

    Raises:
        ValueError: If a header cannot be read, or leads out of the column.
    """
    position = chunk.data_page_offset
    if chunk.has_dictionary_page and 0 < (chunk.dictionary_page_offset or 0) < position:
        position = chunk.dictionary_page_offset
    end = position + chunk.total_compressed_size
    unfolded = dictionary = values = 0
    while position < end and values < chunk.num_values:
        header, nbytes = _header(read, position)
        size, stored = header.get(_UNFOLDED, -1), header.get(_STORED, -1)
        if size < 0 or stored < 0 or position + nbytes + stored > end:
            raise ValueError(f"the page at byte {position} leads out of its column")
        unfolded += size
        if header.get(_KIND) == _DICTIONARY:
            dictionary = max(dictionary, size)
        data = header.get(_DATA) or header.get(_DATA_V2) or {}
        values += max(0, data.get(_NUM_VALUES, 0))
        position += nbytes + stored
    return PageSizes(unfolded, dictionary)


def _header(read: Callable[[int, int], bytes], offset: int) -> tuple[Struct, int]:
    """Return a page's header and its length in bytes."""
    length = _FIRST_READ
    while True:
        content = read(length, offset)
        reader = _CompactReader(content)
        try:
            return reader.struct(), reader.position
        except IndexError as error:
            if len(content) < length or length >= _LONGEST_HEADER:
                raise ValueError(f"the header of the page at byte {offset} is not whole") from error
        length *= 8


class _CompactReader:
    """Reads a struct in thrift's compact protocol; raises IndexError where the bytes end."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.position = 0

    def struct(self, depth: int = 0) -> Struct:
        found: Struct = {}
        number = 0
        while (head := self._byte()) != 0:
            number = number + (head >> 4) if head >> 4 else self._integer()
            value = self._value(head & 15, depth)
            if value is not None:
                found[number] = value
        return found

    def _value(self, kind: int, depth: int, *, in_list: bool = False) -> int | Struct | None:
        """Return an integer or a struct; None of what is passed over."""
        if depth > _DEEPEST:
            raise ValueError("a page's header is nested too deeply")
        if kind in (1, 2):  # a field's truth is in its kind, a list's entries have a byte each
            self._pass(in_list)
        elif kind == 3:
            self._pass(1)
        elif kind in (4, 5, 6):
            return self._integer()
        elif kind == 7:
            self._pass(8)
        elif kind == 8:
            self._pass(self._varint())
        elif kind in (9, 10):
            head = self._byte()
            for _ in range(self._varint() if head >> 4 == 15 else head >> 4):
                self._value(head & 15, depth + 1, in_list=True)
        elif kind == 12:
            return self.struct(depth + 1)
        else:  # PageHeader has no maps
            raise ValueError(f"a page's header holds a value of the unknown kind {kind}")
        return None

    def _byte(self) -> int:
        self.position += 1
        return self._content[self.position - 1]

    def _pass(self, nbytes: int) -> None:
        self.position += nbytes
        if self.position > len(self._content):
            raise IndexError("the bytes end")

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a page's header holds an integer of more than 64 bits")

    def _integer(self) -> int:
        """Return an integer with its sign in the lowest bit."""
        value = self._varint()
        return (value >> 1) ^ -(value & 1)
