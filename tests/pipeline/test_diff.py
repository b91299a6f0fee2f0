"""`pipeline diff`: nothing is called the same that is not, and what differs is named and measured."""

import dataclasses
import json
import zlib

import numpy as np
import pytest

from pipeline.operations.difference import compare_stores
from pipeline.settings.operations import DiffConfig
from shards.metadata.layout import fields_of
from shards.metadata.plan import Plan
from shards.reading.store import Store, open_store
from shards.testing.contract import StoreKind, copy_store, make_recipe, tiny_records
from shards.values.dtypes import storage_type, to_storage
from shards.writing.store_writer import StoreWriter

NAMES = ("cat", "dog", "größe")


def numbers_of(key, view, shape):
    """Tokens that depend on image and view alone, not on the row; exact in every floating storage type."""
    rng = np.random.default_rng(zlib.crc32(f"{view} {key}".encode()))
    return rng.integers(-64, 64, shape).astype(np.float32) / 16


def write_store(path, *, records=None, change=None, bad=(), class_names=NAMES, **kind):
    """A store whose rows belong to their keys; `change` adds a number to the tokens of some keys."""
    records = tiny_records(11) if records is None else records
    kind = StoreKind(**{"num_images": len(records), "num_shards": 3, **kind})
    plan = Plan.build(records, class_names, kind.num_shards, 0)
    writer = StoreWriter.create_or_continue(path, make_recipe(kind, plan), plan)
    for view, shard in writer.pending():
        with writer.shard(view, shard) as output:
            for place, record in enumerate(plan.records_of(shard)):
                if record.key in bad:
                    output.quarantine(place, "not an image")
                    continue
                row = {}
                for field in fields_of(writer.recipe, view):
                    values = numbers_of(record.key, f"{view}/{field.name}", field.row_shape)
                    if field.name == "tokens":
                        values = values + np.float32((change or {}).get(record.key, 0))
                        row[field.name] = to_storage(values, field.dtype)
                    else:
                        row[field.name] = (values + 4).astype(storage_type("uint8").numpy)
                output.write(place, row)
            output.publish()
    writer.finalize({})
    return open_store(path)


@pytest.fixture(scope="module")
def a(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("a") / "store")


def test_a_store_and_the_same_again_are_the_same(a, tmp_path, pipeline):
    b = write_store(tmp_path / "b")
    code, out, _ = pipeline("diff", a.path, b.path)
    assert code == 0
    assert out.splitlines()[-1] == "the stores are the same"
    facts = json.loads(pipeline("diff", a.path, b.path, "--json")[1])
    assert facts["same"]
    assert facts["rows"]["common"] == 11
    assert facts["fields"]["flip/tokens"] == {"rows": 11, "differing": 0, "shapes": None}


def test_changed_tokens_are_counted_by_checksum_and_measured_by_channel(a, tmp_path, pipeline):
    key = tiny_records(11)[4].key
    b = write_store(tmp_path / "b", change={key: 0.5})
    difference = compare_stores(a, b, rows=None)
    tokens = difference.fields["center/tokens"]
    assert (tokens.rows, tokens.differing, tokens.numbers.compared) == (11, 1, 1)
    assert tokens.numbers.largest.tolist() == [0.5] * 5
    assert tokens.numbers.mean.tolist() == [0.5] * 5
    np.testing.assert_allclose(
        tokens.numbers.std, np.sqrt(a.statistics(["center"]).variance.mean(axis=(1, 2)))
    )
    assert difference.fields["center/image"].differing == 0
    code, out, _ = pipeline("diff", a.path, b.path)
    assert code == 1
    assert "1 of 11 rows differ" in out
    assert "largest difference 0.5, in channel 0" in out


def test_a_sample_never_hides_that_rows_differ(a, tmp_path):
    keys = [record.key for record in tiny_records(11)]
    b = write_store(tmp_path / "b", change={key: 0.25 * i for i, key in enumerate(keys)})
    tokens = compare_stores(a, b, rows=3).fields["center/tokens"]
    assert (tokens.differing, tokens.numbers.compared) == (10, 3)


def test_another_deal_differs_in_the_recipe_and_not_in_the_rows(a, tmp_path):
    b = write_store(tmp_path / "b", num_shards=4)
    difference = compare_stores(a, b, rows=None)
    assert difference.recipe == ["num_shards is 3, the other has 4"]
    assert not difference.same
    assert all(part.differing == 0 for part in difference.fields.values())
    assert not any(difference.rows.lists().values())


def test_images_are_matched_by_key_and_those_without_a_partner_are_listed(a, tmp_path, pipeline):
    records = tiny_records(11)
    lost, new = records[3].key, "class 0/new.png"
    changed = [dataclasses.replace(record, label=0) if i == 5 else record for i, record in enumerate(records)]
    changed[3] = dataclasses.replace(records[3], key=new)
    b = write_store(tmp_path / "b", records=changed, bad={records[7].key})
    rows = compare_stores(a, b, rows=None).rows
    assert rows.common == 10
    assert (rows.only_a, rows.only_b) == ([lost], [new])
    assert (rows.other_class, rows.valid_only_a, rows.valid_only_b) == (
        [records[5].key],
        [records[7].key],
        [],
    )
    out = pipeline("diff", a.path, b.path)[1]
    assert f"1 only in the first: {lost}" in out
    assert f"1 usable only in the first: {records[7].key}" in out
    assert compare_stores(a, b, rows=None).fields["center/tokens"].rows == 9


def test_a_class_of_another_name_is_another_class(a, tmp_path):
    b = write_store(tmp_path / "b", class_names=("cat", "dog", "size"))
    assert len(compare_stores(a, b, rows=None).rows.other_class) == sum(
        record.label == 2 for record in tiny_records(11)
    )


def test_rounding_to_another_storage_type_is_measured(a, tmp_path):
    b = write_store(tmp_path / "b", dtype="float32", change={tiny_records(11)[0].key: 2.0**-12})
    tokens = compare_stores(a, b, rows=None).fields["flip/tokens"]
    assert (tokens.differing, tokens.numbers.compared) == (11, 11)
    assert tokens.numbers.largest.tolist() == [2.0**-12] * 5
    np.testing.assert_allclose(tokens.numbers.mean, [2.0**-12 / 11] * 5)


def test_tokens_of_another_shape_are_not_compared(a, tmp_path, pipeline):
    b = write_store(tmp_path / "b", width=7)
    difference = compare_stores(a, b, rows=None)
    assert difference.fields["center/tokens"].shapes == ((6, 5), (6, 7))
    assert not difference.same
    assert "rows of different shapes: 6×5 and 6×7" in pipeline("diff", a.path, b.path)[1]


def test_another_form_has_the_same_rows_in_other_bytes(a, tmp_path, pipeline):
    copy_store(a, tmp_path / "tars", format="webdataset")
    difference = compare_stores(a, open_store(tmp_path / "tars"), rows=None)
    assert all(part.differing == 0 for part in difference.fields.values())
    assert difference.recipe == ["format is 'zarr', the other has 'webdataset'"]
    sizes = difference.nbytes["center/tokens"]
    assert sizes[0] == sum(o.nbytes for o in a.manifest.objects if o.path.startswith("center/tokens/"))
    assert sizes[1] == 0


def test_a_field_that_was_added_to_one_store_alone_is_a_difference(a):
    manifest = dataclasses.replace(a.manifest, fields={"other": "0" * 32})
    difference = compare_stores(a, Store(a.path, manifest), rows=None)
    assert difference.added == [f"other is of encoder none, the other has {'0' * 32}"]
    assert not difference.same


def test_wrong_usage_gets_one_line(a, tmp_path, pipeline):
    for arguments in ((a.path, tmp_path), (a.path, a.path, "--rows", -1)):
        code, out, err = pipeline("diff", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)


def test_a_store_that_was_added_to_is_compared_part_by_part(folder, tmp_path, tiny, pipeline):
    for name, views in (("grown", "center"), ("whole", "center,flip")):
        arguments = ("encode", folder, "--out", tmp_path / name, "--shards", 2, "--views", views, *tiny)
        assert pipeline(*arguments)[0] == 0
    assert pipeline("add-view", tmp_path / "grown", "--views", "flip")[0] == 0
    grown, whole = open_store(tmp_path / "grown"), open_store(tmp_path / "whole")
    assert grown.manifest.revision == 1
    sizes = compare_stores(grown, whole, rows=None).nbytes
    assert "revisions" not in sizes
    for part in ("index.parquet", "valid", "stats", "label"):
        assert sizes[part][0] == sizes[part][1] > 0
    assert "revisions" not in pipeline("inspect", grown.path)[1].split("sizes")[1].splitlines()[0]


def test_stored_bytes_are_taken_to_be_those_of_the_index(a, tmp_path, pipeline):
    b = write_store(tmp_path / "b")
    shard = next(b.path / o.path for o in b.manifest.objects if o.path.startswith("center/tokens/c/"))
    content = bytearray(shard.read_bytes())
    content[0] ^= 1
    shard.write_bytes(content)
    assert pipeline("diff", a.path, b.path)[0] == 0
    assert pipeline("verify", b.path)[0] == 1
    assert "`pipeline verify`" in DiffConfig.__doc__
