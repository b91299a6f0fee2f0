"""Places of images as text that means the same in every working folder, and that any file can hold."""

import os
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from shards.storage.location import Location
from shards.storage.remote_path import RemotePath, is_url


def printable(name: str) -> str:
    r"""Return a file name as text that any file can hold; bytes that are not UTF-8 become `\\xNN`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def whole_address(path: Location) -> str:
    """Return the address of a path or URL."""
    return address_of(str(path.absolute()))


def address_of(path: str) -> str:
    """Return the address of a local path; a name that is not UTF-8 becomes a `file://` address."""
    try:
        path.encode("utf-8")
    except UnicodeEncodeError:
        return "file://" + quote(os.fsencode(path))
    return path


def location_of(uri: str) -> Location:
    """Return the location that an address of a plan names."""
    if is_url(uri):
        return RemotePath.of_url(uri)
    if uri.startswith("file://"):
        return Path(os.fsdecode(unquote_to_bytes(uri.removeprefix("file://"))))
    return Path(uri)
