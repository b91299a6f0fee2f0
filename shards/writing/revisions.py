"""Adding to a finished store without disturbing whoever has it open.

Shards, commit records and rows never move; what is added are views, or, in further shards, images. The small objects
that follow from them – index, labels, statistics – are made again for each revision, in a folder of its own, and the
manifest, replaced last, says which revision holds. A revision is begun by its ``zarr.json``, which names the recipe it
is made with, and finished by the manifest.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import PurePosixPath

from shards.errors import IdentityMismatchError, StoreIncompleteError
from shards.formats import array_documents, grown_documents, object_path
from shards.metadata.identity import Recipe
from shards.metadata.layout import (
    FIELDS,
    INDEX,
    REVISIONS,
    ROOT,
    WORK_DIR,
    commit_path,
    derived_path,
    fields_of,
    moments_path,
    plan_path,
)
from shards.metadata.manifest import Manifest
from shards.metadata.plan import Plan
from shards.metadata.root import read_recipe, root_document
from shards.storage.atomic import is_temporary
from shards.storage.location import (
    Location,
    lists_objects,
    object_names,
    publish_bytes,
    require_own_files,
)

_DERIVED = (INDEX, "label", "valid", "stats")
_OWN = re.compile(
    rf"({REVISIONS}/\d+/)?(zarr\.json|index\.parquet|(label|valid|stats)/([\w-]+/)*(zarr\.json|c(/\d+)+))"
)
"""Names of the objects that each revision makes again."""
_EXTENDED_PLAN = re.compile(r"plan-[0-9a-f]{32}\.parquet")
"""Name of the plan of an extended store; the manifest lists that of the published revision."""
_OF_VIEW = re.compile(
    r"(?:commits|moments)/(\w+)/\d{5,}\.(?:json|npy)"
    r"|(\w+)/(?:\d{5,}\.tar|zarr\.json|(?:tokens|image|cls)/(?:zarr\.json|c(?:/\d+)+))"
)
"""Names of the objects of a view, with the view."""


def newest_revision(path: Location) -> int:
    """Return the highest revision of a store that has been begun; 0 if it was never added to."""
    if not lists_objects(path):
        return Manifest.read(
            path
        ).revision  # where nothing is listed, finished stores are read and nothing else
    folders = (document.parent.name for document in (path / REVISIONS).glob(f"*/{ROOT}"))
    return max((int(name) for name in folders if name.isdecimal()), default=0)


def current_revision(path: Location) -> int:
    """Return the revision a store shows to its readers, or will show once it is finished."""
    try:
        return Manifest.read(path).revision
    except StoreIncompleteError:
        return newest_revision(path)


def begin_revision(path: Location, recipe: Recipe) -> int:
    """Begin the revision after the published one, or join the work on it.

    Args:
        path: A store.
        recipe: What its next revision is made with: the present one with more views, or with more images, whose plan
            `publish_extended` has published.

    Returns:
        The revision's number; the published one's if that has this recipe already. A store that is not finished has
        nobody to disturb, and keeps the number it has.

    Raises:
        IdentityMismatchError: If the next revision was begun with another recipe.
    """
    require_own_files(path)
    try:
        published = Manifest.read(path)
    except StoreIncompleteError:
        revision = newest_revision(path)
    else:
        if published.recipe.id == recipe.id:
            return published.revision  # another worker has finished it since the caller looked at the store
        revision = published.revision + 1
    publish_bytes(path / derived_path(ROOT, revision), root_document(recipe))
    begun = read_recipe(path, revision)
    if begun.id != recipe.id:
        differences = "; ".join(begun.diff(recipe))
        raise IdentityMismatchError(
            f"{path} is being added to in another way: {differences}; finish that first, or give it up with "
            "`pipeline clean --give-up`"
        )
    for name, content in array_documents(recipe).items():
        publish_bytes(path / name, content)
    return revision


def publish_extended(path: Location, recipe: Recipe, plan: Plan) -> Plan:
    """Publish the plan that a store is extended by; of several equal ones the first stays, and is returned.

    Args:
        path: The store.
        recipe: The recipe of the extended store.
        plan: Its plan.
    """
    publish_bytes(path / plan_path(recipe), plan.to_bytes())
    return Plan.read(path / plan_path(recipe))


def superseded(path: Location, manifest: Manifest) -> list[str]:
    """Return the names of small objects of earlier revisions, sorted: nobody who opens the store now reads them."""
    folders = tuple(derived_path("", revision) for revision in range(1, manifest.revision))
    tops = _DERIVED if manifest.revision else ()
    under_way = plan_path(read_recipe(path, newest_revision(path)))
    return [
        name
        for name in object_names(path)
        if name not in manifest.by_path
        and name != under_way
        and (
            _EXTENDED_PLAN.fullmatch(name)
            or ((name.startswith(folders) or name.partition("/")[0] in tops) and _OWN.fullmatch(name))
        )
    ]


def belongs_to_another(name: str, manifest: Manifest, newest: Recipe) -> bool:
    """Return whether a file that is no object of a finished store belongs to a field or to another revision.

    Args:
        name: Its path in the store.
        manifest: The published manifest.
        newest: Recipe of the newest revision that has been begun.
    """
    top, *inside = name.split("/")
    if top == REVISIONS:
        return not inside or inside[0] != str(manifest.revision)
    if top in (FIELDS, WORK_DIR) or (manifest.revision and top in _DERIVED) or _EXTENDED_PLAN.fullmatch(name):
        return True
    if name in _shards_added(newest, manifest.recipe) or name in grown_documents(manifest.recipe):
        return True
    view = inside[0] if top in ("commits", "moments") and inside else top
    return view in newest.views and view not in manifest.recipe.views


@lru_cache(maxsize=2)
def _shards_added(newest: Recipe, published: Recipe) -> frozenset[str]:
    """Return the names of what the shards consist of that an extension adds, in the views there were before."""
    shards = range(published.num_shards, newest.num_shards)
    views = [view for view in newest.views if view in published.views]
    return frozenset(
        name
        for view in views
        for shard in shards
        for name in (
            commit_path(view, shard),
            moments_path(view, shard),
            *(object_path(newest, field, shard) for field in fields_of(newest, view)),
        )
    )


def give_up_unfinished(path: Location) -> int:
    """Remove what there is of a revision that was begun after the published one; nobody may be at work on it.

    Returns:
        How many files that were. The revision's own document goes last, so that this may be interrupted too.
    """
    require_own_files(path)
    manifest = Manifest.read(path)
    revision = newest_revision(path)
    if revision == manifest.revision:
        return 0
    newest = read_recipe(path, revision)
    added = set(newest.views) - set(manifest.recipe.views)
    further = _shards_added(newest, manifest.recipe)
    document = derived_path(ROOT, revision)
    unfinished = [
        name
        for name in object_names(path)
        if (name.startswith(derived_path("", revision)) and _OWN.fullmatch(name))
        or name in further
        or (_EXTENDED_PLAN.fullmatch(name) and name not in manifest.by_path)
        or ((found := _OF_VIEW.fullmatch(name)) and added & set(found.groups()))
        or (is_temporary(PurePosixPath(name)) and added & set(name.split("/")[:2]))
    ]
    for name in sorted(unfinished, key=lambda name: name == document):
        (path / name).unlink(missing_ok=True)
    return len(unfinished)
