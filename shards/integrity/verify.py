"""Reading a whole store again and comparing every byte with what was written.

The manifest covers itself and every object by a digest. Where a digest differs, the index's row checksums tell
which rows are damaged; where every digest agrees, the objects are compared with each other, so that a manifest
made again over edited files does not pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np

from shards.errors import StoreError, UserError
from shards.formats import array_documents, grown_documents, object_path
from shards.integrity.commit_check import commit_problems, difference, found_object
from shards.integrity.damage import locate_damage
from shards.integrity.problem import Problem, require_reachable
from shards.metadata.arrays import describe_the_same
from shards.metadata.commit import ObjectRecord
from shards.metadata.identity import Recipe
from shards.metadata.index import Index, build_index
from shards.metadata.layout import (
    FIELDS,
    INDEX,
    MANIFEST,
    PLAN,
    ROOT,
    Field,
    derived_path,
    fields_of,
    plan_path,
)
from shards.metadata.manifest import Manifest
from shards.metadata.plan import Plan
from shards.metadata.repaired import read_plan
from shards.metadata.root import read_recipe, root_documents
from shards.storage.atomic import is_temporary
from shards.storage.location import (
    Location,
    as_location,
    foreign_entries,
    lists_objects,
    object_names,
    read_object,
    storage_of,
)
from shards.writing.finalize import read_commits, small_objects
from shards.writing.revisions import belongs_to_another, newest_revision

_REMOTE_THREADS = 16

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and the bytes in all."""


def verify_store(
    path: str | Location, *, threads: int = 2, progress: Progress | None = None, follow_links: bool = False
) -> list[Problem]:
    """Find everything in which a store differs from what was written.

    Of one that is not finished, or whose manifest is damaged, each published shard is compared with its commit record.

    Args:
        path: The store.
        threads: Objects read at once.
        progress: Told how far it is.
        follow_links: Read what is behind links; otherwise each is a problem, and nothing else is looked at.

    Returns:
        One entry a problem, sorted by object and row; empty if every byte is right.

    Raises:
        UsageError: If there is no store at ``path``.
    """
    path = as_location(path)
    if not follow_links and (foreign := list(foreign_entries(path))):
        read_recipe(path)
        return [Problem(name, f"is {what}; it is not read") for name, what in sorted(foreign)]
    try:
        manifest = Manifest.read(path)
    except StoreError as error:
        require_reachable(error)
        if not lists_objects(path):
            return [Problem(MANIFEST, f"{error}; nothing else could be compared")]
        recipe = read_recipe(path, newest_revision(path))
        return [Problem(MANIFEST, str(error)), *commit_problems(path, recipe, threads)]
    damaged = _compare_digests(path, manifest, threads, progress)
    problems = [*_strangers(path, manifest)]
    problems += _explain(path, manifest, damaged)
    if not damaged:
        problems += _contradictions(path, manifest)
    for name in manifest.fields:
        problems += _field_problems(path, name, threads, follow_links=follow_links)
    return sorted(problems, key=lambda p: (p.path, -1 if p.row is None else p.row, p.message))


def _compare_digests(
    path: Location, manifest: Manifest, threads: int, progress: Progress | None
) -> dict[str, ObjectRecord | str]:
    """Describe, by path, each object that differs from the manifest."""
    total = sum(o.nbytes for o in manifest.objects)
    seen = 0
    damaged: dict[str, ObjectRecord | str] = {}
    # Objects of a server arrive faster side by side than one core can hash.
    threads = max(threads, _REMOTE_THREADS) if storage_of(path).is_remote else threads
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        found = pool.map(lambda o: found_object(path, o), manifest.objects)
        for expected, actual in zip(manifest.objects, found, strict=True):
            if actual != expected:
                damaged[expected.path] = actual
            seen += expected.nbytes
            if progress is not None:
                progress(seen, total)
    return damaged


def _strangers(path: Location, manifest: Manifest) -> Iterator[Problem]:
    newest = manifest.recipe
    if (revision := newest_revision(path)) > manifest.revision:
        try:
            newest = read_recipe(path, revision)
        except UserError as error:
            require_reachable(error)
            yield Problem(derived_path(ROOT, revision), str(error))
    # A web server does not say what else it has.
    for name in object_names(path) if lists_objects(path) else ():
        if is_temporary(PurePosixPath(name)) or name == MANIFEST or name in manifest.by_path:
            continue
        if not belongs_to_another(name, manifest, newest):
            yield Problem(name, "is not an object of this store")


def _field_problems(path: Location, name: str, threads: int, *, follow_links: bool) -> Iterator[Problem]:
    """Find what is wrong with an added field, by its path in the store."""
    inside = f"{FIELDS}/{name}"
    try:
        found = verify_store(path / inside, threads=threads, follow_links=follow_links)
    except UserError as error:
        require_reachable(error)
        yield Problem(inside, str(error))
        return
    for problem in found:
        yield replace(problem, path=f"{inside}/{problem.path}")


def _same(name: str, found: bytes, expected: bytes) -> bool:
    """Return whether an object is the expected one; another zarr-python version may spell documents otherwise."""
    return found == expected or (name.endswith(ROOT) and describe_the_same(found, expected))


@dataclass(frozen=True)
class _ShardObject:
    view: str
    shard: int
    fields: tuple[Field, ...]


def _explain(path: Location, manifest: Manifest, damaged: dict[str, ObjectRecord | str]) -> Iterator[Problem]:
    """Say of each damaged object what is wrong with it, and with which rows."""
    recipe = manifest.recipe
    shards: dict[str, _ShardObject] = {}
    for view in recipe.views:
        for shard in range(recipe.num_shards):
            for field in fields_of(recipe, view):
                name = object_path(recipe, field, shard)
                others = shards[name].fields if name in shards else ()
                shards[name] = _ShardObject(view, shard, (*others, field))
    by_digest = {o.digest: o.path for o in manifest.objects}
    plan, index = _intact_tables(path, manifest, damaged)
    for name, actual in damaged.items():
        place = shards.get(name)
        where = (None, None) if place is None else (place.view, place.shard)
        if isinstance(actual, str):
            yield Problem(name, actual, *where)
            continue
        expected = manifest.by_path[name]
        other = by_digest.get(actual.digest)
        if other is not None:
            yield Problem(name, f"holds the bytes of {other}", *where)
        elif actual.nbytes != expected.nbytes or place is None or plan is None or index is None:
            yield Problem(name, str(difference(expected, actual)), *where)
        else:
            yield from locate_damage(path, recipe, plan, index, place.fields, place.shard, name)


def _intact_tables(
    path: Location, manifest: Manifest, damaged: dict[str, ObjectRecord | str]
) -> tuple[Plan | None, Index | None]:
    index = manifest.derived(INDEX)
    recipe = manifest.recipe
    if plan_path(recipe) in damaged or index in damaged:
        return None, None
    try:
        plan = Plan.read(path / plan_path(recipe))
        content = read_object(path / index)
        return plan, Index(content, recipe.planned_rows, recipe.num_rows, path=path / index)
    except StoreError as error:
        require_reachable(error)
        return None, None


def _contradictions(path: Location, manifest: Manifest) -> Iterator[Problem]:
    """Yield ways in which objects that are each as the manifest says contradict one another."""
    index_path = path / manifest.derived(INDEX)
    try:
        begun, recipe = read_recipe(path), read_recipe(path, manifest.revision)
        first, plan = Plan.read(path / PLAN), read_plan(path, recipe)
        commits = read_commits(path, recipe)
        index = Index(read_object(index_path), recipe.planned_rows, recipe.num_rows, path=index_path)
        table = index.table()
    except UserError as error:
        require_reachable(error)
        yield Problem(ROOT, str(error))
        return
    if recipe.id != manifest.recipe.id or not recipe.extends(begun):
        differences = "; ".join(recipe.diff(manifest.recipe) or recipe.diff(begun))
        yield Problem(ROOT, f"is not the manifest's recipe: {differences}")
        return
    if problems := list(_plan_problems(begun, recipe, first, plan)):
        yield from problems
        return
    if not table.equals(build_index(recipe, plan, commits)):
        yield Problem(manifest.derived(INDEX), "does not follow from the plan and the commit records")
    expected = root_documents(begun, recipe, manifest.revision) | array_documents(recipe)
    for name in grown_documents(recipe):
        del expected[name]
    for name, content in small_objects(recipe, plan, commits).items():
        expected[manifest.derived(name)] = content
    for name, content in expected.items():
        if name not in manifest.by_path or not _same(name, read_object(path / name), content):
            yield Problem(name, "does not follow from the recipe, the plan and the commit records")
    yield from _grown_document_problems(path, recipe)
    for place, record in commits.items():
        for listed in (o for o in record.objects if manifest.by_path.get(o.path) != o):
            yield Problem(listed.path, "is not the object its commit record describes", *place)
    num_valid = int(np.count_nonzero(table["valid"].to_numpy()))
    if manifest.num_valid != num_valid:
        yield Problem(MANIFEST, f"counts {manifest.num_valid} valid images, the index {num_valid}")


def _plan_problems(begun: Recipe, recipe: Recipe, first: Plan, plan: Plan) -> Iterator[Problem]:
    """Yield ways in which the plans that a store was begun with and has now contradict its recipes."""
    if any(getattr(recipe, name) != value for name, value in plan.recipe_values().items()):
        yield Problem(plan_path(recipe), "is not the plan of the recipe")
        return
    stages = [plan.at_stage(stage) for stage in range(len(plan.earlier))]
    if any(
        stage.source_digest() != was.source_digest for stage, was in zip(stages, plan.earlier, strict=True)
    ):
        yield Problem(plan_path(recipe), "does not begin with the images there were before it was extended")
    if plan.at_stage(len(begun.earlier)) != first:
        yield Problem(PLAN, "is not the plan that the store was begun with")


def _grown_document_problems(path: Location, recipe: Recipe) -> Iterator[Problem]:
    for name, content in grown_documents(recipe).items():
        found = read_object(path / name) if (path / name).exists() else b""
        if not _same(name, found, content):
            message = "does not describe all rows to other readers of zarr; run `pipeline extend` again"
            yield Problem(name, message)
