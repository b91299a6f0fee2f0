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

    def build(out, *, extend=False):
        encode = ["encode", tmp_path / "images", "--out", out, "--shards", "8", *tiny]
        subcommand = ["extend", out, tmp_path / "more"] if extend else encode
        common = ["--batch-size", "4", "--log-dir", tmp_path / "logs"]
        return [str(argument) for argument in [sys.executable, "-m", "pipeline", *subcommand, *common]]

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


def test_a_store_on_a_server_that_is_extended_by_several_and_killed_on_the_way_ends_as_a_local_one(
    s3, tmp_path, command
):
    for number in range(40, 60):
        path = tmp_path / "more" / f"class {number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    for store in (tmp_path / "whole", s3):
        subprocess.run(command(store), check=True, capture_output=True)
    subprocess.run(command(tmp_path / "whole", extend=True), check=True, capture_output=True)
    before = open_store(s3)
    started = published(s3)
    kills = 0
    for commits in (0, 1, 4):
        with subprocess.Popen(command(s3, extend=True), stderr=subprocess.DEVNULL) as process:
            while process.poll() is None and published(s3) <= started + commits:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        kills += process.returncode == -signal.SIGKILL
        assert verify_store(s3) == []
    assert kills >= 2
    workers = [subprocess.Popen(command(s3, extend=True), stderr=subprocess.PIPE) for _ in range(2)]
    errors = [worker.communicate()[1].decode() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], errors
    assert verify_store(s3) == []
    assert written(s3) == written(tmp_path / "whole")
    after = open_store(s3)
    assert (after.recipe.num_images, after.recipe.num_shards) == (60, 12)
    assert after.as_known_by(before.id).valid_rows.tolist() == before.valid_rows.tolist()
