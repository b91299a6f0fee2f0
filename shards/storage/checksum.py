"""CRC32C (Castagnoli) of rows: the checksum zarr uses too, computed by the processor's own instruction.

Source: RFC 3720 section 12.1 and appendix B.4.

The package is `crc32c` and not zarr's `google-crc32c`, which is as fast and keeps the interpreter's lock while it
computes: one thread in all could check rows.
"""

from __future__ import annotations

from typing import Any

import crc32c as implementation
import numpy as np
from numpy.typing import NDArray


def crc32c(data: bytes | memoryview | NDArray[Any]) -> int:
    """Return the CRC32C of the bytes of a C-contiguous buffer; other threads run meanwhile if it has over 32 KiB."""
    return implementation.crc32c(data)  # type: ignore[arg-type]  # arrays are buffers for Python 3.12 and later alone


def crc32c_rows(rows: NDArray[Any]) -> NDArray[np.uint32]:
    """Return the CRC32C of each row of an array of shape [k, ...] whose rows are C-contiguous, uint32[k]."""
    return np.fromiter((implementation.crc32c(row) for row in rows), np.uint32, len(rows))
