"""A store on a server keeps the contract, and says in one line what is wrong with a server."""

from __future__ import annotations

import pickle
import uuid

import numpy as np
import pytest

from shards.errors import StoreDamagedError, StoreError, UsageError
from shards.integrity.verify import verify_store
from shards.metadata.layout import field_of
from shards.reading.store import open_store
from shards.storage import remote_calls as calls
from shards.storage.file_systems import forget_connections
from shards.storage.location import Location, as_location, object_names
from shards.storage.remote_path import RemotePath
from shards.testing.contract import (
    ALL_KINDS,
    StoreContract,
    StoreKind,
    build_store,
    expected_row,
    flip_bit,
    make_plan,
    make_recipe,
    write_shard,
)
from shards.writing.store_writer import StoreWriter

FAST = StoreKind()
OTHERS = [kind for kind in ALL_KINDS if kind != FAST]


class TestOnS3(StoreContract):
    @pytest.fixture(
        scope="class", params=[FAST, *(pytest.param(k, marks=pytest.mark.slow) for k in OTHERS)], ids=str
    )
    @classmethod
    def kind(cls, request: pytest.FixtureRequest) -> StoreKind:
        kind: StoreKind = request.param
        return kind

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, s3_environment: None) -> Location:
        return as_location(f"s3://latents/{uuid.uuid4().hex}")


class TestInMemory(StoreContract):
    """Another file system of fsspec's, whose calls are not asynchronous."""

    @pytest.fixture(scope="class")
    @classmethod
    def kind(cls) -> StoreKind:
        return StoreKind(dtype="int8")

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls) -> Location:
        return as_location(f"memory://{uuid.uuid4().hex}")


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(calls, "FIRST_PAUSE", 0.001)


def test_of_two_that_create_an_object_the_first_wins(s3):
    assert (s3 / "a").create(b"first")
    assert not (s3 / "a").create(b"second")
    assert (s3 / "a").read_bytes() == b"first"
    s3.require_first_creation_wins()
    assert object_names(s3) == ["a"]


def test_damage_is_found_with_its_row(s3):
    kind = StoreKind(num_images=5, num_shards=2, views=("center",))
    store = build_store(s3, kind)
    record = next(o for o in store.manifest.objects if o.path.startswith("center/tokens/c/1"))
    flip_bit(s3 / record.path, 3)
    problems = verify_store(s3)
    assert [(p.path, p.row) for p in problems] == [(record.path, 3)]
    with pytest.raises(
        StoreDamagedError, match=r"row 3 of shard 1 of center/tokens .s3://latents/.*fails its checksum"
    ):
        open_store(s3).reader("center", "tokens").read([3], np.zeros((1, 6, 5), np.float16))
    (s3 / record.path).unlink()
    with pytest.raises(StoreDamagedError, match=f"{record.path} is missing"):
        open_store(s3)


def test_a_path_of_a_server_is_sent_to_other_processes_by_its_name(s3):
    assert pickle.loads(pickle.dumps(s3)) == s3
    assert str(s3 / "a" / "b").endswith("/a/b")
    assert (s3 / "a").parent == s3


def test_wrong_credentials_are_said_in_one_line(s3, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    forget_connections()
    for call in (lambda: open_store(s3), lambda: (s3 / "a").create(b""), lambda: object_names(s3)):
        with pytest.raises(UsageError, match=r"is refused: .*credentials in the environment") as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message
        assert not any(secret in message for secret in ("wrong-secret", "tester-key-id"))


def test_no_credentials_are_said_in_one_line(s3, monkeypatch, tmp_path):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    forget_connections()
    with pytest.raises(
        UsageError, match=r"zarr.json needs credentials, and there are none .*AWS_ACCESS_KEY_ID"
    ):
        open_store(s3)


def test_a_missing_bucket_is_said_in_one_line(s3):
    missing = as_location("s3://no-such-bucket/store")
    with pytest.raises(UsageError, match=r"reading s3://no-such-bucket/.* the bucket does not exist"):
        open_store(missing)
    with pytest.raises(UsageError, match="the bucket does not exist"):
        (missing / "a").create(b"")


def test_a_missing_store_is_said_in_one_line(s3):
    with pytest.raises(UsageError, match=r"^s3://latents/\w+ is not a store: it has no zarr.json"):
        open_store(s3)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("nothing://bucket/store", "nothing:// is not a scheme that fsspec knows; use s3://"),
        ("s3://key:secret@bucket/store", "s3:// URL must hold no credentials"),
        ("https://host/store?token=secret", "https:// URL must hold no credentials"),
        ("https://host/store#token=secret", "https:// URL must hold no credentials"),
        ("https://host/store;sig=secret", "https:// URL must hold no credentials"),
        ("https://host/store%3Fsig%3Dsecret", "https:// URL must hold no credentials"),
        ("s3://bucket/user:secret@host/store", "s3:// URL must hold no credentials"),
        ("s3://bucket/store?X-Amz-Signature=secret", "s3:// URL must hold no credentials"),
        ("s3://bucket/store?versionId=1&X-Amz-Security-Token=secret", "s3:// URL must hold no credentials"),
        ("adl://account/store", "adl:// needs a library that is not installed"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url, message):
    with pytest.raises(UsageError, match=message) as caught:
        as_location(url)
    assert "secret" not in str(caught.value)


def test_a_server_that_is_away_is_an_error_that_names_object_and_attempts(s3, monkeypatch, impatient):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    forget_connections()
    with pytest.raises(
        StoreError, match=r"reading s3://latents/\w+/zarr.json failed 8 times, the last time with"
    ):
        open_store(s3)


def test_a_file_system_that_may_show_half_an_object_is_not_written(tmp_path):
    place = RemotePath("local", str(tmp_path / "store"))
    with pytest.raises(UsageError, match="can only be read: local is not known to create an object whole"):
        (place / "a").create(b"")


def test_a_server_that_lets_a_second_object_replace_the_first_is_not_written(monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    write = MemoryFileSystem.pipe_file
    monkeypatch.setattr(
        MemoryFileSystem, "pipe_file", lambda self, path, value, mode="overwrite": write(self, path, value)
    )
    place = as_location(f"memory://{uuid.uuid4().hex}")
    with pytest.raises(UsageError, match=r"its server ignores\s+If-None-Match"):
        build_store(place, FAST)
    assert object_names(place) == []


def test_other_things_in_a_folder_of_a_server_are_left_alone(s3):
    (s3 / "thesis.pdf").create(b"")
    with pytest.raises(UsageError, match="holds other things"):
        build_store(s3, FAST)


def test_only_what_is_pending_is_written_by_who_continues(s3):
    plan = make_plan(FAST)
    first = StoreWriter.create_or_continue(s3, make_recipe(FAST, plan), plan)
    write_shard(first, "center", 2)
    again = StoreWriter.create_or_continue(s3, make_recipe(FAST, plan), plan)
    assert ("center", 2) not in again.pending()
    assert len(again.pending()) == 2 * FAST.num_shards - 1
    for view, shard in again.pending():
        write_shard(again, view, shard)
    again.finalize()
    store = open_store(s3)
    out = np.zeros((1, 6, 5), np.float16)
    store.reader("flip", "tokens").read([3], out)
    assert (out[0] == expected_row(field_of(store.recipe, "flip", "tokens"), 3)).all()
