"""What every store must do, as a suite of tests, and the means to make stores for tests.

The suite and the strategies are for any form and storage type; its raw accessor reads with zarr-python and
webdataset, so that it sees what strangers see and not what the code under test believes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.typing import NDArray

from shards.errors import StoreDamagedError
from shards.formats import object_path
from shards.integrity.verify import verify_store
from shards.metadata.identity import COMPRESSED_FORMATS, COMPRESSIONS, FORMATS, EncoderIdentity, Recipe
from shards.metadata.layout import Field, field_of, fields_of
from shards.metadata.plan import Plan, SourceRecord
from shards.reading.loader import Loader
from shards.reading.shard_file import READ_MODES, ReadMode
from shards.reading.store import Store, open_store
from shards.storage.location import Location, object_names, publish_bytes, read_objects, remove_matching
from shards.testing.stock_readers import stock_rows
from shards.values.dtypes import TOKEN_DTYPES, to_float64, to_storage
from shards.values.quantize import Int8Code, fit_code
from shards.writing.copying import begin_copy, copied_recipe, copy_rows
from shards.writing.selection import every_row
from shards.writing.store_writer import StoreWriter


@dataclass(frozen=True, kw_only=True)
class StoreKind:
    """A form and storage type, and the size of the store that is made of it."""

    format: str = "zarr"
    dtype: str = "float16"
    compression: str | None = None
    image_compression: str | None = None
    num_images: int = 23
    num_shards: int = 4
    views: tuple[str, ...] = ("center", "flip")
    grid: tuple[int, int] = (2, 3)
    width: int = 5
    image_size: int = 8
    bad: Mapping[int, str] = dataclasses.field(default_factory=dict)
    prefix: str = ""
    class_names: tuple[str, ...] = ("cat", "dog", "größe")
    class_token: bool = False

    def __str__(self) -> str:
        """Name for a test's report."""
        parts = (self.format, self.dtype, self.compression, self.image_compression, "cls" * self.class_token)
        return "-".join(filter(None, parts))


def compressions(name: str) -> tuple[str | None, ...]:
    """Return how rows may be compressed in a format."""
    return (None, *COMPRESSIONS) if name in COMPRESSED_FORMATS else (None,)


ALL_KINDS = tuple(
    StoreKind(
        format=name,
        dtype=dtype,
        compression=compression,
        image_compression=compression,
        class_token=dtype == "bfloat16",
    )
    for name in FORMATS
    for compression in compressions(name)
    for dtype in TOKEN_DTYPES
)
"""Every format with every storage type that tokens are written in."""


def tiny_encoder(grid: tuple[int, int] = (2, 3), width: int = 5) -> EncoderIdentity:
    """Return the identity of an encoder that does not exist."""
    return EncoderIdentity(
        name="tiny",
        weights="random:0",
        weights_digest="0" * 64,
        preprocessing={"resize": "bicubic", "mean": [0.5, 0.5, 0.5]},
        input_size=28,
        grid=grid,
        width=width,
        prefix_tokens=1,
        final_norm="layernorm-no-affine",
    )


def tiny_records(count: int, num_classes: int = 3) -> list[SourceRecord]:
    """Source images that do not exist, one of them without a label."""
    return [
        SourceRecord(
            f"class {i % num_classes}/ä{i:04d}.png", i % num_classes if i else -1, f"/nowhere/{i}", 0, 100 + i
        )
        for i in range(count)
    ]


def make_plan(kind: StoreKind, seed: int = 0) -> Plan:
    """Return the plan of a store of this kind."""
    records = [replace(record, key=kind.prefix + record.key) for record in tiny_records(kind.num_images)]
    return Plan.build(records, kind.class_names, kind.num_shards, seed)


def make_recipe(kind: StoreKind, plan: Plan) -> Recipe:
    """Return the recipe of a store of this kind."""
    return Recipe(
        encoder=tiny_encoder(kind.grid, kind.width),
        **plan.recipe_values(),
        views=kind.views,
        dtype=kind.dtype,
        image_size=kind.image_size,
        format=kind.format,
        compression=kind.compression,
        image_compression=kind.image_compression,
        class_token=kind.class_token,
    )


def make_code(kind: StoreKind) -> Int8Code | None:
    """Return the code of a store of this kind, if its tokens are int8."""
    return tiny_code(kind.width) if kind.dtype == "int8" else None


def expected_row(field: Field, row: int) -> NDArray[Any]:
    """Return what `build_store` writes at a row: a function of view, field and row."""
    if field.name == "image":
        return _generator(field, row).integers(0, 256, field.row_shape, np.uint8)
    values = encoded_row(field, row)
    if field.dtype.logical == "int8":
        return tiny_code(field.row_shape[-1]).encode(values)
    return to_storage(values, field.dtype)


def encoded_row(field: Field, row: int) -> NDArray[np.float32]:
    """Return the tokens behind `expected_row`, before they are rounded to the storage type."""
    # Channel means and deviations of very different size, as in real tokens.
    scale = 10.0 ** np.linspace(-1, 1, field.row_shape[-1])
    return (_generator(field, row).standard_normal(field.row_shape) * scale + scale).astype(np.float32)


def _generator(field: Field, row: int) -> np.random.Generator:
    return np.random.default_rng([row, *field.path.encode()])


@cache
def tiny_code(width: int) -> Int8Code:
    """Return the code of int8 stores: fitted to tokens like those of `encoded_row`."""
    scale = 10.0 ** np.linspace(-1, 1, width)
    return fit_code(np.random.default_rng(0).standard_normal((4096, width)) * scale + scale)


def write_shard(
    writer: StoreWriter,
    view: str,
    shard: int,
    *,
    bad: Mapping[int, str] = MappingProxyType({}),
    block: int = 3,
) -> None:
    """Write one shard of a view with `expected_row`, a few rows at a time."""
    fields = fields_of(writer.recipe, view)
    rows = writer.plan.rows_of(shard)
    bad = {row: reason for row, reason in bad.items() if row in rows}
    with writer.shard(view, shard) as output:
        for row, reason in bad.items():
            output.quarantine(row - rows.start, reason)
        good = [row for row in rows if row not in bad]
        while good:
            length = 1
            while length < min(block, len(good)) and good[length] == good[0] + length:
                length += 1
            arrays = {
                field.name: np.stack([expected_row(field, r) for r in good[:length]]) for field in fields
            }
            output.write_block(good[0] - rows.start, arrays)
            if writer.code is not None:
                for row in good[:length]:
                    output.add_square_error(_square_error(writer.code, fields[0], row))
            good = good[length:]
        output.publish()


def _square_error(code: Int8Code, field: Field, row: int) -> NDArray[np.float64]:
    error = code.decode(expected_row(field, row)).astype(np.float64) - encoded_row(field, row)
    total: NDArray[np.float64] = (error * error).sum(axis=0)
    return total


def build_store(path: Location, kind: StoreKind, *, block: int = 3) -> Store:
    """Write a whole store of this kind and open it."""
    plan = make_plan(kind)
    writer = StoreWriter.create_or_continue(path, make_recipe(kind, plan), plan, make_code(kind))
    for view, shard in writer.pending():
        write_shard(writer, view, shard, bad=kind.bad, block=block)
    writer.finalize({"made by": "a test"})
    return open_store(path)


def copy_store(store: Store, out: Path, **changes: Any) -> Store:
    """Return all rows of a store in another format, compression or storage type, opened."""
    selection = every_row(store)
    writer, _ = begin_copy(selection, out, copied_recipe(selection, **changes), store.code)
    copy_rows(selection, writer, {"made by": "a test"})
    return open_store(out)


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Return whether two arrays are the same, NaN patterns and signs of zero included."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def flip_bit(path: Location, bit: int) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(content))


def store_kinds() -> st.SearchStrategy[StoreKind]:
    """Return small stores of every format, storage type, size and set of views."""

    def fill_in(kind: StoreKind) -> st.SearchStrategy[StoreKind]:
        choices = compressions(kind.format)
        rows = st.integers(0, kind.num_images - 1)
        return st.builds(
            replace,
            st.just(kind),
            compression=st.sampled_from(choices),
            image_compression=st.sampled_from(choices),
            num_shards=st.integers(1, kind.num_images),
            bad=st.dictionaries(rows, st.text("abc ", min_size=1, max_size=9), max_size=3),
        )

    return st.builds(
        StoreKind,
        format=st.sampled_from(FORMATS),
        dtype=st.sampled_from(TOKEN_DTYPES),
        num_images=st.integers(1, 9),
        views=st.sampled_from([("center",), ("center", "flip"), ("center", "flip", "crop0")]),
        grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
        width=st.integers(1, 5),
        image_size=st.integers(0, 4),
    ).flatmap(fill_in)


class StoreContract:
    """Behaviour of a store of any kind. Subclass it and give a fixture ``kind``."""

    BAD: Mapping[int, str] = {4: "cannot be decoded: truncated"}

    @pytest.fixture(scope="class")
    @classmethod
    def kind(cls) -> StoreKind:
        """Return the kind of store under test."""
        raise NotImplementedError

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Location:
        """Return an empty folder for stores."""
        return tmp_path_factory.mktemp("stores")

    @pytest.fixture(scope="class")
    @classmethod
    def store(cls, kind: StoreKind, folder: Location) -> Store:
        """Return a finished store of that kind with one image quarantined; not to be changed."""
        return build_store(folder / f"store-{kind}", replace(kind, bad=cls.BAD))

    def test_every_valid_row_reads_back_bit_for_bit(self, store: Store) -> None:
        """In one call and one by one, by each way of reading."""
        for mode in READ_MODES:
            for field in _stored_fields(store):
                self._assert_reads(store, field, mode)

    @staticmethod
    def _assert_reads(store: Store, field: Field, mode: ReadMode) -> None:
        reader = store.reader(field.view, field.name, mode=mode, verify="always")
        rows = store.valid_rows
        out = np.zeros((len(rows), *reader.row_shape), reader.dtype)
        reader.read(rows, out)
        assert same_bits(out, np.stack([expected_row(field, row) for row in rows.tolist()]))
        for index, row in enumerate(rows.tolist()):
            reader.read([row], out, at=[len(rows) - 1 - index])
        assert same_bits(out, np.stack([expected_row(field, row) for row in rows.tolist()[::-1]]))

    def test_stock_readers_see_the_same_numbers(self, store: Store) -> None:
        """zarr-python or webdataset, which know nothing of this package."""
        for field in _stored_fields(store):
            rows = stock_rows(store, field.view, field.name)
            for row in store.valid_rows.tolist():
                assert same_bits(rows[row], expected_row(field, row))

    def test_a_bad_or_spare_row_never_reads_as_data(self, store: Store) -> None:
        """Neither here nor, as far as the form allows, in stock readers."""
        absent = sorted(set(range(store.num_rows)) - set(store.valid_rows.tolist()))
        assert 4 in absent
        for field in _stored_fields(store):
            reader = store.reader(field.view, field.name)
            out = np.zeros((1, *reader.row_shape), reader.dtype)
            rows = stock_rows(store, field.view, field.name)
            for row in absent:
                with pytest.raises(StoreDamagedError, match=f"row {row} of shard {row // store.capacity}"):
                    reader.read([row], out)
                if row in rows and field.name == "tokens":
                    assert np.isnan(_numbers(field, rows[row])).all()

    def test_counts_add_up_and_labels_follow_the_plan(self, store: Store) -> None:
        """Every image is valid, or listed with its reason."""
        index = store.index.table()
        assert index.num_rows == store.manifest.num_valid + store.manifest.num_bad == store.plan.num_images
        assert len(store.valid_rows) == store.manifest.num_valid
        reasons = dict(zip(index["row"].to_pylist(), index["reason"].to_pylist(), strict=True))
        assert all(self.BAD[4] in reasons[row] for row in self.BAD)
        assert all(reasons[row] is None for row in store.valid_rows.tolist())
        assert np.array_equal(store.labels[store.plan.rows], store.plan.labels)

    def test_statistics_are_those_of_the_stored_numbers(self, store: Store) -> None:
        """Of one view, and of all views together."""
        for views in (store.views[:1], store.views):
            values = np.concatenate([_all_tokens(store, view) for view in views])
            expected = values.reshape(len(values), *store.grid, store.width).transpose(0, 3, 1, 2)
            statistics = store.statistics(views)
            assert statistics.count == len(values)
            np.testing.assert_allclose(statistics.mean, expected.mean(0), rtol=1e-12, atol=1e-13)
            np.testing.assert_allclose(statistics.variance, expected.var(0), rtol=1e-10, atol=1e-13)

    def test_the_loader_delivers_each_valid_row_once_an_epoch(self, store: Store) -> None:
        """With the right numbers, label and view beside each row."""
        fields = store.recipe.fields("center")
        seen: list[int] = []
        size = len(store.valid_rows)
        with Loader(store, fields=fields, views=store.views, seed=3, global_batch_size=1) as loader:
            for batch in loader:
                row, view = int(batch.rows[0]), store.views[batch.views[0]]
                seen.append(row)
                assert batch.labels[0] == store.labels[row]
                tokens = field_of(store.recipe, view, "tokens")
                assert same_bits(batch.arrays["tokens"][0], expected_row(tokens, row))
                if "image" in fields:
                    image = expected_row(field_of(store.recipe, "center", "image"), row)
                    assert same_bits(batch.arrays["image"][0], image[:, ::-1] if view == "flip" else image)
                if "cls" in fields:
                    cls = expected_row(field_of(store.recipe, view, "cls"), row)
                    assert same_bits(batch.arrays["cls"][0], cls)
                batch.release()
                if len(seen) == 2 * size:
                    break
        assert sorted(seen[:size]) == sorted(seen[size:]) == store.valid_rows.tolist()

    def test_verify_finds_nothing_wrong(self, store: Store) -> None:
        """In a store as it was written."""
        assert verify_store(store.path) == []

    def test_a_damaged_object_is_refused_and_never_read_as_data(self, store: Store) -> None:
        """Wherever the bit is: in a row, or in what says where the rows are."""
        for field in fields_of(store.recipe, store.views[0]):
            path = store.path / object_path(store.recipe, field, 1)
            size = len(path.read_bytes())
            for byte in {0, size // 3, size - 2, *range(size - 1, max(0, size - 80), -19)}:
                flip_bit(path, bit := byte * 8 + byte % 8)
                try:
                    self._assert_right_or_refused(store.path, field, path)
                finally:
                    flip_bit(path, bit)

    @staticmethod
    def _assert_right_or_refused(store: Location, field: Field, damaged: Location) -> None:
        damaged_store = open_store(store)
        reader = damaged_store.reader(field.view, field.name, verify="always")
        rows = damaged_store.valid_rows
        out = np.zeros((len(rows), *reader.row_shape), reader.dtype)
        with contextlib.suppress(StoreDamagedError):
            reader.read(rows, out)
            expected = np.stack([expected_row(field, row) for row in rows.tolist()])
            assert same_bits(out, expected), f"{damaged} is damaged and was read as data"

    def test_a_second_writer_changes_nothing(self, store: Store, kind: StoreKind, folder: Location) -> None:
        """Neither the objects of the first nor the record of them."""
        copy = folder / f"copy-{kind}"
        before = read_objects(store.path, object_names(store.path))
        for name, content in before.items():
            publish_bytes(copy / name, content)
        writer = StoreWriter.create_or_continue(copy, store.recipe, store.plan, store.code)
        write_shard(writer, "center", 1)
        remove_matching(copy / "moments", re.compile(".*"))
        assert read_objects(copy, object_names(copy)) == before

    def test_batches_of_writing_leave_no_trace(self, store: Store, kind: StoreKind, folder: Location) -> None:
        """Rows written one by one give the objects and statistics that blocks give, byte for byte."""
        other = build_store(folder / f"other-{kind}", replace(kind, bad=self.BAD), block=1)
        for record in store.manifest.objects:
            if not record.path.startswith("commits/"):
                assert (other.path / record.path).read_bytes() == (store.path / record.path).read_bytes(), (
                    record
                )


def _stored_fields(store: Store) -> Sequence[Field]:
    return [field for view in store.views for field in fields_of(store.recipe, view)]


def _all_tokens(store: Store, view: str) -> NDArray[np.float64]:
    field = field_of(store.recipe, view, "tokens")
    return np.stack([_numbers(field, expected_row(field, row)) for row in store.valid_rows.tolist()])


def _numbers(field: Field, stored: NDArray[Any]) -> NDArray[np.float64]:
    """Return the numbers that the stored tokens encode."""
    if field.dtype.logical == "int8":
        return tiny_code(field.row_shape[-1]).decode(stored).astype(np.float64)
    return to_float64(stored, field.dtype)
