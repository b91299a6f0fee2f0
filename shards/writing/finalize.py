"""Finishing a store: index, labels, statistics and, last of all, the manifest."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shards.errors import StoreDamagedError, StoreIncompleteError
from shards.formats import array_documents, grown_documents
from shards.metadata.arrays import array_objects, group_objects
from shards.metadata.code_table import relative_error
from shards.metadata.commit import CommitRecord, ObjectRecord
from shards.metadata.identity import Recipe
from shards.metadata.index import bad_rows, build_index, index_bytes
from shards.metadata.layout import (
    CODE_TABLE,
    INDEX,
    MANIFEST,
    PLAN,
    REPAIRED,
    ROOT,
    commit_path,
    derived_path,
    fields_of,
    plan_path,
    stage_path,
)
from shards.metadata.manifest import Manifest
from shards.metadata.plan import NO_LABEL, Plan
from shards.metadata.token_statistics import (
    error_objects,
    given_objects,
    read_token_moments,
    statistics_objects,
)
from shards.storage.location import Location, read_object, read_objects, remove_matching, replace_atomically
from shards.storage.parallel import ahead
from shards.values.moments import Moments
from shards.writing.added_fields import finished_fields
from shards.writing.published import object_record, shard_moments

_MOMENTS = re.compile(r"\w+/\d{5,}\.npy")
"""What `shards.metadata.layout.moments_path` gives, below its folder."""

Commits = dict[tuple[str, int], CommitRecord]


def finalize_store(
    root: Location, recipe: Recipe, plan: Plan, provenance: dict[str, str], revision: int = 0
) -> Manifest:
    """Bring a store whose shards are all published to its final state; see `StoreWriter.finalize`."""
    commits = read_commits(root, recipe)
    manifest = Manifest.read(root) if (root / MANIFEST).exists() else None
    if manifest is None or manifest.revision < revision:
        manifest = _write_manifest(root, recipe, plan, commits, provenance, revision, manifest)
    # Whoever opens the store by the manifest needs none of these; other readers of zarr see what they describe.
    for name, content in grown_documents(manifest.recipe).items():
        if _content(root / name) != content:
            replace_atomically(root / name, content)
    # The partial sums have served; whoever needs them again computes them from the shards.
    remove_matching(root / "moments", _MOMENTS)
    return manifest


def read_commits(root: Location, recipe: Recipe) -> Commits:
    """Return every commit record of a store.

    Raises:
        StoreIncompleteError: Naming how many shards have none.
    """
    commits = found_commits(root, recipe)
    expected = len(recipe.views) * recipe.num_shards
    if len(commits) < expected:
        raise StoreIncompleteError(
            f"{root} has {len(commits)} of {expected} shards; run the command that was writing it again to continue"
        )
    return commits


def found_commits(root: Location, recipe: Recipe) -> Commits:
    """Return the commit records that are there: of every shard that is published."""
    names = [commit_path(view, shard) for view in recipe.views for shard in range(recipe.num_shards)]
    contents = read_objects(root, names)
    commits: Commits = {}
    for view in recipe.views:
        for shard in range(recipe.num_shards):
            name = commit_path(view, shard)
            if name not in contents:
                continue
            path = root / name
            record = CommitRecord.from_bytes(contents[name], path=path)
            record.require_fits(recipe, path=path)
            if (record.view, record.shard) != (view, shard):
                raise StoreDamagedError(f"{path} describes shard {record.shard} of view {record.view}")
            commits[view, shard] = record
    return commits


def _write_manifest(
    root: Location,
    recipe: Recipe,
    plan: Plan,
    commits: Commits,
    provenance: dict[str, str],
    revision: int,
    previous: Manifest | None,
) -> Manifest:
    valid = valid_mask(recipe, plan, commits)
    files = {INDEX: index_bytes(build_index(recipe, plan, commits)), **small_objects(recipe, plan, commits)}
    files |= group_objects("stats", {})
    for stage in range(len(recipe.earlier)):
        files |= group_objects(f"stats/stage-{stage}", {})
    for view in recipe.views:
        files |= _carried_statistics(root, view, previous, files["valid/c/0"]) or _statistics(
            root, recipe, view, commits, valid, _statistics_to_continue(root, recipe, view, previous, valid)
        )
    files = {derived_path(path, revision): content for path, content in files.items()}
    for path, content in files.items():
        replace_atomically(root / path, content)
    fixed = {PLAN, plan_path(recipe), ROOT, derived_path(ROOT, revision), *array_documents(recipe)}
    fixed -= set(grown_documents(recipe))
    if recipe.dtype == "int8":
        fixed.add(CODE_TABLE)
    if (root / REPAIRED).exists():
        fixed.add(REPAIRED)
    objects = [ObjectRecord.of(path, content) for path, content in files.items()]
    objects += [o for record in commits.values() for o in record.objects]
    objects += [object_record(root, path) for path in [*fixed, *given_objects(root)]]
    objects += [object_record(root, commit_path(view, shard)) for view, shard in commits]
    manifest = Manifest(
        recipe=recipe,
        num_valid=int(valid.sum()),
        num_bad=plan.num_images - int(valid.sum()),
        provenance=provenance if previous is None else {**previous.provenance, **provenance},
        objects=tuple(sorted(objects, key=lambda o: o.path)),
        revision=revision,
        fields=finished_fields(root),
    )
    replace_atomically(root / MANIFEST, manifest.to_bytes())
    return manifest


def _carried_statistics(
    root: Location, view: str, previous: Manifest | None, valid: bytes
) -> dict[str, bytes] | None:
    """Return ``stats/view`` of the previous revision, if it was computed from the rows that are valid now."""
    if previous is None or view not in previous.recipe.views:
        return None
    if previous.object_bytes(root, previous.derived("valid/c/0")) != valid:
        return None
    objects: dict[str, bytes] = {}
    stats = previous.derived("stats/")
    for path in previous.by_path:
        folders = path.removeprefix(stats).split("/")
        of_view = folders[0] == view or (folders[0].startswith("stage-") and folders[1] == view)
        if path.startswith(stats) and of_view:
            objects[f"stats/{'/'.join(folders)}"] = previous.object_bytes(root, path)
    return objects


@dataclass(frozen=True)
class _Known:
    """What the previous revision knows of a view's tokens, of the shards up to ``num_shards``."""

    moments: Moments
    num_shards: int
    objects: dict[str, bytes]


def _statistics_to_continue(
    root: Location, recipe: Recipe, view: str, previous: Manifest | None, valid: NDArray[np.bool_]
) -> _Known | None:
    """Return the previous revision's statistics, if they are of an earlier stage and of the rows valid there now."""
    if previous is None or len(previous.recipe.earlier) >= len(recipe.earlier):
        return None
    num_rows = previous.recipe.num_rows
    carried = _carried_statistics(root, view, previous, valid[:num_rows].tobytes())
    if carried is None:
        return None
    stage = len(previous.recipe.earlier)
    moments = read_token_moments(carried.__getitem__, view, fields_of(recipe, view)[0].row_shape)
    objects = {
        path if path.startswith("stats/stage-") else stage_path(path, stage): content
        for path, content in carried.items()
    }
    return _Known(moments, previous.recipe.num_shards, objects)


def _statistics(
    root: Location,
    recipe: Recipe,
    view: str,
    commits: Commits,
    valid: NDArray[np.bool_],
    known: _Known | None,
) -> dict[str, bytes]:
    """Return the statistics of a view, and those of its earlier stages."""
    files: dict[str, bytes] = {} if known is None else dict(known.objects)
    merged = Moments.empty(fields_of(recipe, view)[0].row_shape) if known is None else known.moments
    first = 0 if known is None else known.num_shards
    for stage in range(len(recipe.earlier) + 1):
        part = recipe.at_stage(stage)
        if part.num_shards <= first:
            continue
        merged = _merged_moments(root, recipe, view, commits, valid, merged, range(first, part.num_shards))
        own = statistics_objects(view, merged, recipe.encoder.grid)
        if recipe.dtype == "int8":
            own |= error_objects(view, _merged_error(part, view, commits, merged))
        # What is stored is what the next stage goes on from, so that it need not read the shards again.
        merged = Moments(merged.count, merged.mean, merged.variance * merged.count)
        first = part.num_shards
        is_last = stage == len(recipe.earlier)
        files |= own if is_last else {stage_path(path, stage): content for path, content in own.items()}
    return files


def valid_mask(recipe: Recipe, plan: Plan, commits: Commits) -> NDArray[np.bool_]:
    """Return whether each row holds an image in every view, bool[num_rows]."""
    valid = np.zeros(recipe.num_rows, np.bool_)
    valid[plan.rows] = True
    valid[list(bad_rows(recipe, plan, commits))] = False
    return valid


def small_objects(recipe: Recipe, plan: Plan, commits: Commits) -> dict[str, bytes]:
    """Return content by path of the arrays ``label`` and ``valid``."""
    labels = np.full(recipe.num_rows, NO_LABEL, np.int32)
    labels[plan.rows] = plan.labels
    valid = valid_mask(recipe, plan, commits)
    return array_objects("label", labels, NO_LABEL) | array_objects("valid", valid, fill=False)


def _merged_moments(
    root: Location,
    recipe: Recipe,
    view: str,
    commits: Commits,
    valid: NDArray[np.bool_],
    merged: Moments,
    shards: range,
) -> Moments:
    """Return the moments of some rows, and of the valid ones of some shards after them."""
    row_shape = fields_of(recipe, view)[0].row_shape
    records = [commits[view, shard] for shard in shards]
    contents = ahead(lambda record: _content(root / record.moments.path), records)
    for shard, record, content in zip(shards, records, contents, strict=True):
        slots = valid[shard * recipe.capacity : (shard + 1) * recipe.capacity]
        part = None
        if record.num_rows == int(slots.sum()):
            part = _stored_moments(content, record, row_shape)
        # A row that is bad in another view counts in none, and lost sums are computed again.
        merged = merged.merge(part or shard_moments(root, recipe, view, shard, slots))
    return merged


def _merged_error(recipe: Recipe, view: str, commits: Commits, moments: Moments) -> NDArray[np.float64]:
    """Merge the errors of all rows whose error is known, relative to the std of the rows valid in all views."""
    total = np.zeros(recipe.encoder.width)
    num_rows = 0
    for shard in range(recipe.num_shards):
        record = commits[view, shard]
        assert record.square_error is not None, (view, shard)
        if np.isfinite(record.square_error).all():
            total += record.square_error
            num_rows += record.num_rows
    share = moments.count / num_rows if num_rows else np.nan
    return relative_error(total * share, moments)


def _content(path: Location) -> bytes | None:
    try:
        return read_object(path)
    except FileNotFoundError:
        return None


def _stored_moments(
    content: bytes | None, record: CommitRecord, row_shape: tuple[int, ...]
) -> Moments | None:
    if content is None or not record.moments.describes(content):
        return None
    return Moments.from_bytes(content, row_shape)
