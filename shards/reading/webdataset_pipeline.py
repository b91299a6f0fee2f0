"""A store of tars as a ready pipeline of the webdataset library, for trainers that are built on it.

It reads tars from front to back, which suits object storage, and mixes rows within a buffer. `shards.Loader` reads the
same store in an exact order instead, with the same batches for any number of ranks.
"""

from __future__ import annotations

import math
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shards.documents import read_document
from shards.errors import StoreDamagedError, UsageError
from shards.formats import object_path
from shards.metadata.layout import field_of
from shards.reading.store import Store, open_store
from shards.storage.checksum import crc32c
from shards.storage.location import Location


def webdataset_pipeline(
    path: str | Location,
    *,
    view: str = "center",
    fields: Sequence[str] = ("tokens",),
    shuffle: int = 1000,
    seed: int = 0,
    decode: bool = True,
) -> Any:
    """Return a ``webdataset.DataPipeline`` over one view of a store in webdataset format.

    It yields a dictionary a valid row: ``__key__`` (the row in nine digits), ``row``, ``key`` (the image's name in its
    source), ``label`` (int, -1 for none), and each field as an array. Shards are split by rank and by worker of a
    ``DataLoader``; ranks may so get different numbers of rows, for which webdataset has ``with_epoch``. Each row is
    compared with its checksum. Give it to ``webdataset.WebLoader`` or ``torch.utils.data.DataLoader``.

    Args:
        path: The store's folder or URL.
        view: One of its views.
        fields: ``tokens``, and ``image`` uint8 [P, P, 3] where the view stores it.
        shuffle: Rows in the buffer that mixes them; the order of the shards is shuffled too. 0 reads as stored.
        seed: Names the order; each iteration of the pipeline has another.
        decode: Give tokens as the numbers they encode, float32 [N, D]; False gives them as they are stored.

    Raises:
        UsageError: If the store has another format, no such view or no such field.
    """
    import webdataset as wds

    store = open_store(path)
    recipe = store.recipe
    if recipe.format != "webdataset":
        raise UsageError(
            f"{store.path} is in {recipe.format} format and webdataset reads tars; make some with "
            f"`pipeline convert {store.path} --out NEW --format webdataset`, or use shards.Loader"
        )
    if view not in store.views:
        raise UsageError(f"{store.path} has the views {', '.join(store.views)}, not {view!r}")
    for name in fields:
        if name not in recipe.fields(view):
            raise UsageError(
                f"{store.path} stores {', '.join(recipe.fields(view))} for view {view!r}, not {name!r}"
            )
    tars = [
        object_path(recipe, field_of(recipe, view, "tokens"), shard) for shard in range(recipe.num_shards)
    ]
    stages: list[Any] = [wds.SimpleShardList(tars)]
    if shuffle:
        stages.append(wds.detshuffle(bufsize=len(tars), initial=len(tars), seed=seed))
    stages += [
        wds.split_by_node,
        wds.split_by_worker,
        _Opener(store.path),
        wds.tariterators.tar_file_expander,
        wds.tariterators.group_by_keys,
        _Rows(store, view, tuple(fields), decode=decode),
    ]
    if shuffle:
        stages.append(wds.detshuffle(bufsize=shuffle, initial=min(100, shuffle), seed=seed))
    return wds.DataPipeline(*stages)


@dataclass(frozen=True)
class _Facts:
    """What the .json of a sample says."""

    key: str


class _Opener:
    """Opens tars of a store one after another, wherever it is."""

    def __init__(self, root: Location) -> None:
        self._root = root

    def __call__(self, tars: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for tar in tars:
            with (self._root / tar["url"]).open("rb") as stream:
                yield {**tar, "stream": stream}


class _Rows:
    """Turns members of tars into rows, of which those that are not valid are left out."""

    def __init__(self, store: Store, view: str, fields: tuple[str, ...], *, decode: bool) -> None:
        self._store = Store(store.path, store.manifest)  # without open files, so that workers can be sent it
        self._view = view
        self._decode = decode
        self._valid = np.zeros(store.num_rows, np.bool_)
        self._valid[store.valid_rows] = True
        self._labels = store.labels
        readers = {name: store.reader(view, name) for name in fields}
        self._forms = {name: (reader.row_shape, np.dtype(reader.dtype)) for name, reader in readers.items()}
        self._checksums = {name: store.index.checksums(f"{view}/{name}") for name in fields}

    def __call__(self, samples: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        try:
            for sample in samples:
                row = self._row_of(sample)
                if self._valid[row]:
                    yield self._read(sample, row)
        except tarfile.TarError as error:
            raise StoreDamagedError(
                f"a tar of {self._store.path} is damaged: {error}; run `pipeline verify`"
            ) from error

    def _row_of(self, sample: Mapping[str, Any]) -> int:
        key = str(sample["__key__"])
        if not key.isdecimal() or int(key[:20]) >= len(self._valid):
            raise StoreDamagedError(
                f"{sample['__url__']} of {self._store.path} holds {key[:40]!r}, which is no row; run `pipeline verify`"
            )
        return int(key)

    def _read(self, sample: Mapping[str, Any], row: int) -> dict[str, Any]:
        where = f"in {sample['__url__']} of {self._store.path}"
        facts = read_document(
            sample.get("json", b""), _Facts, name=f"the .json of row {row} {where}", error=StoreDamagedError
        )
        # The label of the tar is not covered by a checksum, that of the index is.
        found = {
            "__key__": sample["__key__"],
            "row": row,
            "key": facts.key,
            "label": int(self._labels[row]),
        }
        for name, (shape, dtype) in self._forms.items():
            # Behind a header that nobody needs, whose numbers are not believed.
            content = sample.get(f"{name}.npy", b"")[-math.prod(shape) * dtype.itemsize :]
            if crc32c(content) != self._checksums[name][row]:
                raise StoreDamagedError(
                    f"row {row} of {self._view}/{name} {where} fails its checksum; run `pipeline verify`"
                )
            array = np.frombuffer(content, dtype).reshape(shape).copy()
            found[name] = self._store.decode(array) if name == "tokens" and self._decode else array
        return found
