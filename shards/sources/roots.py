"""Where images may be read from: a table or a plan from elsewhere may name any file and any server."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from shards.sources.addresses import location_of
from shards.sources.found import SourceOptions
from shards.storage.location import Location, as_location
from shards.storage.remote_path import is_url


@dataclass(frozen=True)
class SourceRoots:
    """Folders, files and URLs below which images may be read; names are compared, links not followed.

    Attributes:
        places: Whole addresses without `.`, `..` and a slash at the end; `https://` alone is every such server.
    """

    places: tuple[str, ...]

    @classmethod
    def of(cls, places: Iterable[str | Location]) -> Self:
        """Return the roots at some paths and URLs."""
        return cls(tuple(dict.fromkeys(_normal(_absolute(place)) for place in places)))

    @classmethod
    def of_table(cls, table: Location, options: SourceOptions) -> Self:
        """Return where a table may name files: below its own folder, and where the user says."""
        return cls.of([table.absolute().parent, *options.roots])

    def hold(self, address: str) -> bool:
        """Return whether an address is at or below one of them."""
        place = _normal(_absolute(address))
        return any(place == root or place.startswith(root.rstrip("/") + "/") for root in self.places)


def _absolute(place: str | Location) -> str:
    if is_url(str(place)):
        return str(place)  # which need not name a server that this program knows
    return str(as_location(location_of(place) if isinstance(place, str) else place).absolute())


def _normal(place: str) -> str:
    scheme, separator, path = place.partition("://")
    if separator and not place.startswith("file://"):
        return f"{scheme}://{posixpath.normpath(path) if path else ''}"
    normal = posixpath.normpath(place)
    return normal[1:] if normal.startswith("//") else normal
