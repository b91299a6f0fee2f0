"""Taking what is damaged out of a store, so that the command that wrote it makes it anew.

The manifest goes first: from then on the store is an unfinished one. Then, shard by shard, the objects and last the
commit record, so that whatever is left behind by a kill is found again by `shards.integrity.verify`.
"""

from __future__ import annotations

from collections.abc import Sequence

from shards.errors import StoreDamagedError
from shards.formats.format import object_path
from shards.integrity.problem import Problem
from shards.metadata.layout import FIELDS, INDEX, MANIFEST, commit_path, derived_path, fields_of
from shards.metadata.root import array_documents, read_recipe
from shards.storage.location import Location
from shards.writing.revisions import newest_revision

_DERIVED = (INDEX, "label/", "valid/", "stats/")


def withdraw_damaged(path: Location, problems: Sequence[Problem]) -> list[tuple[str, int]]:
    """Remove every damaged shard of a store that nobody reads or writes.

    Args:
        path: The store.
        problems: What `verify_store` has found.

    Returns:
        View and number of each shard that has to be made anew, sorted.

    Raises:
        StoreDamagedError: Naming what nothing can be made anew from; the store is then as it was.
    """
    revision = newest_revision(path)
    recipe = read_recipe(path, revision)
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
        raise StoreDamagedError(
            f"{path} cannot be mended by encoding: {', '.join(lost[:4])}; restore what is named from a copy"
        )
    (path / MANIFEST).unlink(missing_ok=True)
    for name in documents & {problem.path for problem in problems}:
        (path / name).unlink(missing_ok=True)
    for view, shard in sorted(damaged):
        for field in fields_of(recipe, view):
            (path / object_path(recipe, field, shard)).unlink(missing_ok=True)
        (path / commit_path(view, shard)).unlink(missing_ok=True)
    return sorted(damaged)
