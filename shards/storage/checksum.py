"""CRC32C (Castagnoli) of rows: the checksum zarr uses too, computed by the processor's own instruction.

Source: RFC 3720 section 12.1 and appendix B.4.
"""

from __future__ import annotations

from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

if google_crc32c.implementation != "c":
    raise ImportError(
        "google-crc32c must be installed with its compiled extension; its Python one is 1000× slower"
    )


def crc32c(data: bytes | NDArray[Any]) -> int:
    """CRC32C of the bytes of a C-contiguous buffer."""
    return int(google_crc32c.value(data))


def crc32c_rows(rows: NDArray[Any]) -> NDArray[np.uint32]:
    """CRC32C of each row of an array of shape [k, ...] whose rows are C-contiguous, uint32[k]."""
    return np.fromiter((google_crc32c.value(row) for row in rows), np.uint32, len(rows))
