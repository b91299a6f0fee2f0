"""The manifest: every object of a finished store with its size and digest, and the manifest's own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from shards.documents import read_document
from shards.errors import StoreDamagedError, StoreIncompleteError
from shards.metadata.commit import ObjectRecord
from shards.metadata.identity import Recipe, canonical_json
from shards.metadata.layout import MANIFEST, checked_field, derived_path
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
        revision: How often the small objects that follow from the shards have been made again since the store was
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
        """Return the path of one of this revision's small objects; see `shards.metadata.layout.derived_path`."""
        return derived_path(name, self.revision)

    def object_bytes(self, store: Location, path: str) -> bytes:
        """Return the content of one of the store's small objects, compared with its digest.

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
        """Return the file's only valid spelling."""
        content = {**self._content(), "digest": self.digest}
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, content: bytes, *, path: object) -> Self:
        """Read a manifest; a single byte that differs from what was written is refused.

        Raises:
            StoreDamagedError: Naming ``path``.
        """
        found = read_document(content, _Document, name=path, error=StoreDamagedError)
        try:
            manifest = cls(
                recipe=Recipe.from_dict(found.recipe),
                num_valid=found.num_valid,
                num_bad=found.num_bad,
                provenance=found.provenance,
                objects=tuple(ObjectRecord.from_dict(o) for o in found.objects),
                revision=found.revision,
                fields={checked_field(name): encoder_id for name, encoder_id in found.fields.items()},
            )
        except StoreDamagedError as error:
            raise StoreDamagedError(f"{path} is not a readable manifest ({error})") from error
        require_format_version(path, found.format_version, manifest.recipe)
        if manifest.to_bytes() != content:
            raise StoreDamagedError(f"{path} does not match its own digest: it was edited or damaged")
        if manifest.revision < 0:
            raise StoreDamagedError(f"{path} has a negative revision, {manifest.revision}")
        if manifest.num_valid + manifest.num_bad != manifest.recipe.num_images:
            raise StoreDamagedError(f"{path}: valid and bad images do not add up to all images")
        manifest._require_possible(path)
        return manifest

    def _require_possible(self, path: object) -> None:
        """Refuse counts that contradict the objects, before memory is allocated for them."""
        recipe = self.recipe
        if len(recipe.views) * recipe.num_shards > len(self.objects):
            raise StoreDamagedError(
                f"{path} names {len(self.objects)} objects, too few for {recipe.num_shards} shards of "
                f"{len(recipe.views)} views"
            )
        valid = self.by_path.get(self.derived("valid/c/0"))
        if valid is None or valid.nbytes != recipe.num_rows:
            raise StoreDamagedError(
                f"{path} names {'no mask' if valid is None else f'a mask of {valid.nbytes} rows'} where the recipe "
                f"has {recipe.num_rows} rows"
            )

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


@dataclass(frozen=True, kw_only=True)
class _Document:
    """The JSON file; what is not read here follows from the rest."""

    format_version: int
    recipe: dict[str, Any]
    num_valid: int
    num_bad: int
    provenance: dict[str, str]
    objects: list[dict[str, Any]]
    revision: int = 0
    fields: dict[str, str] = dataclasses.field(default_factory=dict)


def missing_objects(store: Location, objects: Iterable[ObjectRecord]) -> list[str]:
    """List the objects that are missing or have another length, one line each."""
    objects = list(objects)
    sizes = object_sizes(store, [record.path for record in objects])
    lines = []
    for record in objects:
        if record.path not in sizes:
            lines.append(f"{record.path} is missing")
        elif sizes[record.path] != record.nbytes:
            lines.append(f"{record.path} has {sizes[record.path]} bytes instead of {record.nbytes}")
    return lines
