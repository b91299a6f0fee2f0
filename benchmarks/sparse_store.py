"""A store of any size that takes almost no disk: its rows are holes in its files, which read as zeros.

For measuring what opening costs; its objects' digests are not those of its bytes, so that it cannot be verified.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from measuring import benchmark_plan, benchmark_recipe

from shards import CommitRecord, Manifest, publish_bytes, replace_atomically
from shards.formats import array_documents, object_path
from shards.metadata.arrays import group_objects
from shards.metadata.commit import ObjectRecord
from shards.metadata.index import build_index, index_bytes
from shards.metadata.layout import INDEX, MANIFEST, PLAN, commit_path, field_of
from shards.metadata.root import root_documents
from shards.metadata.token_statistics import statistics_objects
from shards.storage.checksum import crc32c
from shards.values.moments import Moments
from shards.writing.finalize import small_objects
from shards.writing.published import object_record


def make_sparse_store(path: Path, *, num_images: int, num_shards: int) -> Path:
    """Make the store once; one view, float16 rows [256, 768]."""
    if (path / MANIFEST).exists():
        return path
    plan = benchmark_plan(num_images, num_shards)
    recipe = benchmark_recipe(plan)
    field = field_of(recipe, "center", "tokens")
    zero_row = crc32c(bytes(field.row_nbytes))
    objects: list[ObjectRecord] = []
    commits: dict[tuple[str, int], CommitRecord] = {}
    for name, content in (root_documents(recipe, recipe, 0) | array_documents(recipe)).items():
        publish_bytes(path / name, content)
        objects.append(object_record(path, name))
    (path / PLAN).write_bytes(plan.to_bytes())
    objects.append(object_record(path, PLAN))
    for shard in range(num_shards):
        size = plan.shard_size(shard)
        nbytes = _write_holes(
            path / object_path(recipe, field, shard), size, recipe.capacity, field.row_nbytes
        )
        shard_object = ObjectRecord(object_path(recipe, field, shard), nbytes, "0" * 64)
        checksums = np.zeros(recipe.capacity, np.uint32)
        checksums[:size] = zero_row
        commits["center", shard] = CommitRecord(
            view="center",
            shard=shard,
            num_rows=size,
            objects=(shard_object,),
            moments=ObjectRecord(f"moments/center/{shard}", 0, "0" * 64),
            bad={},
            crc32c={"tokens": checksums},
            offsets={},
            square_error=None,
            seconds=0.0,
            attempts=1,
        )
        content = commits["center", shard].to_bytes()
        record_path = commit_path("center", shard)
        (path / record_path).parent.mkdir(parents=True, exist_ok=True)
        (path / record_path).write_bytes(content)
        digest = hashlib.sha256(content).hexdigest()
        objects += [shard_object, ObjectRecord(record_path, len(content), digest)]
    files = {INDEX: index_bytes(build_index(recipe, plan, commits)), **small_objects(recipe, plan, commits)}
    files |= statistics_objects("center", Moments.empty(field.row_shape), recipe.encoder.grid)
    files |= group_objects("stats", {})
    for name, content in files.items():
        replace_atomically(path / name, content)
        objects.append(object_record(path, name))
    manifest = Manifest(
        recipe=recipe,
        num_valid=num_images,
        num_bad=0,
        provenance={},
        objects=tuple(sorted(objects, key=lambda o: o.path)),
    )
    replace_atomically(path / MANIFEST, manifest.to_bytes())
    return path


def _write_holes(path: Path, size: int, capacity: int, row_nbytes: int) -> int:
    """Write a shard file without rows, with its index at the end; return its length."""
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = np.full((capacity, 2), 2**64 - 1, "<u8")
    entries[:size, 0] = np.arange(size) * row_nbytes
    entries[:size, 1] = row_nbytes
    index = entries.tobytes()
    with path.open("wb") as file:
        file.seek(size * row_nbytes)
        file.write(index + crc32c(index).to_bytes(4, "little"))
        return file.tell()
