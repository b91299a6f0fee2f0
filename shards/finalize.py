"""Finishing a store: index, labels, statistics and, last of all, the manifest."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shards.atomic import replace_atomically
from shards.code_arrays import relative_error
from shards.commit import CommitRecord, ObjectRecord
from shards.errors import StoreDamagedError, StoreIncompleteError
from shards.given_statistics import given_objects
from shards.identity import Recipe
from shards.index import bad_rows, build_index, index_bytes
from shards.layout import CODE_TABLE, INDEX, MANIFEST, PLAN, commit_path, fields_of
from shards.manifest import Manifest
from shards.moments import Moments
from shards.plan import NO_LABEL, Plan
from shards.published import object_record, shard_moments
from shards.root import array_documents
from shards.statistics_arrays import error_objects, statistics_objects
from shards.zarr_store import plain_array_document

Commits = dict[tuple[str, int], CommitRecord]


def finalize_store(root: Path, recipe: Recipe, plan: Plan, provenance: dict[str, str]) -> Manifest:
    """Bring a store whose shards are all published to its final state; see `StoreWriter.finalize`."""
    commits = read_commits(root, recipe)
    if (root / MANIFEST).exists():
        manifest = Manifest.read(root)
    else:
        manifest = _write_manifest(root, recipe, plan, commits, provenance)
    # The partial sums have served; whoever needs them again computes them from the shards.
    shutil.rmtree(root / "moments", ignore_errors=True)
    return manifest


def read_commits(root: Path, recipe: Recipe) -> Commits:
    """Every commit record of a store.

    Raises:
        StoreIncompleteError: Naming how many shards have none.
    """
    commits: Commits = {}
    for view in recipe.views:
        for shard in range(recipe.num_shards):
            path = root / commit_path(view, shard)
            try:
                record = CommitRecord.from_bytes(path.read_bytes(), path=path)
            except FileNotFoundError:
                continue
            if (record.view, record.shard) != (view, shard):
                raise StoreDamagedError(f"{path} describes shard {record.shard} of view {record.view}")
            commits[view, shard] = record
    expected = len(recipe.views) * recipe.num_shards
    if len(commits) < expected:
        raise StoreIncompleteError(
            f"{root} has {len(commits)} of {expected} shards; run `pipeline encode` again to continue"
        )
    return commits


def _write_manifest(
    root: Path, recipe: Recipe, plan: Plan, commits: Commits, provenance: dict[str, str]
) -> Manifest:
    valid = valid_mask(recipe, plan, commits)
    files = {INDEX: index_bytes(build_index(recipe, plan, commits)), **small_objects(recipe, plan, commits)}
    moments = {view: _merged_moments(root, recipe, view, commits, valid) for view in recipe.views}
    files |= statistics_objects(moments, recipe.encoder.grid)
    fixed = [PLAN, *array_documents(recipe)]
    if recipe.dtype == "int8":
        fixed.append(CODE_TABLE)
        for view in recipe.views:
            files |= error_objects(view, _merged_error(recipe, view, commits, moments[view]))
    for path, content in files.items():
        replace_atomically(root / path, content)
    objects = [_record_of(path, content) for path, content in files.items()]
    objects += [o for record in commits.values() for o in record.objects]
    objects += [object_record(root, path) for path in [*fixed, *given_objects(root)]]
    objects += [object_record(root, commit_path(view, shard)) for view, shard in commits]
    manifest = Manifest(
        recipe=recipe,
        num_valid=int(valid.sum()),
        num_bad=plan.num_images - int(valid.sum()),
        provenance=provenance,
        objects=tuple(sorted(objects, key=lambda o: o.path)),
    )
    replace_atomically(root / MANIFEST, manifest.to_bytes())
    return manifest


def valid_mask(recipe: Recipe, plan: Plan, commits: Commits) -> NDArray[np.bool_]:
    """Whether each row holds an image in every view, bool[num_rows]."""
    valid = np.zeros(recipe.num_rows, np.bool_)
    valid[plan.rows] = True
    valid[list(bad_rows(recipe, plan, commits))] = False
    return valid


def small_objects(recipe: Recipe, plan: Plan, commits: Commits) -> dict[str, bytes]:
    """Content by path of the arrays ``label`` and ``valid``."""
    labels = np.full(recipe.num_rows, NO_LABEL, np.int32)
    labels[plan.rows] = plan.labels
    valid = valid_mask(recipe, plan, commits)
    return {
        "label/zarr.json": plain_array_document(labels.shape, labels.dtype, NO_LABEL),
        "label/c/0": labels.astype("<i4").tobytes(),
        "valid/zarr.json": plain_array_document(valid.shape, valid.dtype, fill=False),
        "valid/c/0": valid.tobytes(),
    }


def _record_of(path: str, content: bytes) -> ObjectRecord:
    return ObjectRecord(path, len(content), hashlib.sha256(content).hexdigest())


def _merged_moments(
    root: Path, recipe: Recipe, view: str, commits: Commits, valid: NDArray[np.bool_]
) -> Moments:
    field = fields_of(recipe, view)[0]
    merged = Moments.empty(field.row_shape)
    for shard in range(recipe.num_shards):
        record = commits[view, shard]
        places = valid[shard * recipe.capacity : (shard + 1) * recipe.capacity]
        part = None
        if record.num_rows == int(places.sum()):
            part = _stored_moments(root, record, field.row_shape)
        # A row that is bad in another view counts in none, and lost sums are computed again.
        merged = merged.merge(part or shard_moments(root, recipe, view, shard, places))
    return merged


def _merged_error(recipe: Recipe, view: str, commits: Commits, moments: Moments) -> NDArray[np.float64]:
    """Of every row whose error is known, relative to the deviation of the rows that are valid in all views."""
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


def _stored_moments(root: Path, record: CommitRecord, row_shape: tuple[int, ...]) -> Moments | None:
    try:
        content = (root / record.moments.path).read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.sha256(content).hexdigest() != record.moments.sha256:
        return None
    return Moments.from_bytes(content, row_shape)
