"""Reading rows from servers that are slow, break off and come back, and what is asked of them."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from shards.errors import StoreDamagedError, StoreError, UsageError
from shards.integrity.verify import verify_store
from shards.metadata.layout import field_of
from shards.reading.loader import Loader
from shards.reading.store import open_store
from shards.storage import remote_calls as calls
from shards.storage.file_systems import forget_connections
from shards.storage.location import as_location, object_names
from shards.testing.contract import StoreKind, build_store, expected_row, same_bits

KIND = StoreKind(num_images=24, num_shards=3, bad={4: "bad"})
TARS = StoreKind(num_images=24, num_shards=3, format="webdataset")
SELDOM = [pytest.param(fault, marks=pytest.mark.slow) for fault in (500, "dropped", 0.2)]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(calls, "FIRST_PAUSE", 0.001)


def read(store, rows, view="center", field="tokens"):
    reader = store.reader(view, field, verify="always")
    out = np.zeros((len(rows), *reader.row_shape), reader.dtype)
    reader.read(rows, out)
    return out


def expected(store, rows, view="center", field="tokens"):
    return np.stack([expected_row(field_of(store.recipe, view, field), row) for row in rows])


@pytest.mark.parametrize("fault", [503, "truncated", *SELDOM], ids=str)
def test_s3_answers_that_fail_are_asked_for_again(s3, faulty_s3, fault):
    store = build_store(s3, KIND)
    read(store, [0])
    faulty_s3.faults.extend([fault] * 5)
    rows = [1, 9, 17, 23, 2, 11]
    assert same_bits(read(store, rows), expected(store, rows))
    assert not faulty_s3.faults


@pytest.mark.parametrize("fault", ["truncated", *SELDOM[:-1]], ids=str)
def test_a_server_that_never_answers_rightly_is_an_error_with_object_and_attempts(s3, faulty_s3, fault):
    store = build_store(s3, KIND)
    read(store, [0])
    faulty_s3.faults.extend([fault] * 100)
    with pytest.raises(
        StoreError, match=r"^reading s3://latents/\w+/center/tokens/c/2/0/0 failed 8 times, the last"
    ):
        read(store, [17])
    assert len(faulty_s3.faults) == 100 - calls.ATTEMPTS


@pytest.mark.slow
def test_a_server_that_is_stopped_in_the_middle_of_reading_and_started_again_is_read_on(
    s3_server, s3, monkeypatch
):
    store = build_store(s3, KIND)
    read(store, [0])
    monkeypatch.setattr(calls, "FIRST_PAUSE", 0.3)
    s3_server.stop()
    start = threading.Timer(0.5, s3_server.start)
    start.start()
    rows = store.valid_rows.tolist()
    assert same_bits(read(store, rows), expected(store, rows))
    start.join()


@pytest.mark.slow
def test_a_server_that_is_stopped_in_the_middle_of_writing_and_started_again_is_written_on(
    s3_server, s3, monkeypatch
):
    assert object_names(s3) == []
    monkeypatch.setattr(calls, "FIRST_PAUSE", 0.3)

    def interrupt():
        s3_server.stop()
        time.sleep(0.5)
        s3_server.start()

    interruption = threading.Timer(0.3, interrupt)
    interruption.start()
    build_store(s3, KIND)
    interruption.join()
    assert verify_store(s3) == []


def test_neighbours_are_one_request_and_nothing_beyond_a_quarter_is_asked_for(s3, faulty_s3):
    for kind in (KIND, TARS):
        store = build_store(s3 / kind.format, kind)
        nbytes = field_of(store.recipe, "center", "tokens").row_nbytes
        reader = store.reader("center", "tokens")
        out = np.zeros((6, *reader.row_shape), reader.dtype)
        reader.read([0, 8, 16], out)  # the indices of all shards
        faulty_s3.requests.clear()
        reader.read([3, 1, 2, 9, 22, 20], out)
        asked = sorted(last - first + 1 for _, first, last in faulty_s3.requests)
        # Rows 1 to 3 are side by side in a zarr shard; in a tar there are images between them.
        assert asked == ([nbytes] * 3 + [3 * nbytes] if kind is KIND else [nbytes] * 6)


def test_the_loader_asks_for_a_whole_batch_at_once_and_delivers_every_row(s3, faulty_s3):
    store = build_store(s3, KIND)
    settings = {"fields": ("tokens", "image"), "views": store.views, "seed": 1, "global_batch_size": 8}
    rows = []
    with Loader(store, **settings) as loader:
        for batch in loader:
            for index, (row, view) in enumerate(zip(batch.rows.tolist(), batch.views.tolist(), strict=True)):
                field = field_of(store.recipe, store.views[view], "tokens")
                assert same_bits(batch.arrays["tokens"][index], expected_row(field, row))
            rows += batch.rows.tolist()
            batch.release()
            if len(rows) > len(store.valid_rows):
                break
    assert set(rows) == set(store.valid_rows.tolist())


def test_a_store_behind_a_web_server_is_read_and_verified_and_not_written(tmp_path, web_server):
    written = build_store(tmp_path / "store", KIND)
    place = as_location(f"{web_server.url}/store")
    store = open_store(place)
    assert store.manifest.digest == written.manifest.digest
    rows = store.valid_rows.tolist()
    assert same_bits(read(store, rows, "flip"), expected(store, rows, "flip"))
    assert verify_store(place) == []
    with pytest.raises(UsageError, match="can only be read"):
        (place / "a").create(b"")
    with pytest.raises(UsageError, match="does not list what it has"):
        list(place.iterdir())
    (tmp_path / "store" / "index.parquet").unlink()
    with pytest.raises(StoreDamagedError, match=r"index\.parquet is missing"):
        open_store(place)


@pytest.mark.parametrize("fault", [503, "truncated", *SELDOM], ids=str)
def test_a_web_server_s_answers_that_fail_are_asked_for_again(tmp_path, web_server, fault):
    build_store(tmp_path / "store", KIND)
    store = open_store(f"{web_server.url}/store")
    read(store, [0])
    web_server.faults.extend([fault] * 3)
    assert same_bits(read(store, [1, 9]), expected(store, [1, 9]))


def test_a_web_server_that_knows_no_ranges_is_an_error(tmp_path, web_server):
    build_store(tmp_path / "store", KIND)
    store = open_store(f"{web_server.url}/store")
    read(store, [0])
    (tmp_path / "store/center/tokens/c/0/0/0").write_bytes(b"short")
    with pytest.raises(StoreError, match=r"c/0/0/0 failed 8 times"):
        read(store, [1])


def test_wrong_credentials_for_a_web_server_are_said_in_one_line(tmp_path, web_server):
    build_store(tmp_path / "store", KIND)
    web_server.faults.extend([403])
    with pytest.raises(UsageError, match="is refused"):
        open_store(f"{web_server.url}/store")
    forget_connections()
