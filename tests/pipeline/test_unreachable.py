"""A server that does not answer says nothing of the store: it is unreachable, not damaged, and the command ends."""

from __future__ import annotations

import socket
import struct
import threading
import time
from contextlib import suppress

import pytest

from shards import RemoteError, open_store, verify_store
from shards.storage import file_systems
from shards.storage import remote_calls as calls
from shards.storage.file_systems import forget_connections
from shards.testing.contract import StoreKind, build_store
from train.dit import main as train_dit

KINDS = (
    StoreKind(num_images=6, num_shards=2, views=("center",)),
    StoreKind(num_images=6, num_shards=2, views=("center",), format="webdataset"),
)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    monkeypatch.setattr(calls, "ATTEMPTS", 2)
    monkeypatch.setattr(calls, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(file_systems, "CONNECT_SECONDS", 0.05)
    monkeypatch.setattr(file_systems, "READ_SECONDS", 0.05)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester-key-id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tester-secret")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    forget_connections()
    yield
    forget_connections()


@pytest.fixture(params=["silent", "resetting"])
def unanswering(request):
    """The port of a server that accepts every connection, and then says nothing or resets it."""
    kept = []

    def serve(listening):
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            if request.param == "silent":
                kept.append(connection)
            else:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.close()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=serve, args=(listening,), daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()


@pytest.fixture(params=["s3", "http"])
def address(request, unanswering, monkeypatch):
    """A store on that server."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{unanswering}")
    return "s3://bucket/store" if request.param == "s3" else f"http://127.0.0.1:{unanswering}/store"


def test_a_server_that_does_not_answer_is_unreachable(address, pipeline, tmp_path):
    encode = ("encode", address, "--out", tmp_path / "out", "--shards", 1, "--encoder", "test_vit")
    for command in (
        ("verify", address),
        ("verify", address, "--withdraw"),
        ("inspect", address),
        (*encode, "--weights", "random:0"),
    ):
        began = time.monotonic()
        code, _, err = pipeline(*command)
        last = err.splitlines()[-1]
        assert code == 1, command
        assert last.startswith("error: "), command
        assert "failed 2 times" in last
        assert "the server is unreachable or faulty" in last
        assert "damaged" not in err
        assert "--withdraw" not in err
        assert "Traceback" not in err
        assert time.monotonic() - began < 30
    with pytest.raises(RemoteError, match="unreachable"):
        train_dit(["dit-tiny", "--store", address, "--out", str(tmp_path / "run"), "--max-steps", "1"])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_server_that_goes_away_meanwhile_is_unreachable_at_every_moment(tmp_path, web_server, kind, step):
    build_store(tmp_path / "store", kind)
    address = f"{web_server.url}/store"
    for read in (lambda: verify_store(address) == [], lambda: open_store(address).statistics().mean.size):
        for answers in range(0, 400, step):
            web_server.answers_left = answers
            with suppress(RemoteError):
                assert read()
                break
        assert 5 < answers < 399
