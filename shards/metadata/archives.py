"""Which tar or parquet file a plan's offsets belong to: a file of the same name may be packed again in other order."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Self


@dataclass(frozen=True)
class ArchiveIdentity:
    """What an archive was when its images were listed.

    Attributes:
        nbytes: Its length.
        modified: When it was last changed: nanoseconds since 1970, or what a server calls the object's
        version; "" where
            nothing says.
        rows: Of a parquet file, SHA-256 over length and CRC32C of every image in order of row; "" of a tar, whose
            members have names.
        column: Of a parquet file, the column that holds the images; "" of a tar.
        lost: Bytes that could not be read, when whatever is readable was asked for.
    """

    nbytes: int
    modified: str
    rows: str = ""
    column: str = ""
    lost: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read back what `to_dict` returned.

        Raises:
            ValueError: If it is something else.
        """
        kinds = {"nbytes": int, "modified": str, "rows": str, "column": str, "lost": int}
        if not isinstance(values, dict) or set(values) != set(kinds):
            raise ValueError(f"an archive must have exactly {sorted(kinds)}, found {values!r:.200}")
        if any(type(values[name]) is not kind for name, kind in kinds.items()):
            raise ValueError(f"an archive has values of the wrong type: {values!r:.200}")
        return cls(**values)

    def same_file(self, other: ArchiveIdentity) -> bool:
        """Return whether size and time say that it is the same file, untouched."""
        return (self.nbytes, self.modified) == (other.nbytes, other.modified) and self.modified != ""
