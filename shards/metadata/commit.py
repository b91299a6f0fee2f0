"""The record that a shard of a view is finished: what was published, byte for byte."""

from __future__ import annotations

import base64
import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from shards.documents import read_document
from shards.errors import StoreDamagedError
from shards.metadata.identity import Recipe
from shards.metadata.layout import checked_path, fields_of
from shards.storage.digests import ALGORITHMS, SHA256, digest_of_bytes

COMMIT_VERSION = 1


@dataclass(frozen=True)
class ObjectRecord:
    """One object of a store.

    Attributes:
        path: Name inside the store.
        nbytes: Length.
        digest: In hexadecimal digits.
        algorithm: What it was computed by, one of `shards.storage.digests.ALGORITHMS`.
    """

    path: str
    nbytes: int
    digest: str
    algorithm: str = SHA256

    @classmethod
    def of(cls, path: str, content: bytes) -> Self:
        """Return the record of a small object."""
        return cls(path, len(content), digest_of_bytes(content))

    def describes(self, content: bytes) -> bool:
        """Return whether an object's content is the one recorded."""
        return digest_of_bytes(content, self.algorithm) == self.digest

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain JSON values; the algorithm's name is the digest's key."""
        return {"path": self.path, "nbytes": self.nbytes, self.algorithm: self.digest}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Read back one entry of a record or manifest.

        Raises:
            StoreDamagedError: If it is not one, or its path leaves the store.
        """
        known = [name for name in ALGORITHMS if isinstance(values, dict) and name in values]
        if len(known) != 1 or set(values) != {"path", "nbytes", *known}:
            names = " or ".join(ALGORITHMS)
            raise StoreDamagedError(f"an object's entry must have path, nbytes and {names}, found {values!r}")
        (algorithm,) = known
        if type(values["nbytes"]) is not int or values["nbytes"] < 0 or type(values[algorithm]) is not str:
            raise StoreDamagedError(f"an object's entry holds values of the wrong type: {values!r}")
        return cls(checked_path(values["path"]), values["nbytes"], values[algorithm], algorithm)


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """What one worker published for one shard of one view.

    Attributes:
        view: Way the images were shown to the encoder.
        shard: Number of the shard.
        num_rows: Rows present in every field.
        objects: The shard's objects in the store, in order of field.
        moments: Its partial sums, which are removed once the store is finished.
        bad: Reason by slot, for each image of the shard that is not present.
        crc32c: By field, CRC32C of each row's uncompressed bytes by slot, uint32[capacity]; 0 where absent.
        offsets: By field, first byte of each row in its object, int64[capacity], -1 where absent; only for
            forms whose objects have no index of their own.
        square_error: Of an int8 store, the sum over rows and tokens of the squared error of each channel,
            float64[D], NaN where a shard was described from its bytes alone; otherwise None.
        seconds: Time from opening the shard to publishing it.
        attempts: How often the shard had been begun.
        repaired: Size in bytes by slot, of each image file that was repaired after the plan was made; only in records
            that earlier versions wrote, as ``mended``. See `shards.metadata.repaired`.
    """

    view: str
    shard: int
    num_rows: int
    objects: tuple[ObjectRecord, ...]
    moments: ObjectRecord
    bad: dict[int, str]
    crc32c: dict[str, NDArray[np.uint32]]
    offsets: dict[str, NDArray[np.int64]]
    square_error: NDArray[np.float64] | None
    seconds: float
    attempts: int
    repaired: dict[int, int] = dataclasses.field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Convert to the JSON file that is published."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["objects"] = [o.to_dict() for o in self.objects]
        values["moments"] = self.moments.to_dict()
        values["bad"] = {str(slot): reason for slot, reason in sorted(self.bad.items())}
        values["crc32c"] = {name: _pack(a, "<u4") for name, a in self.crc32c.items()}
        values["offsets"] = {name: _pack(a, "<i8") for name, a in self.offsets.items()}
        if self.square_error is not None:
            values["square_error"] = _pack(self.square_error, "<f8")
        if repaired := values.pop("repaired"):
            values["mended"] = {str(slot): nbytes for slot, nbytes in sorted(repaired.items())}
        return json.dumps({"version": COMMIT_VERSION, **values}, indent=1, ensure_ascii=False).encode()

    @classmethod
    def from_bytes(cls, content: bytes, *, path: object) -> Self:
        """Read a published record.

        Raises:
            StoreDamagedError: Naming ``path``, if it is not a record of this version.
        """
        version = read_document(
            content, _Versioned, name=path, error=StoreDamagedError, remedy=_REMEDY
        ).version
        if version != COMMIT_VERSION:
            raise StoreDamagedError(f"{path} has version {version}; this program reads {COMMIT_VERSION}")
        found = read_document(content, _Document, name=path, error=StoreDamagedError, remedy=_REMEDY)
        try:
            return cls(
                view=found.view,
                shard=found.shard,
                num_rows=found.num_rows,
                objects=tuple(ObjectRecord.from_dict(o) for o in found.objects),
                moments=ObjectRecord.from_dict(found.moments),
                bad={int(slot): reason for slot, reason in found.bad.items()},
                crc32c={name: _unpack(a, "<u4") for name, a in found.crc32c.items()},
                offsets={name: _unpack(a, "<i8") for name, a in found.offsets.items()},
                square_error=None if found.square_error is None else _unpack(found.square_error, "<f8"),
                seconds=found.seconds,
                attempts=found.attempts,
                repaired={int(slot): nbytes for slot, nbytes in found.mended.items()},
            )
        except (ValueError, StoreDamagedError) as error:
            raise StoreDamagedError(f"{path} is not a readable commit record ({error}); {_REMEDY}") from error

    def require_fits(self, recipe: Recipe, *, path: object) -> None:
        """Refuse a record whose numbers are not those of a shard of a store.

        Raises:
            StoreDamagedError: Naming ``path`` and what is wrong.
        """
        capacity = recipe.capacity
        if self.view not in recipe.views or not 0 <= self.shard < recipe.num_shards:
            raise _unfitting(path, f"the store has no shard {self.shard} of view {self.view!r}")
        if not 0 <= self.num_rows <= capacity:
            raise _unfitting(path, f"num_rows is {self.num_rows}, a shard has {capacity}")
        slots = [*self.bad, *self.repaired]
        if slots and not 0 <= min(slots) <= max(slots) < capacity:
            raise _unfitting(path, f"it names slots beyond the {capacity} of a shard")
        fields = {field.name for field in fields_of(recipe, self.view)}
        if self.crc32c.keys() != fields or not self.offsets.keys() <= fields:
            raise _unfitting(
                path, f"fields are {sorted(fields)}, it has {sorted(self.crc32c | self.offsets)}"
            )
        lengths = {*map(len, self.crc32c.values()), *map(len, self.offsets.values())}
        if lengths != {capacity}:
            raise _unfitting(path, f"crc32c and offsets must have {capacity} numbers each")
        if self.square_error is not None and len(self.square_error) != recipe.encoder.width:
            raise _unfitting(path, f"square_error must have {recipe.encoder.width} numbers")
        if (self.square_error is None) != (recipe.dtype != "int8"):
            raise _unfitting(path, f"square_error is for int8 tokens alone, these are {recipe.dtype}")


_REMEDY = "restore it, or, if the store is not finished, remove it and run the command that was writing the store again"


@dataclass(frozen=True, kw_only=True)
class _Versioned:
    """What every version of the JSON file holds."""

    version: int


@dataclass(frozen=True, kw_only=True)
class _Document:
    """The JSON file of a record."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}

    version: int
    view: str
    shard: int
    num_rows: int
    objects: list[dict[str, Any]]
    moments: dict[str, Any]
    bad: dict[str, str]
    crc32c: dict[str, str]
    offsets: dict[str, str]
    square_error: str | None
    seconds: float
    attempts: int
    mended: dict[str, int] = dataclasses.field(default_factory=dict)


def _unfitting(path: object, what: str) -> StoreDamagedError:
    return StoreDamagedError(f"{path} is not a record of this store: {what}; {_REMEDY}")


def _pack(values: NDArray[Any], dtype: str) -> str:
    return base64.b64encode(values.astype(dtype).tobytes()).decode()


def _unpack(text: str, dtype: str) -> NDArray[Any]:
    return np.frombuffer(base64.b64decode(text, validate=True), dtype)
