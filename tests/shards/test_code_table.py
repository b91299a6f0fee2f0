"""int8 stores: the code beside the rows, the error that was measured, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import zarr

from shards.errors import IdentityMismatchError, StoreDamagedError, UsageError
from shards.integrity.verify import verify_store
from shards.metadata.layout import CODE_TABLE, field_of
from shards.reading.store import open_store
from shards.testing.contract import (
    StoreKind,
    build_store,
    copy_store,
    encoded_row,
    expected_row,
    flip_bit,
    make_plan,
    make_recipe,
    tiny_code,
    write_shard,
)
from shards.values.quantize import Int8Code, fit_code
from shards.writing.store_writer import StoreWriter

KIND = StoreKind(dtype="int8", num_images=40, bad={4: "cannot be decoded"})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A finished int8 store with one image quarantined; not to be changed."""
    return build_store(tmp_path_factory.mktemp("int8") / "store", KIND)


@pytest.fixture
def begun():
    """Plan, recipe and code of such a store."""
    plan = make_plan(KIND)
    return plan, make_recipe(KIND, plan), tiny_code(KIND.width)


def test_stock_zarr_and_one_line_of_numpy_give_the_numbers(store):
    group = zarr.open_group(store.path, mode="r")
    codes, table = group["center/tokens"][:], group["code/table"][:]
    numbers = table[np.arange(table.shape[0]), codes.astype(int) + 128]
    field = field_of(store.recipe, "center", "tokens")
    for row in store.valid_rows.tolist():
        np.testing.assert_array_equal(numbers[row], tiny_code(KIND.width).decode(expected_row(field, row)))
    assert np.isnan(numbers[4]).all()


def test_the_store_knows_its_code(store):
    assert store.code is not None
    assert store.code.digest == store.recipe.code == tiny_code(KIND.width).digest


def test_the_stored_error_is_that_of_every_row_relative_to_its_channels_deviation(store):
    for view in store.views:
        field = field_of(store.recipe, view, "tokens")
        true = np.stack([encoded_row(field, row) for row in store.valid_rows.tolist()]).astype(np.float64)
        kept = np.stack([store.code.decode(expected_row(field, row)) for row in store.valid_rows.tolist()])
        expected = np.sqrt(((kept - true) ** 2).mean((0, 1))) / kept.astype(np.float64).std((0, 1))
        np.testing.assert_allclose(store.code_error(view), expected, rtol=1e-9)
        assert store.code_error(view).max() < 0.02


def test_a_float_store_has_no_code_and_no_error(tmp_path):
    store = build_store(tmp_path / "store", StoreKind(num_images=3, num_shards=1))
    assert store.code is None
    assert store.code_error("center") is None


def test_converting_keeps_codes_and_error_bit_for_bit(store, tmp_path):
    copy_store(store, tmp_path / "tars", format="webdataset")
    copy = open_store(tmp_path / "tars")
    assert copy.code.digest == store.code.digest
    for view in store.views:
        np.testing.assert_array_equal(copy.code_error(view), store.code_error(view))


def test_int8_without_a_code_and_a_code_without_int8_are_refused(begun, tmp_path):
    plan, recipe, code = begun
    with pytest.raises(UsageError, match="written with a code"):
        StoreWriter.create_or_continue(tmp_path / "store", recipe, plan)
    with pytest.raises(UsageError, match="written with a code"):
        StoreWriter.create_or_continue(
            tmp_path / "store", dataclasses.replace(recipe, dtype="float16"), plan, code
        )
    with pytest.raises(UsageError, match="6 channels"):
        StoreWriter.create_or_continue(tmp_path / "store", recipe, plan, tiny_code(6))


def test_of_two_codes_begun_at_once_the_first_is_kept_for_both(begun, tmp_path):
    plan, recipe, code = begun
    first = StoreWriter.create_or_continue(tmp_path / "store", recipe, plan, code)
    other = fit_code(np.random.default_rng(9).standard_normal((50, KIND.width)))
    second = StoreWriter.create_or_continue(tmp_path / "store", recipe, plan, other)
    assert first.code.digest == second.code.digest == second.recipe.code == code.digest


def test_another_calibration_is_another_recipe(begun, tmp_path):
    plan, recipe, code = begun
    StoreWriter.create_or_continue(tmp_path / "store", recipe, plan, code)
    with pytest.raises(IdentityMismatchError, match="calibration_rows is 0, the other has 64"):
        StoreWriter.create_or_continue(
            tmp_path / "store", dataclasses.replace(recipe, calibration_rows=64), plan, code
        )


def test_int8_rows_without_their_error_cannot_be_published(begun, tmp_path):
    plan, recipe, code = begun
    writer = StoreWriter.create_or_continue(tmp_path / "store", recipe, plan, code)
    rows = writer.plan.rows_of(0)
    with writer.shard("flip", 0) as output:
        for row in rows:
            output.write(row, {"tokens": expected_row(field_of(writer.recipe, "flip", "tokens"), row)})
        with pytest.raises(ValueError, match="add_square_error"):
            output.publish()


def test_lost_partial_sums_are_computed_again_from_the_codes(begun, store, tmp_path):
    plan, recipe, code = begun
    writer = StoreWriter.create_or_continue(tmp_path / "store", recipe, plan, code)
    for view, shard in writer.pending():
        write_shard(writer, view, shard, bad=KIND.bad)
    for path in (writer.path / "moments").rglob("*.npy"):
        path.unlink()
    writer.finalize()
    for one, other in zip(
        open_store(writer.path).statistics().__dict__.values(),
        store.statistics().__dict__.values(),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_a_changed_table_is_found(begun, store, tmp_path):
    plan, recipe, code = begun
    writer = StoreWriter.create_or_continue(tmp_path / "store", recipe, plan, code)
    for view, shard in writer.pending():
        write_shard(writer, view, shard)
    writer.finalize()
    flip_bit(writer.path / CODE_TABLE, 8 * 4 * 100)
    assert [problem.path for problem in verify_store(writer.path)] == [CODE_TABLE]
    with pytest.raises(StoreDamagedError, match="not the file that was written"):
        _ = open_store(writer.path).code


def test_a_table_put_in_place_of_the_recipes_is_found_while_writing(begun, tmp_path):
    plan, recipe, code = begun
    writer = StoreWriter.create_or_continue(tmp_path / "store", recipe, plan, code)
    other = Int8Code(code.table * np.float32(1.5))
    (writer.path / CODE_TABLE).write_bytes(other.table.tobytes())
    again = StoreWriter(writer.path, writer.recipe, plan)
    with pytest.raises(StoreDamagedError, match="not the code the store was written with"):
        _ = again.code


def test_the_recipe_in_the_root_names_the_code(store):
    recipe = json.loads((store.path / "zarr.json").read_bytes())["attributes"]["recipe"]
    assert recipe["dtype"] == "int8"
    assert recipe["code"] == store.code.digest
