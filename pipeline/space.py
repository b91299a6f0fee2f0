"""Room on the disk, asked for before long work is begun."""

import shutil
from pathlib import Path

from shards.errors import UserError


def free_bytes(path: Path) -> int:
    """Bytes that can still be written where ``path`` is, or will be."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(path: Path, nbytes: int) -> None:
    """Refuses to begin what will not fit.

    Args:
        path: Folder that will be written, or is begun.
        nbytes: What is still to be written.

    Raises:
        UserError: If less than that is free.
    """
    free = free_bytes(path)
    if nbytes > free:
        raise UserError(
            f"{path} needs {gigabytes(nbytes)} more, and {gigabytes(free)} are free there; "
            "free space or name another folder"
        )


def gigabytes(size: float) -> str:
    """A number of bytes in three digits."""
    return f"{size / 1e9:,.3g} GB" if size < 1e12 else f"{size / 1e12:,.3g} TB"
