"""`pipeline encode` to a server, killed at any moment and run again, and shared by several: the uninterrupted store."""

import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from shards.integrity.verify import verify_store
from shards.reading.store import open_store
from shards.storage.location import object_names

pytestmark = pytest.mark.slow


@pytest.fixture
def command(tmp_path, tiny):
    """The command that encodes 40 images into 8 shards of a store."""
    for number in range(40):
        path = tmp_path / "images" / f"class {number % 2}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(path)

    def build(out):
        arguments = [tmp_path / "images", "--out", out, "--shards", "8", "--batch-size", "4", *tiny]
        command = [sys.executable, "-m", "pipeline", "encode", *arguments, "--log-dir", tmp_path / "logs"]
        return [str(argument) for argument in command]

    return build


def written(store):
    """Digests of everything but times and places of the making."""
    objects = open_store(store).manifest.objects
    return {o.path: o.digest for o in objects if not o.path.startswith("commits/")}


def published(store):
    return len([name for name in object_names(store) if name.startswith("commits/")])


def test_an_encode_that_is_killed_again_and_again_ends_as_the_uninterrupted_one(s3, tmp_path, command):
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    moments = random.Random(0)
    kills = 0
    for commits in (0, 1, 4, 9, 13, 15):
        with subprocess.Popen(command(s3), stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and published(s3) <= commits:
                time.sleep(0.01)
            time.sleep(moments.random() / 20)
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 4
    done = subprocess.run(command(s3), text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "tester-secret" not in done.stderr
    assert verify_store(s3) == []
    assert written(s3) == written(tmp_path / "whole")


def test_several_encoders_at_once_make_one_store(s3, tmp_path, command):
    subprocess.run(command(tmp_path / "whole"), check=True, capture_output=True)
    encoders = [subprocess.Popen(command(s3), stderr=subprocess.PIPE) for _ in range(3)]
    errors = [encoder.communicate()[1].decode() for encoder in encoders]
    assert [encoder.returncode for encoder in encoders] == [0, 0, 0], errors
    assert verify_store(s3) == []
    assert written(s3) == written(tmp_path / "whole")
