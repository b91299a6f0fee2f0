"""Tars are reproducible, and tarfile and webdataset read them without help."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pytest

from shards.errors import StoreDamagedError
from shards.formats import scan_extents
from shards.formats.webdataset_format import npy_header
from shards.metadata.layout import field_of
from shards.reading.store import Store
from shards.testing.contract import StoreKind, build_store, expected_row, same_bits
from shards.testing.stock_readers import stock_samples


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    kind = StoreKind(format="webdataset", bad={4: "bad"}, dtype="bfloat16")
    return build_store(tmp_path_factory.mktemp("tar") / "store", kind)


def test_webdataset_decodes_tokens_label_description_and_image(store):
    samples = {
        int(sample["__key__"]): sample for view in ("center",) for sample in stock_samples(store, view)
    }
    assert sorted(samples) == store.valid_rows.tolist()
    records = [record for shard in range(4) for record in store.plan.records_of(shard)]
    for row, record in zip(store.plan.rows.tolist(), records, strict=True):
        if row == 4:
            continue
        sample = samples[row]
        assert {"tokens.npy", "image.npy", "cls", "json"} <= set(sample)
        assert same_bits(sample["tokens.npy"], expected_row(field_of(store.recipe, "center", "tokens"), row))
        assert same_bits(sample["image.npy"], expected_row(field_of(store.recipe, "center", "image"), row))
        assert sample["cls"] == record.label
        assert sample["json"]["key"] == record.key
        assert sample["json"].get("class_name") == (
            store.class_names[record.label] if record.label >= 0 else None
        )


def test_a_mirrored_view_has_no_images(store):
    assert all("image.npy" not in sample for sample in stock_samples(store, "flip"))


def test_tarfile_sees_plain_members_without_times_and_owners(store):
    with tarfile.open(store.path / "center/00001.tar") as tar:
        members = tar.getmembers()
        for member in members:
            assert (member.mtime, member.uid, member.gid, member.mode) == (0, 0, 0, 0o644)
            assert member.isreg()
            content = tar.extractfile(member)
            assert content is not None
            if member.name.endswith(".npy"):
                np.load(io.BytesIO(content.read()), allow_pickle=False)
            elif member.name.endswith(".json"):
                json.load(content)
    assert [member.name for member in members[:4]] == [
        "000000006.tokens.npy",
        "000000006.image.npy",
        "000000006.cls",
        "000000006.json",
    ]


def test_keys_hold_no_dot_that_would_merge_samples(store):
    assert all(sample["__key__"].isdigit() for sample in stock_samples(store, "center"))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_the_npy_header_is_numpys(dtype, tmp_path):
    store = build_store(
        tmp_path / "store", StoreKind(format="webdataset", dtype=dtype, num_images=2, num_shards=1)
    )
    for name in ("tokens", "image"):
        field = field_of(store.recipe, "center", name)
        file = io.BytesIO()
        np.save(file, expected_row(field, 0))
        assert npy_header(field) + expected_row(field, 0).tobytes() == file.getvalue()
        assert len(npy_header(field)) % 64 == 0


def damaged(tmp_path, change):
    store = build_store(tmp_path / "store", StoreKind(format="webdataset"))
    path = store.path / "center/00000.tar"
    path.write_bytes(change(path.read_bytes()))
    return lambda: scan_extents(store.path, store.recipe, field_of(store.recipe, "center", "tokens"), 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1024], "without an end mark"),
        (lambda content: content[:700], "without an end mark"),
        (lambda content: b"\1" + content[1:], "header at byte 0 is damaged"),
        (lambda content: content.replace(b"000000000.tok", b"000000000_tok"), "header at byte 0 is damaged"),
        (lambda content: content[:512] + b"\x92" + content[513:], "is not an array"),
    ],
)
def test_a_damaged_tar_is_refused_with_the_place(tmp_path, change, message):
    with pytest.raises(StoreDamagedError, match=message):
        damaged(tmp_path, change)()


def test_members_of_another_shard_strangers_and_doubles_are_refused(tmp_path):
    store = build_store(tmp_path / "store", StoreKind(format="webdataset"))
    field = field_of(store.recipe, "center", "tokens")
    one, other = store.path / "center/00000.tar", store.path / "center/00001.tar"
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    with pytest.raises(StoreDamagedError, match="belongs to another shard"):
        scan_extents(store.path, store.recipe, field, 0)
    one.write_bytes(content[:-1024] + content)
    with pytest.raises(StoreDamagedError, match="comes twice"):
        scan_extents(store.path, store.recipe, field, 0)
    with tarfile.open(one, "w") as tar:
        tar.addfile(tarfile.TarInfo("../../etc/passwd"))
    with pytest.raises(StoreDamagedError, match="is not named by a row"):
        scan_extents(store.path, store.recipe, field, 0)
