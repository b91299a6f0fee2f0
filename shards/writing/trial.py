"""Trying out what writing rows costs here, without a store: on a scratch file that has no name."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.storage.checksum import crc32c_rows
from shards.storage.digests import ALGORITHMS
from shards.storage.file_writer import FileWriter
from shards.values.moments import TokenSums


@dataclass(frozen=True)
class WriteRates:
    """Rows a second that one thread's work on them and the disk allow, each by itself."""

    writer: float
    disk: float


def try_writing(
    folder: Path, arrays: Mapping[str, NDArray[Any]], sums: TokenSums, algorithm: str, seconds: float
) -> WriteRates:
    """Write some rows again and again, as a shard's writer does: digest, checksums and sums beside each other.

    Args:
        folder: Where the scratch file goes; its disk is the one measured.
        arrays: Rows by field, each [k, *row_shape].
        sums: What adds the tokens up.
        algorithm: Of the digest.
        seconds: How long, about.
    """
    rows, hasher = len(arrays["tokens"]), ALGORITHMS[algorithm]()
    views = [np.ascontiguousarray(array).data.cast("B") for array in arrays.values()]

    def account() -> None:
        for array in arrays.values():
            crc32c_rows(array)
        sums.update(arrays["tokens"])

    def digest() -> None:
        for view in views:
            hasher.update(view)

    count = 0
    with tempfile.TemporaryFile(dir=folder, buffering=0) as scratch, ThreadPoolExecutor(2) as pool:
        file = FileWriter(scratch.fileno(), past_cache=True)
        begun = time.perf_counter()
        while time.perf_counter() - begun < seconds:
            beside = [pool.submit(account), pool.submit(digest)]
            file.write(views)
            for work in beside:
                work.result()
            count += rows
        worked = time.perf_counter() - begun
        begun = time.perf_counter()
        os.fsync(scratch.fileno())
        disk = file.seconds + time.perf_counter() - begun
    return WriteRates(count / worked, count / disk)
