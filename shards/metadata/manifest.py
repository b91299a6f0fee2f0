"""The manifest: every object of a finished store with its size and digest, and the manifest's own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from shards.errors import StoreDamagedError, StoreIncompleteError, UsageError
from shards.metadata.commit import ObjectRecord
from shards.metadata.identity import Recipe, canonical_json
from shards.metadata.layout import MANIFEST, checked_path, derived_path
from shards.metadata.versions import format_version, require_format_version
from shards.storage.location import Location, object_sizes, read_object


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished store consists of.

    Attributes:
        recipe: What the store was made by.
        num_valid: Images with a row in every view and field.
        num_bad: Images without, each with its reason in the index; both together are all images.
        provenance: Versions and hosts that made it; recorded, never compared.
        objects: Every object but the manifest, sorted by path.
        revision: How often the small objects that follow from the shards have been made anew since the store was
            first finished.
        fields: Identity of the encoder of each field that was added, by name; see `shards.writing.added_fields`.
    """

    recipe: Recipe
    num_valid: int
    num_bad: int
    provenance: dict[str, str]
    objects: tuple[ObjectRecord, ...]
    revision: int = 0
    fields: dict[str, str] = dataclasses.field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything the manifest says."""
        return hashlib.sha256(canonical_json(self._content())).hexdigest()

    @cached_property
    def by_path(self) -> dict[str, ObjectRecord]:
        """The objects by path."""
        return {o.path: o for o in self.objects}

    def derived(self, name: str) -> str:
        """Path of one of this revision's small objects; see `shards.metadata.layout.derived_path`."""
        return derived_path(name, self.revision)

    def object_bytes(self, store: Location, path: str) -> bytes:
        """Content of one of the store's small objects, compared with its digest.

        Raises:
            StoreDamagedError: If it is missing or not the one that was written.
        """
        try:
            content = read_object(store / path)
            record = self.by_path[path]
        except (FileNotFoundError, KeyError) as error:
            raise StoreDamagedError(f"{store / path} is missing; run `pipeline verify`") from error
        if not record.describes(content):
            raise StoreDamagedError(f"{store / path} is not the file that was written; run `pipeline verify`")
        return content

    def _content(self) -> dict[str, Any]:
        content = {
            "format_version": format_version(self.recipe),
            "recipe": self.recipe.to_dict(),
            "recipe_id": self.recipe.id,
            "encoder_id": self.recipe.encoder.id,
            "num_images": self.recipe.num_images,
            "num_valid": self.num_valid,
            "num_bad": self.num_bad,
            "provenance": self.provenance,
            "objects": [o.to_dict() for o in self.objects],
        }
        # A store that was never added to has the manifest it had before there were revisions and fields.
        added = {"revision": self.revision, "fields": self.fields}
        return content | {name: value for name, value in added.items() if value}

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
                revision=operator.index(values.get("revision", 0)),
                fields={checked_path(name): str(id_) for name, id_ in values.get("fields", {}).items()},
            )
        except (ValueError, KeyError, TypeError, AttributeError, UsageError) as error:
            raise StoreDamagedError(f"{path} is not a readable manifest ({error!r})") from error
        require_format_version(path, values.get("format_version"), manifest.recipe)
        if manifest.to_bytes() != content:
            raise StoreDamagedError(f"{path} does not match its own digest: it was edited or damaged")
        if manifest.revision < 0:
            raise StoreDamagedError(f"{path} has a negative revision, {manifest.revision}")
        if manifest.num_valid + manifest.num_bad != manifest.recipe.num_images:
            raise StoreDamagedError(f"{path}: valid and bad images do not add up to all images")
        return manifest

    @classmethod
    def read(cls, store: Location) -> Self:
        """Read the manifest of a store.

        Raises:
            StoreIncompleteError: If there is none yet.
            StoreDamagedError: If it is not the one that was written.
        """
        path = store / MANIFEST
        try:
            return cls.from_bytes(read_object(path), path=path)
        except FileNotFoundError as error:
            raise StoreIncompleteError(
                f"{store} is not finished: it has no {MANIFEST}; run the command that was writing it again to continue"
            ) from error


def missing_objects(store: Location, objects: Iterable[ObjectRecord]) -> list[str]:
    """What of the objects is not there, or not as long as it must be: one line each."""
    objects = list(objects)
    sizes = object_sizes(store, [record.path for record in objects])
    lines = []
    for record in objects:
        if record.path not in sizes:
            lines.append(f"{record.path} is missing")
        elif sizes[record.path] != record.nbytes:
            lines.append(f"{record.path} has {sizes[record.path]} bytes instead of {record.nbytes}")
    return lines
