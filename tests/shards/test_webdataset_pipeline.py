"""A store of tars is a pipeline of the webdataset library in one line."""

from __future__ import annotations

import gc
import tarfile

import numpy as np
import pytest

from shards import StoreDamagedError, UsageError, open_store, webdataset_pipeline
from shards.testing.contract import StoreKind, build_store, flip_bit

KIND = StoreKind(format="webdataset", num_images=23, bad={4: "not an image"})


@pytest.fixture(scope="module", params=["float16", "bfloat16", "int8"])
def store(request, tmp_path_factory):
    kind = StoreKind(format="webdataset", dtype=request.param, bad={4: "not an image"})
    return build_store(tmp_path_factory.mktemp("pipeline") / "store", kind)


def test_every_valid_row_comes_once_with_its_label_and_the_numbers_of_the_reader(store):
    rows = {sample["row"]: sample for sample in webdataset_pipeline(store.path, view="center")}
    assert sorted(rows) == store.valid_rows.tolist()
    reader = store.reader("center", "tokens")
    stored = np.empty((len(rows), *reader.row_shape), reader.dtype)
    reader.read(store.valid_rows, stored)
    keys = dict(zip(store.plan.rows.tolist(), store.plan.keys.tolist(), strict=True))
    for row, expected in zip(store.valid_rows.tolist(), store.decode(stored), strict=True):
        assert np.array_equal(rows[row]["tokens"], expected)
        assert rows[row]["tokens"].dtype == np.float32
        assert (rows[row]["label"], rows[row]["key"]) == (store.labels[row], keys[row])


def test_orders_differ_from_epoch_to_epoch_and_are_the_seeds(store):
    def epochs(seed):
        pipeline = webdataset_pipeline(store.path, seed=seed)
        return [[sample["row"] for sample in pipeline] for _ in range(2)]

    first = epochs(0)
    assert first == epochs(0)
    assert first[0] != first[1]
    assert epochs(1) != first
    as_stored = [sample["row"] for sample in webdataset_pipeline(store.path, shuffle=0)]
    assert as_stored == store.valid_rows.tolist()


def test_ranks_and_workers_read_each_row_once(store, monkeypatch):
    seen = []
    for rank in range(2):
        for worker in range(2):
            for name, value in {"RANK": rank, "WORLD_SIZE": 2, "WORKER": worker, "NUM_WORKERS": 2}.items():
                monkeypatch.setenv(name, str(value))
            seen += [sample["row"] for sample in webdataset_pipeline(store.path)]
    assert sorted(seen) == store.valid_rows.tolist()


@pytest.mark.filterwarnings("default")
def test_a_data_loader_with_worker_processes_reads_every_row(tmp_path):
    torch = pytest.importorskip("torch")
    store = build_store(tmp_path / "store", KIND)
    pipeline = webdataset_pipeline(store.path, fields=("tokens", "image"))
    loader = torch.utils.data.DataLoader(
        pipeline, batch_size=None, num_workers=2, multiprocessing_context="spawn"
    )
    samples = list(loader)
    assert sorted(sample["row"] for sample in samples) == store.valid_rows.tolist()
    assert {tuple(sample["image"].shape) for sample in samples} == {(store.image_size, store.image_size, 3)}
    gc.collect()


@pytest.mark.parametrize(
    ("member", "name", "content", "message"),
    [
        ("000000000.json", None, b"[", "json of row 0 in .* does not hold what it must"),
        ("000000000.json", None, b'{"key": 3}', "json of row 0 in .* does not hold what it must: key"),
        ("000000000.tokens.npy", "-00000001.tokens.npy", None, "holds '-00000001', which is no row"),
        ("000000000.tokens.npy", "99999999999999999999999.tokens.npy", None, "which is no row"),
        ("000000000.tokens.npy", None, b"\x93NUMPY\x01\x00\xff\xff", "tokens in .* fails its checksum"),
        ("000000000.tokens.npy", "000000000.other.npy", None, "tokens in .* fails its checksum"),
    ],
)
def test_a_tar_that_was_edited_is_damage_in_one_line(tmp_path, member, name, content, message):
    store = build_store(tmp_path / "store", StoreKind(format="webdataset", num_images=1, num_shards=1))
    path = tmp_path / "store" / next(o.path for o in store.manifest.objects if o.path.endswith(".tar"))
    with tarfile.open(path) as archive:
        found = archive.getmember(member)
    edited = bytearray(path.read_bytes())
    if name is not None:
        found.name = name
        edited[found.offset_data - 512 : found.offset_data] = found.tobuf(tarfile.GNU_FORMAT)[:512]
    if content is not None:
        edited[found.offset_data : found.offset_data + found.size] = content.ljust(found.size)
    path.write_bytes(edited)
    with pytest.raises(StoreDamagedError, match=message) as refused:
        list(webdataset_pipeline(tmp_path / "store", shuffle=0))
    assert "\n" not in str(refused.value)


def test_what_it_cannot_read_is_refused(tmp_path):
    zarr = build_store(tmp_path / "zarr", StoreKind())
    with pytest.raises(UsageError, match=r"pipeline convert .* --format webdataset"):
        webdataset_pipeline(zarr.path)
    tars = build_store(tmp_path / "tars", KIND)
    with pytest.raises(UsageError, match="has the views"):
        webdataset_pipeline(tars.path, view="crop7")
    with pytest.raises(UsageError, match="not 'image'"):
        webdataset_pipeline(tars.path, view="flip", fields=("image",))


def test_a_damaged_row_stops_it_with_its_name(tmp_path):
    store = build_store(tmp_path / "store", KIND)
    offset = open_store(store.path).index.offsets("center/tokens")[store.valid_rows[3]]
    flip_bit(store.path / "center" / "00000.tar", 8 * int(offset) + 3)
    with pytest.raises(StoreDamagedError, match=r"row \d+ of center/tokens in center/00000.tar"):
        list(webdataset_pipeline(store.path))
