"""Room on the disk, asked for before long work is begun."""

import shutil

from shards.errors import UserError
from shards.location import Location
from shards.remote_path import RemotePath


def free_bytes(path: Location) -> int | None:
    """Bytes that can still be written where ``path`` is, or will be; None on a server, which does not say."""
    if isinstance(path, RemotePath):
        return None
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(path: Location, nbytes: int) -> None:
    """Refuses to begin what will not fit.

    Args:
        path: Folder that will be written, or is begun.
        nbytes: What is still to be written.

    Raises:
        UserError: If less than that is free.
    """
    free = free_bytes(path)
    if free is not None and nbytes > free:
        raise UserError(
            f"{path} needs {gigabytes(nbytes)} more, and {gigabytes(free)} are free there; "
            "free space or name another folder"
        )


def gigabytes(size: float) -> str:
    """A number of bytes in three digits."""
    return f"{size / 1e9:,.3g} GB" if size < 1e12 else f"{size / 1e12:,.3g} TB"
