"""Training from a server is training from a disk, also when it is killed and continued."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "train" / "dit.py"
EXACT = "--checkpoint-every 2 --snapshot-every 100 --max-steps 12"

pytestmark = pytest.mark.slow


def test_a_killed_and_continued_run_from_a_server_is_the_run_from_a_disk(
    s3, tmp_path, make_store, arguments, train_here, checkpoint_tensors, losses
):
    make_store(s3)
    assert train_here("dit", tmp_path / "whole", EXACT) == 0
    more = f"{EXACT} --cache {tmp_path / 'cache'} --cache-bytes 1000000"
    command = [sys.executable, str(SCRIPT), *arguments("dit", tmp_path / "killed", more, store=s3)]
    with subprocess.Popen(command) as process:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "killed").glob("checkpoints/*")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    one, other = checkpoint_tensors(tmp_path / "killed"), checkpoint_tensors(tmp_path / "whole")
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    # Credentials are in no file of the run and in nothing that it said.
    texts = [path.read_bytes() for path in (tmp_path / "killed").rglob("*") if path.is_file()]
    assert not any(
        b"tester-secret" in text or b"tester-key-id" in text for text in [*texts, done.stderr.encode()]
    )
    assert (tmp_path / "cache").exists()
