"""Writing a store: begun by anybody, shard by shard by many, finished by anybody.

Nothing here locks. Each object appears under its final name by a link that only the first can make, each step
may be repeated by anybody at any time, and a worker that dies leaves temporary names and nothing else.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property
from pathlib import PurePosixPath
from typing import Self

import numpy as np

from shards.errors import (
    IdentityMismatchError,
    StoreDamagedError,
    StoreError,
    StoreIncompleteError,
    UsageError,
)
from shards.formats import array_documents, grown_documents
from shards.metadata.arrays import describe_the_same
from shards.metadata.code_table import code_objects, published_code
from shards.metadata.identity import Recipe
from shards.metadata.layout import FIELDS, MANIFEST, PLAN, ROOT, commit_path, plan_path
from shards.metadata.manifest import Manifest
from shards.metadata.plan import Plan
from shards.metadata.repaired import read_plan, record_repaired, require_planned
from shards.metadata.root import read_recipe, root_document
from shards.storage.atomic import is_temporary
from shards.storage.location import (
    Location,
    object_names,
    publish_bytes,
    read_object,
    require_own_files,
    storage_of,
)
from shards.values.moments import TokenSums
from shards.values.quantize import Int8Code
from shards.writing.finalize import finalize_store
from shards.writing.revisions import current_revision, newest_revision, publish_extended
from shards.writing.shard_writer import Linked, ShardWriter


class StoreWriter:
    """A store that is being written.

    Attributes:
        path: The store's folder.
        recipe: What is written into it.
        plan: Which image goes where.
        revision: Which of its revisions that makes; see `shards.writing.revisions`.
    """

    def __init__(self, path: Location, recipe: Recipe, plan: Plan, revision: int = 0) -> None:
        self.path = path
        self.recipe = recipe
        self.plan = plan
        self.revision = revision

    @cached_property
    def code(self) -> Int8Code | None:
        """What the store's int8 numbers encode; None for other storage types."""
        return published_code(self.path, self.recipe)

    @classmethod
    def open(cls, path: Location) -> Self:
        """Return the newest revision of a store that has been begun, whoever began it.

        Raises:
            UsageError: If there is no store at ``path``, or a link in it.
        """
        read_recipe(path)
        require_own_files(path)
        revision = newest_revision(path)
        recipe = read_recipe(path, revision)
        plan = read_plan(path, recipe)
        require_planned(recipe, plan, path=path / plan_path(recipe))
        return cls(path, recipe, plan, revision)

    @classmethod
    def create_or_continue(
        cls, path: Location, recipe: Recipe, plan: Plan, code: Int8Code | None = None
    ) -> Self:
        """Begin a store, or join the work on one that was begun with the same recipe and plan.

        Of a store that has been added to since, the writer is that of the revision its readers see.

        Args:
            path: The store's folder.
            recipe: What is written into it.
            plan: Which image goes where.
            code: For int8 tokens. Of several begun at once the first is kept, for all of them.

        Raises:
            IdentityMismatchError: If another recipe or plan was begun there, with the differences.
            UsageError: If the folder holds something else, or a link, or the plan is not the recipe's.
        """
        _require_fitting(recipe, plan, code)
        if _holds_other_things(path):
            raise UsageError(f"a store is written into a new or empty folder, and {path} holds other things")
        require_own_files(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
            _publish_plan(path, recipe, plan)
            if code is not None:
                recipe = _with_published_code(path, recipe, code)
            publish_bytes(path / ROOT, root_document(recipe))
            begun = read_recipe(path)
            revision = current_revision(path)
            present = read_recipe(path, revision)
            if recipe.id not in (begun.id, present.id):
                differences = "; ".join(begun.diff(recipe))
                raise IdentityMismatchError(
                    f"{path} was begun with another recipe: {differences}; name a new folder"
                )
            finished = (path / MANIFEST).exists()
            for name, content in array_documents(present).items():
                if not publish_bytes(path / name, content) and not finished:
                    _require_same_document(path, name, content, present)
            plan = read_plan(path, present) if finished else record_repaired(path, plan)
        except OSError as error:
            raise StoreError(
                f"{path} cannot be written: {error}; free space or name another folder"
            ) from error
        return cls(path, present, plan, revision)

    def pending(self) -> list[tuple[str, int]]:
        """Return the view and number of every shard without a commit record, in order of shard."""
        done = set(object_names(self.path, "commits"))
        return [
            (view, shard)
            for shard in range(self.recipe.num_shards)
            for view in self.recipe.views
            if commit_path(view, shard) not in done
        ]

    def finished(self) -> bool:
        """Return whether readers see this revision, or a later one."""
        try:
            return Manifest.read(self.path).revision >= self.revision
        except StoreIncompleteError:
            return False

    def shard(
        self,
        view: str,
        shard: int,
        *,
        attempts: int = 1,
        linked: Linked | None = None,
        sums: TokenSums | None = None,
    ) -> ShardWriter:
        """Begin a shard of a view; use as a context manager.

        Args:
            view: One of the recipe's views.
            shard: Number of the shard.
            attempts: How often this shard has been begun, for the record.
            linked: For a field that has another store's images as links: puts the shard's links there and gives that
                store's record of the shard. It is called by `publish`; images are not written.
            sums: What adds the tokens up; default: `shards.values.moments.RowSums`, whose bits any other must have.
        """
        if view not in self.recipe.views or not 0 <= shard < self.recipe.num_shards:
            raise ValueError(f"the recipe has no shard {shard} of view {view!r}")
        return ShardWriter(self.path, self.recipe, self.plan, view, shard, attempts, self.code, linked, sums)

    def finalize(self, provenance: dict[str, str] | None = None) -> Manifest:
        """Write index, statistics and, last, the manifest; any process may do it, also twice.

        Args:
            provenance: Versions of libraries, hosts and the like; recorded, never compared.

        Raises:
            StoreIncompleteError: If shards are still pending.
        """
        return finalize_store(self.path, self.recipe, self.plan, provenance or {}, self.revision)


def _holds_other_things(path: Location) -> bool:
    """Return whether there is anything in a folder, temporary files apart, and no store."""
    if (path / PLAN).exists():
        return False
    found = any(not is_temporary(PurePosixPath(name)) for name in storage_of(path).entries(path))
    # A store's plan comes first: what another worker has begun meanwhile has one by now.
    return found and not (path / PLAN).exists()


def stale_temporaries(path: Location) -> list[str]:
    """Return the store's temporary files, sorted: those of dead workers and of running ones, without its fields'."""
    names = (name for name in object_names(path) if name.partition("/")[0] != FIELDS)
    return [name for name in names if is_temporary(PurePosixPath(name))]


def _require_fitting(recipe: Recipe, plan: Plan, code: Int8Code | None) -> None:
    if (recipe.dtype == "int8") != (code is not None):
        raise UsageError(
            f"int8 tokens, and they alone, are written with a code; the recipe asks for {recipe.dtype}"
        )
    if code is not None and code.width != recipe.encoder.width:
        raise UsageError(f"the code has {code.width} channels, the encoder {recipe.encoder.width}")
    given = plan.recipe_values()
    asked = {name: getattr(recipe, name) for name in given}
    if asked != given:
        raise UsageError(f"the recipe asks for {asked}, the plan has {given}")


def _with_published_code(path: Location, recipe: Recipe, code: Int8Code) -> Recipe:
    for name, content in code_objects(code).items():
        publish_bytes(path / name, content)
    kept = published_code(path, dataclasses.replace(recipe, code=None))
    assert kept is not None
    return dataclasses.replace(recipe, code=kept.digest)


def _require_same_document(path: Location, name: str, content: bytes, recipe: Recipe) -> None:
    """Refuse to continue a store with a document of another array than its recipe's: no manifest covers it yet."""
    if name in grown_documents(recipe) or not name.endswith(ROOT):
        return
    if not describe_the_same(read_object(path / name), content):
        raise StoreDamagedError(
            f"{path / name} does not describe the array of the store's recipe; remove it and run the same command again"
        )


def _publish_plan(path: Location, recipe: Recipe, plan: Plan) -> None:
    if not (path / PLAN).exists():
        storage_of(path).require_first_creation_wins(path)
        publish_bytes(path / PLAN, plan.to_bytes())
    begun = publish_extended(path, recipe, plan) if recipe.earlier else Plan.read(path / PLAN)
    if begun != plan and _same_deal(begun, plan):
        raise IdentityMismatchError(f"{path} was begun with the same source images {_moved(begun, plan)}")
    if begun != plan:
        raise IdentityMismatchError(
            f"{path} was begun with other source images or another seed; name a new folder"
        )


def _moved(begun: Plan, plan: Plan) -> str:
    """Return where the images were when a store was begun, where they are now, and what can be done."""
    moved = np.flatnonzero(begun.uris != plan.uris)
    if len(moved):
        first = moved[0]
        return (
            f"at other places, such as {begun.uris[first]} and not {plan.uris[first]}; give the source by "
            "the path it was "
            "begun with, or name a new folder"
        )
    first = np.flatnonzero(begun.offsets != plan.offsets)[0]
    return (
        f"at other places inside {plan.uris[first]}, which was packed again since ({begun.keys[first]} began "
        "at "
        f"{begun.offsets[first]}, now at {plan.offsets[first]}); bring the old file back, or name a new "
        "folder"
    )


def _same_deal(one: Plan, other: Plan) -> bool:
    """Return whether two plans differ in nothing but where the images are."""
    settings = ("num_shards", "seed", "class_names", "earlier")
    same = all(getattr(one, name) == getattr(other, name) for name in settings)
    columns = ["key", "label", "nbytes"]
    return same and bool(one.table.select(columns).equals(other.table.select(columns)))
