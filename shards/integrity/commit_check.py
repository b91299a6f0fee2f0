"""What of a store can be checked without its manifest: each published shard against its commit record."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from shards.errors import StoreError, UserError
from shards.formats import object_path
from shards.integrity.problem import Problem, require_reachable
from shards.metadata.commit import CommitRecord, ObjectRecord
from shards.metadata.identity import Recipe
from shards.metadata.layout import commit_path, fields_of, plan_path
from shards.metadata.plan import Plan
from shards.storage.location import Location, read_object
from shards.writing.published import describe_shard, object_record


def found_object(path: Location, expected: ObjectRecord) -> ObjectRecord | str:
    """Return an object of a store as it is there, by the same algorithm, or what is wrong with it as a whole."""
    try:
        return object_record(path, expected.path, expected.algorithm)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except (OSError, StoreError) as error:
        require_reachable(error)
        return f"cannot be read: {error}"


def difference(expected: ObjectRecord, actual: ObjectRecord | str) -> str | None:
    """Describe how an object differs from what was written; None if it does not."""
    if isinstance(actual, str) or actual == expected:
        return actual if isinstance(actual, str) else None
    if actual.nbytes != expected.nbytes:
        return f"has {actual.nbytes} bytes instead of {expected.nbytes}"
    return "is not the file that was written"


def commit_problems(path: Location, recipe: Recipe, threads: int) -> list[Problem]:
    """Find what is wrong with the shards of a store without a manifest, or with a damaged one.

    Shards without a record are looked at too where their objects are there: whoever encodes them takes those.

    Args:
        path: The store.
        recipe: Of its newest revision.
        threads: Shards read at once.
    """
    try:
        plan = Plan.read(path / plan_path(recipe))
    except (UserError, OSError) as error:
        require_reachable(error)
        return [Problem(plan_path(recipe), str(error))]
    if (plan.num_images, plan.num_shards) != (recipe.num_images, recipe.num_shards):
        return [Problem(plan_path(recipe), "is not the plan of the recipe")]
    shards = [(view, shard) for view in recipe.views for shard in range(recipe.num_shards)]
    with ThreadPoolExecutor(threads, thread_name_prefix="verify") as pool:
        found = pool.map(lambda slot: list(_shard_problems(path, recipe, plan, *slot)), shards)
        return [problem for problems in found for problem in problems]


def _shard_problems(path: Location, recipe: Recipe, plan: Plan, view: str, shard: int) -> Iterator[Problem]:
    name = commit_path(view, shard)
    try:
        record = CommitRecord.from_bytes(read_object(path / name), path=path / name)
        record.require_fits(recipe, path=path / name)
    except FileNotFoundError:
        yield from _unrecorded_problems(path, recipe, plan, view, shard)
        return
    except (UserError, OSError) as error:
        require_reachable(error)
        yield Problem(name, str(error), view, shard)
        return
    for expected in record.objects:
        message = difference(expected, found_object(path, expected))
        if message is not None:
            yield Problem(expected.path, message, view, shard)


def _unrecorded_problems(
    path: Location, recipe: Recipe, plan: Plan, view: str, shard: int
) -> Iterator[Problem]:
    names = dict.fromkeys(object_path(recipe, field, shard) for field in fields_of(recipe, view))
    if not all((path / name).is_file() for name in names):
        return
    try:
        describe_shard(path, recipe, plan, view, shard, reasons={}, square_error=None)
    except (UserError, OSError, ValueError) as error:
        require_reachable(error)
        yield Problem(next(iter(names)), f"has no commit record and cannot be read: {error}", view, shard)
