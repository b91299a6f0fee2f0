"""Removing shards from a finished store, so that the command that wrote it encodes them again.

The manifest goes first: from then on the store is an unfinished one, and says so. Then, shard by shard, the objects
and last the commit record, so that the shards a kill left half removed are found again by their records. A store that
shards are removed from must not be open anywhere: a reader that comes to one of them stops with its name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from shards.errors import StoreDamagedError
from shards.formats import array_documents, object_path
from shards.integrity.problem import Problem
from shards.metadata.identity import Recipe
from shards.metadata.layout import (
    FIELDS,
    INDEX,
    MANIFEST,
    PLAN,
    commit_path,
    derived_path,
    fields_of,
    plan_path,
)
from shards.metadata.plan import Plan
from shards.metadata.repaired import read_plan, record_repaired, require_planned
from shards.metadata.root import read_recipe
from shards.storage.location import Location, require_own_files
from shards.writing.revisions import newest_revision

_DERIVED = (INDEX, "label/", "valid/", "stats/")


def withdraw_damaged(path: Location, problems: Sequence[Problem]) -> list[tuple[str, int]]:
    """Remove every damaged shard of a store that nobody reads or writes.

    Args:
        path: The store.
        problems: What `verify_store` has found.

    Returns:
        View and number of each shard that has to be made again, sorted.

    Raises:
        StoreDamagedError: Naming what nothing can be made again from; the store is then as it was.
    """
    require_own_files(path)
    revision = newest_revision(path)
    recipe = read_recipe(path, revision)
    plans = {PLAN, plan_path(recipe)} & {problem.path for problem in problems}
    if plans:
        raise _beyond_repair(path, sorted(plans))
    plan = read_plan(path, recipe)
    require_planned(recipe, plan, path=path / plan_path(recipe))
    records = {
        commit_path(view, shard): (view, shard) for view in recipe.views for shard in range(recipe.num_shards)
    }
    documents = set(array_documents(recipe))
    made_anew = tuple(derived_path(name, revision) for name in _DERIVED)
    damaged: set[tuple[str, int]] = set()
    lost: list[str] = []
    for problem in problems:
        if problem.path.startswith(f"{FIELDS}/"):
            lost.append(f"{problem.path} (give the field's own folder)")
        elif problem.view is not None and problem.shard is not None:
            damaged.add((problem.view, problem.shard))
        elif problem.path in records:
            damaged.add(records[problem.path])
        elif problem.path not in (MANIFEST, *documents) and not problem.path.startswith(made_anew):
            lost.append(problem.path)
    if lost:
        raise _beyond_repair(path, lost)
    _remove_manifest(path, plan)
    for name in documents & {problem.path for problem in problems}:
        (path / name).unlink(missing_ok=True)
    _remove_shards(path, recipe, damaged)
    return sorted(damaged)


def _beyond_repair(path: Location, lost: Sequence[str]) -> StoreDamagedError:
    return StoreDamagedError(
        f"{path} cannot be repaired by encoding: {', '.join(lost[:4])}; restore what is named from a copy"
    )


def withdraw_repaired(path: Location, shards: Iterable[tuple[str, int]], sizes: Mapping[str, int]) -> None:
    """Remove shards with bad rows whose images can be decoded now, from a store that nobody reads or writes.

    Args:
        path: The store.
        shards: View and number of each.
        sizes: Size in bytes by key of the images that can be decoded now.
    """
    require_own_files(path)
    recipe = read_recipe(path, newest_revision(path))
    plan = read_plan(path, recipe)
    listed = dict(zip(plan.keys.tolist(), plan.table["nbytes"].to_pylist(), strict=True))
    changed = {key: nbytes for key, nbytes in sizes.items() if nbytes != plan.repaired.get(key, listed[key])}
    _remove_manifest(path, plan.with_repaired({**plan.repaired, **changed}))
    _remove_shards(path, recipe, set(shards))


def _remove_manifest(path: Location, plan: Plan) -> None:
    """Make the store an unfinished one that remembers the sizes of repaired images without any commit record."""
    (path / MANIFEST).unlink(missing_ok=True)
    record_repaired(path, plan)


def _remove_shards(path: Location, recipe: Recipe, shards: set[tuple[str, int]]) -> None:
    for view, shard in sorted(shards):
        for field in fields_of(recipe, view):
            (path / object_path(recipe, field, shard)).unlink(missing_ok=True)
        (path / commit_path(view, shard)).unlink(missing_ok=True)
