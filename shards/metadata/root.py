"""The store's ``zarr.json`` files: those that say what a store is."""

from __future__ import annotations

from typing import Any

from shards.documents import read_document
from shards.errors import StoreDamagedError, UsageError
from shards.metadata.arrays import group_objects
from shards.metadata.identity import Recipe
from shards.metadata.layout import PLAN, ROOT, derived_path
from shards.metadata.versions import format_version, require_format_version
from shards.storage.location import Location, as_location, read_object


def root_document(recipe: Recipe) -> bytes:
    """Return the content of the ``zarr.json`` of a store or revision; the same recipe gives the same bytes."""
    return group_objects("", {"format_version": format_version(recipe), "recipe": recipe.to_dict()})[ROOT]


def root_documents(begun: Recipe, recipe: Recipe, revision: int) -> dict[str, bytes]:
    """Return content by path of the ``zarr.json`` files that name the recipes of a store.

    Args:
        begun: What the store was begun with.
        recipe: What its revision is made with.
        revision: Number of that revision.
    """
    return {ROOT: root_document(begun), derived_path(ROOT, revision): root_document(recipe)}


def is_store(path: str | Location) -> bool:
    """Return whether a folder or URL is a store, finished or not: it has the two objects that begin a store."""
    root = as_location(path)
    return all((root / name).is_file() for name in (PLAN, ROOT))


def read_recipe(path: Location, revision: int = 0) -> Recipe:
    """Return the recipe a store was begun with, or one of its revisions; finished or not.

    Raises:
        UsageError: If there is no store at ``path``.
        StoreDamagedError: If its root is not readable or of another version.
    """
    name = derived_path(ROOT, revision)
    try:
        content = read_object(path / name)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"{path} is not a store: it has no {name}; make one with `pipeline encode`"
        ) from error
    document = read_document(content, dict[str, Any], name=path / name, error=StoreDamagedError)
    attributes = document.get("attributes")
    if not isinstance(attributes, dict) or "format_version" not in attributes or "recipe" not in attributes:
        raise UsageError(f"{path} is a zarr group but not a store: its attributes name no recipe")
    require_format_version(path, attributes["format_version"])
    try:
        recipe = Recipe.from_dict(attributes["recipe"])
    except StoreDamagedError as error:
        raise StoreDamagedError(f"{path / name}: {error}") from error
    require_format_version(path, attributes["format_version"], recipe)
    return recipe
