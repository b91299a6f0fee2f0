"""Fields added to a store: the same rows through another encoder, each a whole store of its own in ``fields/NAME``.

A field has its own recipe, shards, statistics and manifest, so that whatever takes a store takes it. The store it was
added to lists it in its manifest by name and encoder, not by bytes: a field may get revisions of its own.
"""

from __future__ import annotations

import dataclasses

from shards.formats import format_of
from shards.metadata.identity import MIRRORED_VIEWS, Recipe
from shards.metadata.layout import FIELDS, MANIFEST, PLAN, WORK_DIR, field_of
from shards.metadata.manifest import Manifest
from shards.reading.store import Store, open_store
from shards.storage.atomic import temporary_path
from shards.storage.location import Location, local_path, replace_atomically, require_plain, storage_of


def field_path(store: Location, name: str) -> Location:
    """Return the folder of a field of a store."""
    return store / FIELDS / name


def open_field(store: Store, name: str) -> Store:
    """Open a finished field of a store.

    Raises:
        UsageError: If it is behind a link, and the store was opened without following those.
    """
    path = field_path(store.path, name)
    require_plain(store.path, [f"{FIELDS}/{name}/{MANIFEST}"], follow_links=store.follow_links)
    return open_store(path, follow_links=store.follow_links)


def publish_fields(store: Location) -> Manifest:
    """Bring a finished store's list of its finished fields up to date; one process at a time may do it."""
    manifest = Manifest.read(store)
    found = dataclasses.replace(manifest, fields=finished_fields(store))
    if found != manifest:
        replace_atomically(store / MANIFEST, found.to_bytes())
    return found


def finished_fields(store: Location) -> dict[str, str]:
    """Return the identity of the encoder of each field that is finished, by name."""
    if not (store / FIELDS).is_dir():
        return {}
    folders = {folder.name: folder for folder in (store / FIELDS).iterdir()}
    return {
        name: Manifest.read(folders[name]).recipe.encoder.id
        for name in sorted(folders)
        if (folders[name] / MANIFEST).exists()
    }


def can_link_images(store: Store) -> bool:
    """Return whether `link_images` will do, tried on a small file."""
    folder = local_path(store.path)
    if format_of(store.recipe).shares_objects or folder is None:
        return False
    probe = temporary_path(folder / MANIFEST)
    linked = storage_of(folder).link(folder / MANIFEST, probe)
    probe.unlink(missing_ok=True)
    return linked


def link_images(store: Store, field: Location) -> str | None:
    """Give a field that has been begun the store's images, as further names of the same files.

    Whoever writes a shard of the field finds its images published, and takes them as they are.

    Args:
        store: Its images are those the field will have.
        field: The field, begun with the store's plan.

    Returns:
        Why they have to be stored a second time; None if they need not be.
    """
    reason = why_not_linked(store.path, store.recipe, field)
    views = [view for view in store.views if view not in MIRRORED_VIEWS]
    for shard in range(store.recipe.num_shards) if reason is None else ():
        for view in views:
            link_image(store.path, store.recipe, field, view, shard)
    return reason


def why_not_linked(store: Location, recipe: Recipe, field: Location) -> str | None:
    """Return why a field that has been begun cannot have the store's images as further names; None if it can."""
    if format_of(recipe).shares_objects:
        return f"{recipe.format} objects hold them beside tokens"
    if not storage_of(field).link(store / PLAN, field / WORK_DIR / "linked"):
        return "files cannot be linked there"
    return None


def link_image(store: Location, recipe: Recipe, field: Location, view: str, shard: int) -> None:
    """Give a field the images of one published shard of the store; see `link_images`."""
    name = format_of(recipe).object_path(field_of(recipe, view, "image"), shard)
    if not storage_of(field).link(store / name, field / name):
        raise OSError(f"{field / name} cannot be linked to {store / name}, where other files could")
