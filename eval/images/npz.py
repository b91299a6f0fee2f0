"""Arrays of .npz files from outside: what a header claims is compared with the file before anything is allocated."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from shards import UserError

LARGEST_ARRAY = 16 << 30
"""Bytes of the largest array that is read into memory; a small compressed file can unfold to any size."""
_PIECE = 1 << 20
_BROKEN = (
    *(zipfile.BadZipFile, zlib.error, struct.error, ValueError, EOFError, KeyError, OverflowError),
    *(NotImplementedError, RuntimeError),  # of zipfile: an unknown compression, an encrypted member
    *(SyntaxError, tokenize.TokenError),  # of numpy: a header that is no Python literal
)


@dataclass(frozen=True)
class ArrayHeader:
    """What stands before an array's bytes.

    Attributes:
        shape: Its shape.
        order: Order of its bytes.
        dtype: Its type, which holds no Python objects.
    """

    shape: tuple[int, ...]
    order: Literal["C", "F"]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the array, in numbers that do not wrap."""
        return math.prod(self.shape) * self.dtype.itemsize


@contextmanager
def open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open an .npz; whatever is found to be wrong with it within this context is one error.

    Raises:
        UserError: The file is not there, truncated or no .npz, or an array in it is not what its header says.
    """
    if not path.is_file():  # a device has no end
        raise UserError(f"there is no file {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # the file cannot be opened; else zipfile was sent to a place that no file has
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{path} is not a whole .npz ({reason:.200}); write or download it again") from error


def read_header(stream: IO[bytes], nbytes: int) -> ArrayHeader:
    """Read what stands before an array's bytes, and leave the stream behind it.

    Args:
        stream: The .npy file, at its beginning.
        nbytes: Length of the file.

    Raises:
        ValueError: It is none, holds Python objects, or claims more bytes than there are.
    """
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(stream)
    elif version == (2, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_2_0(stream)
    else:
        raise ValueError(f"an array of .npy version {version}; versions 1.0 and 2.0 are read")
    header = ArrayHeader(shape, "F" if fortran else "C", dtype)
    if dtype.hasobject:
        raise ValueError("an array holds Python objects")
    if min(shape, default=0) < 0 or stream.tell() + header.nbytes > nbytes:
        raise ValueError(
            f"an array claims to be {dtype} {list(shape)} and has {nbytes} bytes with its header"
        )
    return header


def read_array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """Read one array of an .npz into memory, within `open_npz`.

    Raises:
        KeyError: There is none of this name.
        ValueError: It is not what its header says, or larger than `LARGEST_ARRAY`.
    """
    entry = archive.getinfo(f"{name}.npy")
    with archive.open(entry) as stream:
        header = read_header(stream, entry.file_size)
        if header.nbytes > LARGEST_ARRAY:
            raise ValueError(f"{name} has {header.nbytes:,} bytes, and is read up to {LARGEST_ARRAY:,}")
        content = bytearray()
        # To the end, where the member's checksum is compared.
        while len(content) <= header.nbytes and (piece := stream.read(_PIECE)):
            content += piece
        if len(content) != header.nbytes:
            raise ValueError(f"{name} does not hold the {header.nbytes:,} bytes that its header says")
    return np.ndarray(header.shape, header.dtype, content, order=header.order)
