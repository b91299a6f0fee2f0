"""The memory of `pipeline encode` is a few batches, whatever the size of a shard and the number of images."""

import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from shards.reading.store import open_store

COUNT = 600
SIDE = 256


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of small photographs; their crops are 196,608 bytes each."""
    root = tmp_path_factory.mktemp("source")
    for number in range(COUNT):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((50, 40), Image.Resampling.BICUBIC).save(root / f"{number:03d}.png")
    return root


def peak_bytes(source, store, shards, encoder):
    """Peak resident memory of an encode."""
    command = [sys.executable, "-m", "pipeline", "encode", str(source), "--out", str(store)]
    command += [
        "--shards",
        str(shards),
        "--image-size",
        str(SIDE),
        "--batch-size",
        "8",
        "--views",
        "center,crop:1",
    ]
    command += encoder
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_the_shards(source, tiny, tmp_path):
    small, large = (peak_bytes(source, tmp_path / str(shards), shards, tiny) for shards in (40, 1))
    store = open_store(tmp_path / "1")
    shard = max(record.nbytes for record in store.manifest.objects)
    assert shard > 100e6
    assert large - small < 0.25 * shard, (small, large, shard)
