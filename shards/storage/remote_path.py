"""An object or folder behind a URL, for any file system that fsspec knows.

`RemotePath` is the part of `pathlib.Path` that stores use, with the same exceptions. Folders exist as far as there are
objects in them. Creating is exclusive: the server is asked to refuse a name that is taken (``If-None-Match: *``).
"""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any, Self
from urllib.parse import unquote

from shards.errors import UsageError, printable_text
from shards.storage.file_systems import WEB, WRITABLE, file_system
from shards.storage.parallel import in_parallel
from shards.storage.remote_calls import ShortAnswerError, retried


def is_url(text: str) -> bool:
    """Return whether a place is named by a URL; ``file://`` is a way to write a path."""
    return "://" in text and not text.startswith("file://")


_USER = re.compile(r"(^|/)[^/@]*:[^/@]*@")
_PARAMETER = re.compile(
    r"[?&#;][^?&#;=/]*(token|sig|secret|passw|pwd|credential|key|auth|session)[^?&#;=/]*=", re.IGNORECASE
)


def refuse_credentials(url: str) -> None:
    """Refuse a URL with credentials in any of their spellings, without showing it: URLs are written to logs.

    These are a user in front of the host or in the path, any query to a web server, and parameters that are named for
    secrets, behind `?`, `&`, `#` or `;`, also with escapes.

    Raises:
        UsageError: Naming the scheme alone.
    """
    scheme, separator, path = url.partition("://")
    if not separator:
        return
    for spelling in (path, unquote(path)):
        named = "@" in spelling.partition("/")[0] or _USER.search(spelling) or _PARAMETER.search(spelling)
        if named or (scheme in WEB and "?" in spelling):
            raise UsageError(
                f"a {printable_text(scheme)}:// URL must hold no credentials, because URLs are written to logs; "
                "set them in the environment"
            )


@dataclass(frozen=True)
class RemotePath:
    """An object or a folder behind a URL.

    Attributes:
        scheme: What the URL begins with, such as ``s3``.
        path: What comes behind it, such as ``bucket/store``.
    """

    scheme: str
    path: str

    @classmethod
    def of_url(cls, url: str) -> Self:
        """Return the place a URL names.

        Raises:
            UsageError: If fsspec does not know its scheme, its library is not installed, or it holds credentials.
        """
        refuse_credentials(url)
        scheme, _, path = url.partition("://")
        place = cls(scheme, path.rstrip("/"))
        file_system(scheme, os.getpid())
        return place

    def __str__(self) -> str:
        return f"{self.scheme}://{self.path}"

    def __truediv__(self, name: str | PurePosixPath) -> Self:
        return type(self)(self.scheme, f"{self.path}/{name}".rstrip("/"))

    @property
    def name(self) -> str:
        """The last part."""
        return self.path.rpartition("/")[2]

    @property
    def stem(self) -> str:
        """The last part without its suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The ending of the last part."""
        return PurePosixPath(self.name).suffix

    @property
    def parent(self) -> Self:
        """The folder it is in."""
        return type(self)(self.scheme, self.path.rpartition("/")[0])

    def absolute(self) -> Self:
        """Return itself: a URL means the same everywhere."""
        return self

    def with_name(self, name: str) -> Self:
        """Return its neighbour of this name."""
        return self.parent / name

    def relative_to(self, root: RemotePath) -> PurePosixPath:
        """Return its name inside a folder."""
        return PurePosixPath(self.path).relative_to(root.path)

    @property
    def _fs(self) -> Any:
        return file_system(self.scheme, os.getpid())

    @property
    def _address(self) -> str:
        return str(self) if self.scheme in WEB else self.path

    # Reading

    def exists(self) -> bool:
        """Return whether there is such an object."""
        try:
            self.size()
        except FileNotFoundError:
            return False
        return True

    is_file = exists

    def is_dir(self) -> bool:
        """Return whether there are objects below it."""
        return self.can_list and next(self.iterdir(), None) is not None

    def size(self) -> int:
        """Return the size of the object in bytes.

        Raises:
            FileNotFoundError: If it is not there.
        """
        info = retried(lambda: self._fs.info(self._address), f"looking at {self}")
        if info["type"] != "file" or info["size"] is None:
            raise FileNotFoundError(str(self))
        return int(info["size"])

    def version(self) -> tuple[int, str]:
        """Return the object's bytes and its version on the server: a tag or a time, "" if the server gives none.

        Raises:
            FileNotFoundError: If it is not there.
        """
        info = retried(lambda: self._fs.info(self._address), f"looking at {self}")
        if info["type"] != "file" or info["size"] is None:
            raise FileNotFoundError(str(self))
        keys = ("ETag", "etag", "md5Hash", "LastModified", "last_modified", "updated", "mtime", "created")
        return int(info["size"]), next((str(info[key]) for key in keys if info.get(key)), "")

    def read_bytes(self) -> bytes:
        """Return the content of a small object."""
        return bytes(retried(lambda: self._fs.cat_file(self._address), f"reading {self}"))

    def read_range(self, offset: int, nbytes: int) -> bytes:
        """``nbytes`` bytes from ``offset`` on, all of which must be there.

        Raises:
            RemoteError: If every answer was too short, naming object and attempts.
        """

        def read() -> bytes:
            content = self._fs.cat_file(self._address, start=offset, end=offset + nbytes)
            if len(content) != nbytes:
                raise ShortAnswerError(f"{len(content)} bytes instead of {nbytes} from byte {offset} on")
            return bytes(content)

        return retried(read, f"reading {self}")

    def open(self, mode: str = "rb") -> IO[bytes]:
        """Return a file to read from front to back."""
        assert mode == "rb", mode
        file: IO[bytes] = retried(lambda: self._fs.open(self._address, "rb"), f"opening {self}")
        return file

    # Listing

    def sizes(self, names: list[str]) -> dict[str, int]:
        """Return the bytes of those of these objects that exist, from one listing where the server lists."""
        if self.can_list:
            found = self.object_sizes()
            return {name: found[name] for name in names if name in found}

        def size(name: str) -> int | None:
            try:
                return (self / name).size()
            except FileNotFoundError:
                return None

        answers = zip(names, in_parallel(size, names), strict=True)
        return {name: nbytes for name, nbytes in answers if nbytes is not None}

    def iterdir(self) -> Iterator[Self]:
        """Return objects and folders in this folder, sorted."""
        self._require_listing()
        try:
            found = retried(lambda: self._fs.ls(self.path, detail=False), f"listing {self}")
        except FileNotFoundError:
            found = []
        prefix = self.path.strip("/") + "/"  # some servers list the folder itself as well
        names = {path.strip("/").removeprefix(prefix) for path in found if path.strip("/").startswith(prefix)}
        return (self / name for name in sorted(names))

    def glob(self, pattern: str) -> Iterator[Self]:
        """Return objects below this folder whose relative path fits, sorted."""
        depth = pattern.count("/")
        names = (name for name in sorted(self.object_names()) if name.count("/") == depth)
        return (self / name for name in names if PurePosixPath(name).match(pattern))

    def object_names(self, below: str = "") -> list[str]:
        """Return names inside this folder of every object below it, or below one of its folders."""
        inside = f"{below}/" if below else ""
        return [inside + name for name in (self / below).object_sizes()]

    def object_sizes(self) -> dict[str, int]:
        """Return the bytes of every object below this folder by its name there."""
        self._require_listing()
        found = retried(lambda: self._fs.find(self.path, detail=True), f"listing {self}")
        prefix = self.path.strip("/") + "/"
        return {
            path.strip("/").removeprefix(prefix): int(info["size"])
            for path, info in found.items()
            if path.strip("/").startswith(prefix)
        }

    @property
    def can_list(self) -> bool:
        """Whether the server says what it has; web servers do not."""
        return self.scheme not in WEB

    def _require_listing(self) -> None:
        if not self.can_list:
            raise UsageError(
                f"{self}: a web server does not list what it has; only finished stores can be read there"
            )

    # Writing

    def mkdir(self, *, parents: bool = False, exist_ok: bool = False) -> None:
        """Do nothing: a folder exists as soon as an object does."""

    def create(self, content: bytes) -> bool:
        """Write a small object unless the name is taken; says whether it was free.

        An attempt whose answer was lost may have been the first itself; callers read what is there.
        """
        self._require_writable()
        try:
            retried(lambda: self._fs.pipe_file(self.path, content, mode="create"), f"creating {self}")
        except FileExistsError:
            return False
        return True

    def upload(self, file: str) -> bool:
        """Write a file of this machine as an object, unless the name is taken; says whether it was free."""
        self._require_writable()
        try:
            retried(lambda: self._fs.put_file(file, self.path, mode="create"), f"creating {self}")
        except FileExistsError:
            return False
        return True

    def write_bytes(self, content: bytes) -> None:
        """Write a small object, whole, in place of what may be there."""
        self._require_writable()
        retried(lambda: self._fs.pipe_file(self.path, content), f"writing {self}")

    def unlink(self, *, missing_ok: bool = False) -> None:
        """Remove an object; most servers do not say whether it was there."""
        self._require_writable()
        try:
            retried(lambda: self._fs.rm_file(self.path), f"removing {self}")
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmdir(self) -> None:
        """Do nothing: a folder without objects does not exist."""

    def replace(self, target: Self) -> Self:
        """Copy the object to another name, over what may be there, and remove it here."""
        self._require_writable()
        retried(lambda: self._fs.cp_file(self.path, target.path), f"moving {self} to {target}")
        self.unlink(missing_ok=True)
        return target

    def require_first_creation_wins(self) -> None:
        """Find out whether the server refuses to create an object twice; many of the smaller ones do not.

        Raises:
            UsageError: If it does not.
        """
        probe = self / f".probe.{uuid.uuid4().hex}.tmp"  # a temporary name: see `shards.storage.atomic`
        try:
            if probe.create(b"first") and probe.create(b"second"):
                raise UsageError(
                    f"{self} cannot hold a store that is written by several workers: its server ignores "
                    "If-None-Match and lets a second object replace the first; write to a folder and upload that"
                )
        finally:
            probe.unlink(missing_ok=True)

    def _require_writable(self) -> None:
        if self.scheme not in WRITABLE:
            raise UsageError(
                f"{self} can only be read: {self.scheme} is not known to create an object whole and once; "
                "write to s3:// or gs://, or to a folder"
            )
