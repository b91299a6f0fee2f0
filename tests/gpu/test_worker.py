"""Encoding on CUDA devices: each waits for its own work, whichever device is the current one."""

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.cli import main
from shards.reading.store import open_store

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ENCODER = ["--encoder", "test_vit", "--weights", "random:0", "--input-size", "224", "--precision", "float32"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of 600 pictures."""
    root = tmp_path_factory.mktemp("source")
    for number in range(600):
        coarse = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((300, 260), Image.Resampling.BICUBIC).save(root / f"{number:03d}.png")
    return root


def tokens_of(source, store, devices):
    """All tokens of a store encoded on some devices, by row and view."""
    arguments = ["encode", str(source), "--out", str(store), "--shards", "8", "--devices", devices, *ENCODER]
    assert main(arguments) == 0
    opened = open_store(store)
    found = []
    for view in opened.views:
        reader = opened.reader(view, "tokens")
        out = np.empty((len(opened.valid_rows), *reader.row_shape), reader.dtype)
        reader.read(opened.valid_rows, out)
        found.append(out.astype(np.float32))
    return np.stack(found)


@pytest.mark.parametrize(
    "devices",
    [
        "cuda:0",
        pytest.param(
            "cuda:1", marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
        ),
        pytest.param(
            "cuda:0,cuda:1",
            marks=pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
        ),
    ],
)
def test_tokens_are_those_of_the_cpu_on_every_device(source, tmp_path, devices):
    np.testing.assert_allclose(
        tokens_of(source, tmp_path / "gpu", devices), tokens_of(source, tmp_path / "cpu", "cpu"), atol=2e-2
    )
