"""Sums by torch have the bits of shards' own, whether the writer or the encoder's device adds the rows up."""

import numpy as np
import pytest
import torch

from pipeline.encode import worker
from pipeline.encode.sums import DeviceSums, TorchSums, sums_for
from shards import open_store
from shards.values.dtypes import storage_type
from shards.values.moments import RowSums

SHAPE = (7, 5000)  # more than one tile


def rows_of(count):
    generator = np.random.default_rng(count)
    rows = generator.standard_normal((count, *SHAPE), np.float32) * 10.0 ** generator.uniform(-6, 3, SHAPE)
    return rows.astype(np.float16)


def fetch(sums):
    source, target = sums.copy_to_host
    target.copy_(source)


def bits(sums):
    moments = sums.moments()
    return moments.count, moments.mean.tobytes(), moments.m2.tobytes()


def by_numpy(rows):
    sums = RowSums(SHAPE, storage_type("float16"))
    sums.update(rows)
    return sums


@pytest.mark.parametrize("count", [0, 1, 9])
def test_sums_by_torch_have_the_bits_of_numpys(count):
    rows = rows_of(count)
    assert rows.size == 0 or (np.abs(rows[rows != 0]).min() < 6e-5 and np.abs(rows).max() > 1000)
    sums = TorchSums(SHAPE, torch.device("cpu"))
    for start in range(0, count, 4):
        sums.update(rows[start : start + 4])
    assert sums.finite
    assert bits(sums) == bits(by_numpy(rows))


@pytest.mark.parametrize("shape", [(32, 128), (2, 128), (1, 255), (1, 1), (64, 255)])
def test_sums_of_small_rows_have_the_bits_of_numpys_in_blocks_of_any_size(shape):
    generator = np.random.default_rng(0)
    rows = generator.standard_normal((130, *shape), np.float32) * 10.0 ** generator.uniform(-6, 3, shape)
    rows = rows.astype(np.float16)
    wanted, sums = RowSums(shape, storage_type("float16")), TorchSums(shape, torch.device("cpu"))
    wanted.update(rows)
    for start, end in ((0, 1), (1, 65), (65, 128), (128, 130)):
        sums.update(rows[start:end])
    assert bits(sums) == bits(wanted)
    rows[3, 0, 0], rows[4, 0, 0] = np.inf, -np.inf
    sums.update(rows)
    assert not sums.finite


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_sums_on_the_device_leave_out_unusable_rows(compiled):
    rows, good = rows_of(21), [0, 1, *range(4, 20)]  # one compiled call, and two rows more
    sums = DeviceSums(SHAPE, torch.device("cpu"), compiled=compiled)
    sums.add(torch.from_numpy(rows), good)
    sums.update(rows[good])
    fetch(sums)
    assert sums.finite
    assert bits(sums) == bits(by_numpy(rows[good]))


def test_rows_that_were_written_and_not_added_up_are_noticed():
    rows = rows_of(3)
    sums = DeviceSums(SHAPE, torch.device("cpu"))
    sums.add(torch.from_numpy(rows), [0, 1])
    sums.update(rows)
    fetch(sums)
    with pytest.raises(RuntimeError, match="3 rows were written and 2 added up"):
        sums.moments()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_infinity_and_nan_are_found(value):
    rows = rows_of(3)
    rows[1, 3, 4] = value
    on_device, on_host = DeviceSums(SHAPE, torch.device("cpu")), TorchSums(SHAPE, torch.device("cpu"))
    on_device.add(torch.from_numpy(rows), range(3))
    fetch(on_device)
    on_host.update(rows)
    assert not on_device.finite
    assert not on_host.finite


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_sums_on_a_gpu_have_the_bits_of_numpys(compiled):
    rows = rows_of(21)
    sums = DeviceSums(SHAPE, torch.device("cuda"), compiled=compiled)
    sums.add(torch.from_numpy(rows).cuda(), range(21))
    sums.update(rows)
    fetch(sums)
    torch.cuda.synchronize()
    assert bits(sums) == bits(by_numpy(rows))


def test_a_store_is_the_same_whoever_adds_its_tokens_up(folder, tmp_path, tiny, pipeline, monkeypatch):
    (folder / "class 0" / "00.png").write_bytes(b"no image")
    ways = {
        "numpy": lambda recipe, device: None,
        "torch": sums_for,
        "device": lambda recipe, device: DeviceSums(
            (recipe.encoder.num_tokens, recipe.encoder.width), device
        ),
    }
    found = {}
    for name, way in ways.items():
        monkeypatch.setattr(worker, "sums_for", way)
        arguments = ["encode", folder, "--out", tmp_path / name, "--shards", 2, "--batch-size", 4, *tiny]
        code, _, err = pipeline(*arguments)
        assert code == 0, err
        objects = open_store(tmp_path / name).manifest.objects
        found[name] = {o.path: o.digest for o in objects if not o.path.startswith("commits/")}
    assert any(path.startswith("stats/") for path in found["numpy"])
    assert found["numpy"] == found["torch"] == found["device"]
