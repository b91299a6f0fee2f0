"""`pipeline encode --retry-quarantined`: rows that had no usable image get one, once their images are mended.

Each shard concerned is written anew in a corner of the store, good rows copied and mended ones encoded, and then put
in place of the old one: first its commit record is withdrawn, then the objects are replaced, then the new record is
published. A kill in between leaves a shard without a record, which the next run describes from its published bytes.
The small objects are made anew in a revision of their own. Replaced shards are other files, though: unlike all that
only adds to a store, this is not for a store that somebody has open.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.console import say
from pipeline.encode.tokens import StoredTokens, TokenStorage
from pipeline.encoders.encoder import Encoder
from pipeline.sources.pictures import Images, Pictures
from shards import (
    BadImageError,
    CommitRecord,
    ShardWriter,
    SourceReader,
    SourceRecord,
    StoreWriter,
    UndecodableImageError,
    mended_images,
    object_path,
    published_rows,
)
from shards.metadata.layout import MANIFEST, WORK_DIR, commit_path, fields_of
from shards.storage.location import move, remove_tree
from shards.writing.finalize import Commits, read_commits
from shards.writing.revisions import begin_revision

_STAGING = f"{WORK_DIR}/retry"


def retry_quarantined(writer: StoreWriter, encoder: Encoder) -> None:
    """Encodes the images of bad rows that can be decoded now; the store's newest revision then has to be finished.

    Args:
        writer: A store with all its shards.
        encoder: On its device; the one the store was made with.

    Raises:
        StoreIncompleteError: If shards are still to come.
    """
    _describe_interrupted(writer)
    remove_tree(writer.path / _STAGING)
    commits = read_commits(writer.path, writer.recipe)
    pictures = Pictures(writer.recipe)
    sizes = mended_images(writer.plan, commits)
    images = {}
    for row, record, nbytes, shown in _mended_images(writer, commits, pictures):
        images[row] = shown
        if nbytes != sizes.get(record.key, record.nbytes):
            sizes[record.key] = nbytes
    if images:
        begin_revision(writer.path, writer.recipe)
    for (view, shard), commit in commits.items():
        first = shard * writer.recipe.capacity
        mended = {place: images[first + place] for place in commit.bad if first + place in images}
        if mended:
            rows = _encoded(writer, encoder, pictures, view, mended)
            _replace_shard(writer, commit, pictures, mended, rows, sizes)
    say(f"{len(images)} images have been mended")


def _describe_interrupted(writer: StoreWriter) -> None:
    """Gives a record to each shard whose replacement was cut short: whatever objects are there, stand."""
    for view, shard in writer.pending():
        names = [object_path(writer.recipe, field, shard) for field in fields_of(writer.recipe, view)]
        if all((writer.path / name).exists() for name in names):
            staged = writer.path / _STAGING / commit_path(view, shard)
            with writer.shard(view, shard) as again:
                if staged.exists():
                    record = CommitRecord.from_bytes(staged.read_bytes(), path=staged)
                    again.note_mended(mended_images(writer.plan, {(view, shard): record}))
                for place in range(writer.plan.shard_size(shard)):
                    again.quarantine(place, "not mended before the run was stopped")
                again.publish()


def _mended_images(
    writer: StoreWriter, commits: Commits, pictures: Pictures
) -> Iterator[tuple[int, SourceRecord, int, Images]]:
    """Of each bad row whose image can be decoded now: row, image, its bytes now, pictures uint8 [V, P, P, 3]."""
    reader = SourceReader()
    for shard in sorted({shard for (_, shard), record in commits.items() if record.bad}):
        records = writer.plan.records_of(shard)
        places = {place for (_, own), record in commits.items() if own == shard for place in record.bad}
        for place in sorted(places):
            try:
                content = reader.read(records[place], any_size=True)
                images = np.empty((len(pictures.names), pictures.size, pictures.size, 3), np.uint8)
                pictures.draw(content, records[place].key, writer.recipe.views, images)
            except (BadImageError, UndecodableImageError):
                continue
            yield shard * writer.recipe.capacity + place, records[place], len(content), images
    reader.close()


def _encoded(
    writer: StoreWriter, encoder: Encoder, pictures: Pictures, view: str, mended: Mapping[int, Images]
) -> dict[int, StoredTokens]:
    """Tokens by place of the mended rows of a view, one row each."""
    storage = TokenStorage(writer.recipe.dtype, writer.code)
    rows = {}
    device = encoder.get_buffer("mean").device
    for place, images in mended.items():
        tokens = encoder.encode(pictures.shown(torch.from_numpy(images)[:, None].to(device), view))
        stored = storage(tokens)
        rows[place] = storage.empty((1, *tokens.shape[1:]), pin_memory=False)
        rows[place].copy_(stored)
    return rows


def _replace_shard(
    writer: StoreWriter,
    record: CommitRecord,
    pictures: Pictures,
    images: Mapping[int, Images],
    mended: Mapping[int, StoredTokens],
    sizes: Mapping[str, int],
) -> None:
    root, recipe = writer.path, writer.recipe
    staging = root / _STAGING
    attempts = record.attempts + 1
    with ShardWriter(staging, recipe, writer.plan, record.view, record.shard, attempts, writer.code) as shard:
        shard.note_mended(sizes)
        if record.square_error is not None and record.num_rows:
            shard.add_square_error(record.square_error)
        for place, row in _old_rows(writer, record):
            if row is not None:
                shard.write(place, row)
            elif place in mended:
                fields = {"tokens": mended[place].as_numpy()[0]}
                if "image" in recipe.fields(record.view):
                    fields["image"] = pictures.stored(images[place], record.view)
                shard.write(place, fields)
                square_error = mended[place].square_error
                if square_error is not None:
                    shard.add_square_error(square_error[0].numpy())
            else:
                shard.quarantine(place, record.bad[place])
        replacement = shard.publish()
    # Without a manifest nobody takes the store for finished while shards are replaced.
    (root / MANIFEST).unlink(missing_ok=True)
    own_record = commit_path(record.view, record.shard)
    (root / own_record).unlink()
    for name in [*(o.path for o in replacement.objects), replacement.moments.path]:
        move(root, f"{_STAGING}/{name}", name)
    move(root, f"{_STAGING}/{own_record}", own_record)


def _old_rows(
    writer: StoreWriter, record: CommitRecord
) -> Iterator[tuple[int, dict[str, NDArray[Any]] | None]]:
    """Every place of a published shard that holds an image, with its fields, or None where it is bad."""
    fields = fields_of(writer.recipe, record.view)
    streams = [published_rows(writer.path, writer.recipe, field, record.shard) for field in fields]
    for _, found in zip(
        range(writer.plan.shard_size(record.shard)), zip(*streams, strict=True), strict=False
    ):
        place = found[0][0]
        rows = {field.name: row for field, (_, row) in zip(fields, found, strict=True) if row is not None}
        yield place, rows if len(rows) == len(fields) else None
