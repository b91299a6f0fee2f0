"""The bytes of one image, from wherever the plan says they are."""

import os
from pathlib import Path
from urllib.parse import unquote_to_bytes

from shards.errors import UserError
from shards.plan import SourceRecord


class BadImageError(Exception):
    """One image cannot be used; the message is the reason that the store lists for it."""


class SourceGoneError(UserError):
    """The source as a whole is no longer there."""


class SourceReader:
    """Reads the bytes of records; may be used by several threads at once."""

    def read(self, record: SourceRecord) -> bytes:
        """All bytes of one image.

        Raises:
            BadImageError: If this image is missing, unreadable or has another size than when it was listed.
            SourceGoneError: If the folder it lay in is gone.
            OSError: If the device fails; reading again may help.
        """
        path = local_path(record.uri)
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size != record.nbytes:
                    raise BadImageError(
                        f"changed since it was listed: {record.nbytes} bytes then, {size} now"
                    )
                return file.read()
        except FileNotFoundError as error:
            if not path.parent.is_dir():
                raise SourceGoneError(
                    f"the source is gone: {path.parent} does not exist any more; "
                    "bring it back and run the same command again"
                ) from error
            raise BadImageError("missing: it was there when the source was listed") from error
        except PermissionError as error:
            raise BadImageError("unreadable: permission denied") from error


def local_path(uri: str) -> Path:
    """The path of a local address."""
    if uri.startswith("file://"):
        return Path(os.fsdecode(unquote_to_bytes(uri.removeprefix("file://"))))
    return Path(uri)
