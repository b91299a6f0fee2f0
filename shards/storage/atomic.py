"""Making a file appear whole or not at all, and never twice.

Bytes are written under a temporary name in the folder they will stay in, flushed to the disk, and then given
their final name. `publish_once` uses ``link``, which refuses a name that is taken: the first publication
wins for ever. `replacing` uses ``rename``, for files that have a newer version.
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import BinaryIO

from shards.storage.remote_path import RemotePath

_TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")


def temporary_path(final: Path) -> Path:
    """Return a name nobody else uses, in the folder of ``final``."""
    return final.with_name(f".{final.name}.{uuid.uuid4().hex}.tmp")


def is_temporary(path: PurePath | RemotePath) -> bool:
    """Return whether a name was made by `temporary_path`."""
    return _TEMPORARY.fullmatch(path.name) is not None


def publish_once(temporary: Path, final: Path) -> bool:
    """Give a finished temporary file its final name, unless that is taken; the temporary name goes.

    Args:
        temporary: A complete file in the folder of ``final``, already flushed to the disk.
        final: The name to take.

    Returns:
        Whether this file is the one published; False if another had been published before.
    """
    try:
        # link(2) fails on a name that exists, where rename(2) would replace it.
        os.link(temporary, final)
        won = True
    except FileExistsError:
        won = False
    temporary.unlink(missing_ok=True)
    if won:
        fsync_dir(final.parent)
    return won


@contextmanager
def _temporary(final: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """Open a new file beside ``final``, flushed to the disk when the block ends; removed if the block fails."""
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(final)
    try:
        with temporary.open("xb") as file:
            yield temporary, file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_temporary(final: Path, content: bytes) -> Path:
    """Write ``content`` under a temporary name beside ``final``, flushed to the disk."""
    with _temporary(final) as (temporary, file):
        file.write(content)
    return temporary


@contextmanager
def replacing(final: Path) -> Iterator[BinaryIO]:
    """Open a file to write that takes the name ``final`` when the block ends, flushed to the disk.

    For what is too large to be handed to `shards.replace_atomically`. If the block fails, ``final`` stays as it was.
    """
    with _temporary(final) as (temporary, file):
        yield file
    temporary.replace(final)
    fsync_dir(final.parent)


def fsync_dir(folder: Path) -> None:
    """Flush a folder, so that names given in it outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
