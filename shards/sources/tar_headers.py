"""Walking the headers of an uncompressed tar, strictly: what is not a whole tar is refused, never read up to the fault.

Python's `tarfile` ends quietly at a damaged header, at a cut between members and at the first zero block, and gives the
stored bytes of sparse members as if they were the file. Here a tar ends in two zero blocks with nothing but
zeros behind them.

Source: POSIX.1-2017 `pax` (ustar and pax interchange format) and GNU tar 1.35's manual, "Basic Tar Format" and
"Storing Sparse
Files" (headers L, K and S; sparse formats 0.0, 0.1 and 1.0).
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from shards.errors import SourceDamagedError
from shards.storage.object_reader import ObjectReader

BLOCK = 512
LARGEST_FILE = 1 << 30
"""Bytes of an image file beyond which it is not read."""
_LARGEST_NAME = 1 << 20
_LARGEST_MAP = 1 << 24
_ZEROS = bytes(BLOCK)
_SCAN = 1 << 20

Part = tuple[int, int, int]
"""Of a sparse file: a piece's first byte in the file, its first byte in the archive, its length."""


class Kind(Enum):
    """What a member of a tar is."""

    FILE = "file"
    HARD_LINK = "hard link"
    SYMBOLIC_LINK = "symbolic link"
    FOLDER = "folder"
    SPECIAL = "device or pipe"


@dataclass(frozen=True, slots=True)
class Member:
    r"""One member of a tar.

    Attributes:
        name: Its name; bytes that are not UTF-8 are written `\\xNN`.
        kind: What it is.
        offset: First byte behind its header, in the outermost file.
        nbytes: Length of the file.
        target: What a link leads to.
        parts: Pieces of a sparse file, between which are zeros; None for a plain one.
        problem: Why its bytes cannot be had.
    """

    name: str
    kind: Kind
    offset: int
    nbytes: int
    target: str = ""
    parts: tuple[Part, ...] | None = None
    problem: str | None = None


@dataclass
class LostBytes:
    """What could not be read of damaged tars, when whatever is readable was asked for.

    Attributes:
        places: File, first byte and fault of each part that was passed over.
        nbytes: Bytes passed over in all.
    """

    places: list[str] = field(default_factory=list)
    nbytes: int = 0


class _FaultError(Exception):
    """Where the walk cannot go on."""

    def __init__(self, offset: int, what: str, resume: int | None = None) -> None:
        super().__init__(what)
        self.offset = offset
        self.resume = offset + BLOCK if resume is None else resume


@dataclass
class _Pending:
    """What the headers before a member's own say about it."""

    pax: list[tuple[str, bytes]] = field(default_factory=list)
    name: bytes | None = None
    target: bytes | None = None

    def get(self, key: str) -> bytes | None:
        return next((value for name, value in reversed(self.pax) if name == key), None)


def walk(
    source: ObjectReader,
    what: str,
    *,
    start: int = 0,
    nbytes: int | None = None,
    lost: LostBytes | None = None,
) -> Iterator[Member]:
    """Yield the members of a tar, or of a tar that lies uncompressed inside another file, in order.

    Args:
        source: The outermost file.
        what: Names the tar in messages.
        start: Its first byte in the file.
        nbytes: Its length; by default it reaches to the file's end.
        lost: Given, whatever is readable is taken, and what is not is counted here.

    Raises:
        SourceDamagedError: If it is not one whole tar, with file and offset.
    """
    end = source.size if nbytes is None else min(source.size, start + nbytes)
    walker = _Walk(source, end)
    position = start
    while True:
        try:
            yield from walker.members(position)
        except _FaultError as fault:
            if lost is None:
                raise SourceDamagedError(
                    f"{what} is not a whole uncompressed tar: {fault} at byte {fault.offset - start}; "
                    "download or pack "
                    "it again, or take what is readable with --take-readable"
                ) from fault
            position = _next_header(source, fault.resume, end)
            lost.places.append(f"{what}: {fault} at byte {fault.offset - start}")
            lost.nbytes += position - min(fault.offset, fault.resume)
            if position >= end:
                return
        else:
            return


class _Walk:
    def __init__(self, source: ObjectReader, end: int) -> None:
        self._source = source
        self._end = end

    def members(self, position: int) -> Iterator[Member]:
        pending = _Pending()
        while True:
            block = self._block(position)
            if block is None:
                raise _FaultError(position, "it ends without the two zero blocks that end a tar")
            if block == _ZEROS:
                self._require_end(position)
                return
            if not is_header(block):
                raise _FaultError(position, "a damaged header")
            size = self._size(block, pending, position)
            kind = block[156:157]
            behind = position + BLOCK
            if kind in b"xgXLK":
                self._extend(pending, kind, self._content(behind, size))
                position = behind + _padded(size)
                continue
            member, position = self._member(block, pending, kind, behind, size)
            pending = _Pending()
            yield member

    def _block(self, position: int) -> bytes | None:
        if position + BLOCK > self._end:
            if position < self._end:
                raise _FaultError(position, "it is cut off")
            return None
        return self._source.read(BLOCK, position)

    def _require_end(self, position: int) -> None:
        second = self._block(position + BLOCK)
        if second != _ZEROS:
            raise _FaultError(position, "one zero block alone, where two end a tar")
        rest = position + 2 * BLOCK
        while rest < self._end:
            piece = self._source.read(min(_SCAN, self._end - rest), rest)
            if not piece:
                return
            if piece.strip(b"\0"):
                first = rest + len(piece) - len(piece.lstrip(b"\0"))
                block = first - (first - position) % BLOCK
                raise _FaultError(block, "more behind its end, as if two tars had been joined,", resume=block)
            rest += len(piece)

    def _size(self, block: bytes, pending: _Pending, position: int) -> int:
        size = _number(block[124:136])
        stated = pending.get("size") if block[156:157] not in b"xgXLK" else None
        if stated is not None and stated.isdigit() and len(stated) < 20:
            size = int(stated)
        if size is None or size < 0:
            raise _FaultError(position, "a header without a size")
        return size

    def _content(self, offset: int, size: int) -> bytes:
        if size > _LARGEST_NAME:
            raise _FaultError(offset - BLOCK, f"a name or extended header of {size} bytes")
        if offset + size > self._end:
            raise _FaultError(offset - BLOCK, "it is cut off inside a member")
        return self._source.read(size, offset)

    def _extend(self, pending: _Pending, kind: bytes, content: bytes) -> None:
        if kind == b"L":
            pending.name = content.rstrip(b"\0")
        elif kind == b"K":
            pending.target = content.rstrip(b"\0")
        elif kind != b"g":  # what holds for all members is no name, link or size
            pending.pax += _pax_records(content)

    def _member(
        self, block: bytes, pending: _Pending, kind: bytes, offset: int, size: int
    ) -> tuple[Member, int]:
        """Return the member whose own header is `block`, and where the next header is."""
        name = pending.get("path") or pending.name or _ustar_name(block)
        name = pending.get("GNU.sparse.name") or name
        target = pending.get("linkpath") or pending.target or _text(block[157:257])
        if kind == b"1" and size and self._has_content(offset):
            kind = b"0"  # a hard link that pax archivers store with its content
        if kind in b"12":
            what = Kind.HARD_LINK if kind == b"1" else Kind.SYMBOLIC_LINK
            return Member(printable(name), what, offset, 0, printable(target)), offset
        if kind == b"5" or (kind in b"\x000" and name.endswith(b"/")):
            return Member(printable(name), Kind.FOLDER, offset, 0), offset
        if kind in b"346":
            return Member(printable(name), Kind.SPECIAL, offset, 0), offset
        parts, real, first = self._sparse(block, pending, kind, offset, size)
        stop = first + _padded(size)
        if first + size > self._end:
            raise _FaultError(offset - BLOCK, "it is cut off inside a member")
        if kind not in b"\x0007S":
            return Member(printable(name), Kind.SPECIAL, offset, 0), stop
        if parts is None:
            problem = "a sparse tar member that cannot be rebuilt" if real >= 0 else None
            return Member(printable(name), Kind.FILE, offset, size, problem=problem), stop
        return Member(printable(name), Kind.FILE, offset, real, parts=parts), stop

    def _has_content(self, offset: int) -> bool:
        following = self._block(offset)
        return following is not None and following != _ZEROS and not is_header(following)

    def _sparse(
        self, block: bytes, pending: _Pending, kind: bytes, offset: int, size: int
    ) -> tuple[tuple[Part, ...] | None, int, int]:
        """Return the pieces and length of a sparse file (−1 of a plain one), and where its stored bytes begin."""
        if kind == b"S":
            pairs, behind = self._old_map(block, offset)
            real = _number(block[483:495])
            return self._placed(pairs, behind, size, real), -1 if real is None else max(real, 0), behind
        stated = pending.get("GNU.sparse.realsize") or pending.get("GNU.sparse.size")
        if stated is None:
            return None, -1, offset
        real = int(stated) if stated.isdigit() and len(stated) < 20 else 0
        if pending.get("GNU.sparse.major") == b"1":
            listed, length = self._listed_map(offset, min(size, self._end - offset))
            return self._placed(listed, offset + length, size - length, real), real, offset
        return self._placed(_pax_map(pending), offset, size, real), real, offset

    def _old_map(self, block: bytes, offset: int) -> tuple[list[tuple[int, int]] | None, int]:
        numbers = [block[386 + 12 * i : 398 + 12 * i] for i in range(8)]
        more = block[482] != 0
        while more:
            extension = self._block(offset)
            if extension is None:
                raise _FaultError(offset, "it is cut off inside a header")
            numbers += [extension[12 * i : 12 * i + 12] for i in range(42)]
            more, offset = extension[504] != 0, offset + BLOCK
            if len(numbers) * 12 > _LARGEST_MAP:
                return None, offset
        return _pairs([_number(number) for number in numbers if number.strip(b"\0 ")]), offset

    def _listed_map(self, offset: int, size: int) -> tuple[list[tuple[int, int]] | None, int]:
        """Return the map in front of the data in format 1.0, and the bytes it takes."""
        content = b""
        while len(content) < min(size, _LARGEST_MAP):
            content += self._source.read(BLOCK, offset + len(content))
            lines = content.split(b"\n")
            if len(lines) > 1 and lines[0].isdigit() and len(lines[0]) < 9:
                count = int(lines[0])
                if len(lines) > 2 * count + 1:
                    numbers = [
                        int(n) if n.isdigit() and len(n) < 20 else None for n in lines[1 : 2 * count + 1]
                    ]
                    return _pairs(numbers), len(content)
            elif len(lines) > 1:
                break
        return None, 0

    def _placed(
        self, pairs: list[tuple[int, int]] | None, offset: int, stored: int, real: int | None
    ) -> tuple[Part, ...] | None:
        if pairs is None or real is None or not 0 <= real <= LARGEST_FILE:
            return None
        parts, end = [], 0
        for first, length in pairs:
            if first < end or first + length > real:
                return None
            if length:
                parts.append((first, offset, length))
            offset, stored, end = offset + length, stored - length, first + length
        return tuple(parts) if stored >= 0 else None


def is_header(block: bytes) -> bool:
    """Return whether 512 bytes are the header of a tar member: the checksum fits."""
    stated = _number(block[148:156])
    if len(block) != BLOCK or stated is None:
        return False
    rest = block[:148] + b" " * 8 + block[156:]
    unsigned = sum(rest)
    # Some old writers summed signed bytes.
    return stated == unsigned or stated == unsigned - 256 * sum(byte > 127 for byte in rest)


def plain_file(block: bytes) -> tuple[str, int] | None:
    """Return name and length in a header that a plain file's bytes follow; None if it is not one."""
    if not is_header(block) or block[156:157] not in b"\x0007":
        return None
    size = _number(block[124:136])
    return None if size is None or size < 0 else (printable(_ustar_name(block)), size)


def _next_header(source: ObjectReader, position: int, end: int) -> int:
    """Return where the next whole header begins, at `position` or a number of blocks behind it; else the end."""
    while position + BLOCK <= end:
        piece = source.read(min(_SCAN, end - position), position)
        for place in range(0, len(piece) - BLOCK + 1, BLOCK):
            if piece[place + 257 : place + 262] == b"ustar" and is_header(piece[place : place + BLOCK]):
                return position + place
        position += max(len(piece) // BLOCK * BLOCK, BLOCK)
    return end


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _number(digits: bytes) -> int | None:
    """Return a number of a header: octal digits, or base 256 behind a byte of 0x80 or 0xFF."""
    if digits[:1] in (b"\x80", b"\xff"):
        value = int.from_bytes(digits[1:], "big")
        return value - (1 << 8 * (len(digits) - 1)) if digits[:1] == b"\xff" else value
    text = digits.partition(b"\0")[0].strip()
    try:
        return int(text, 8) if text else 0
    except ValueError:
        return None


def _text(part: bytes) -> bytes:
    return part.partition(b"\0")[0]


def _ustar_name(block: bytes) -> bytes:
    name, prefix = _text(block[:100]), _text(block[345:500])
    return prefix + b"/" + name if prefix and block[257:263] == b"ustar\0" else name


def _pax_records(content: bytes) -> list[tuple[str, bytes]]:
    r"""Return the records `LENGTH KEY=VALUE\n` of an extended header; what is not one ends the list."""
    records, position = [], 0
    while position < len(content):
        digits, space, _ = content[position : position + 24].partition(b" ")
        if not (space and digits.isdigit()):
            break
        length = int(digits)
        record = content[position + len(digits) + 1 : position + length]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n"):
            break
        records.append((key.decode("utf-8", "backslashreplace"), value[:-1]))
        position += length
    return records


def _pax_map(pending: _Pending) -> list[tuple[int, int]] | None:
    """Return the map of formats 0.0 and 0.1, in the extended header."""
    joined = pending.get("GNU.sparse.map")
    if joined is not None:
        texts = joined.split(b",")
    else:
        texts = [value for key, value in pending.pax if key in ("GNU.sparse.offset", "GNU.sparse.numbytes")]
    return _pairs([int(text) if text.isdigit() and len(text) < 20 else None for text in texts])


def _pairs(numbers: list[int | None]) -> list[tuple[int, int]] | None:
    known = [number for number in numbers if number is not None and number >= 0]
    if len(known) != len(numbers) or len(known) % 2:
        return None
    return list(zip(known[::2], known[1::2], strict=True))


def printable(name: bytes) -> str:
    r"""Return a name as text that any file can hold; bytes that are not UTF-8 become `\xNN`."""
    return name.decode("utf-8", "backslashreplace")


def resolved(member: Member, by_name: dict[str, Member]) -> Member | None:
    """Return the file of the same tar that a link leads to, also over other links; None if it leads to none.

    Args:
        member: A link.
        by_name: Members by `normal_name`.
    """
    for _ in range(40):  # as many as a kernel follows
        if member.kind is Kind.HARD_LINK:
            target = normal_name(member.target)
        elif member.kind is Kind.SYMBOLIC_LINK:
            if member.target.startswith("/"):
                return None
            target = normal_name(posixpath.join(posixpath.dirname(member.name), member.target))
        else:
            return member if member.kind is Kind.FILE else None
        following = by_name.get(target)
        if following is None:
            return None
        member = following
    return None


def normal_name(name: str) -> str:
    """Return a member's name without `.` and `..`, by which links find it."""
    return posixpath.normpath(name.lstrip("/") or ".")
