"""The manifest: every object of a finished store with its size and digest, and the manifest's own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from shards.commit import ObjectRecord
from shards.errors import StoreDamagedError, StoreIncompleteError
from shards.identity import Recipe, canonical_json
from shards.layout import FORMAT_VERSION, MANIFEST


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished store consists of.

    Attributes:
        recipe: What the store was made by.
        num_valid: Images with a row in every view and field.
        num_bad: Images without, each with its reason in the index; both together are all images.
        provenance: Versions and hosts that made it; recorded, never compared.
        objects: Every object but the manifest, sorted by path.
    """

    recipe: Recipe
    num_valid: int
    num_bad: int
    provenance: dict[str, str]
    objects: tuple[ObjectRecord, ...]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything the manifest says."""
        return hashlib.sha256(canonical_json(self._content())).hexdigest()

    @cached_property
    def by_path(self) -> dict[str, ObjectRecord]:
        """The objects by path."""
        return {o.path: o for o in self.objects}

    def _content(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "recipe": self.recipe.to_dict(),
            "recipe_id": self.recipe.id,
            "encoder_id": self.recipe.encoder.id,
            "num_images": self.recipe.num_images,
            "num_valid": self.num_valid,
            "num_bad": self.num_bad,
            "provenance": self.provenance,
            "objects": [dataclasses.asdict(o) for o in self.objects],
        }

    def to_bytes(self) -> bytes:
        """The file's only valid spelling."""
        content = {**self._content(), "digest": self.digest}
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes, *, path: object) -> Self:
        """Read a manifest; a single byte that differs from what was written is refused.

        Raises:
            StoreDamagedError: Naming ``path``.
        """
        try:
            values = json.loads(content)
            manifest = cls(
                recipe=Recipe.from_dict(values["recipe"]),
                num_valid=values["num_valid"],
                num_bad=values["num_bad"],
                provenance=values["provenance"],
                objects=tuple(ObjectRecord.from_dict(o) for o in values["objects"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreDamagedError(f"{path} is not a readable manifest ({error!r})") from error
        if values.get("format_version") != FORMAT_VERSION:
            found = values.get("format_version")
            raise StoreDamagedError(f"{path} has format version {found}; this program reads {FORMAT_VERSION}")
        if manifest.to_bytes() != content:
            raise StoreDamagedError(f"{path} does not match its own digest: it was edited or damaged")
        if manifest.num_valid + manifest.num_bad != manifest.recipe.num_images:
            raise StoreDamagedError(f"{path}: valid and bad images do not add up to all images")
        return manifest

    @classmethod
    def read(cls, store: Path) -> Self:
        """Read the manifest of a store.

        Raises:
            StoreIncompleteError: If there is none yet.
            StoreDamagedError: If it is not the one that was written.
        """
        path = store / MANIFEST
        try:
            return cls.from_bytes(path.read_bytes(), path=path)
        except FileNotFoundError as error:
            raise StoreIncompleteError(
                f"{store} is not finished: it has no {MANIFEST}; run `pipeline encode` again to continue"
            ) from error


def missing_objects(store: Path, objects: Iterable[ObjectRecord]) -> list[str]:
    """What of the objects is not there, or not as long as it must be: one line each."""
    lines = []
    for record in objects:
        try:
            size = (store / record.path).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            lines.append(f"{record.path} is missing")
            continue
        if size != record.nbytes:
            lines.append(f"{record.path} has {size} bytes instead of {record.nbytes}")
    return lines
