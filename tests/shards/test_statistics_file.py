"""Statistics are read from all three forms as torch reads them; what cannot be statistics is one line."""

from __future__ import annotations

import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shards import UsageError, read_statistics_file

SHAPE = (4, 2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_a_pt_file_is_read_as_torch_reads_it(tmp_path, dtype):
    mean, variance = torch.randn(SHAPE).to(dtype), torch.rand(SHAPE).to(dtype)
    torch.save({"mean": mean, "var": variance}, tmp_path / "stat.pt")
    found = read_statistics_file(tmp_path / "stat.pt")
    np.testing.assert_array_equal(found.mean, mean.double().numpy())
    np.testing.assert_array_equal(found.variance, variance.double().numpy())


def test_views_of_a_shared_storage_and_an_absent_mean_are_read(tmp_path):
    whole = torch.rand(2, 3, 4, 2)
    torch.save({"mean": None, "var": whole[1].permute(1, 2, 0)}, tmp_path / "stat.pt")
    found = read_statistics_file(tmp_path / "stat.pt")
    assert found.mean is None
    np.testing.assert_array_equal(found.variance, whole[1].permute(1, 2, 0).double().numpy())


def test_the_three_forms_hold_the_same(tmp_path):
    mean, variance = torch.randn(SHAPE), torch.rand(SHAPE)
    torch.save({"mean": mean, "var": variance}, tmp_path / "stat.pt")
    np.savez(tmp_path / "stat.npz", mean=mean.numpy(), var=variance.numpy())
    save_file({"mean": mean, "var": variance}, tmp_path / "stat.safetensors")
    one, two, three = (read_statistics_file(tmp_path / f"stat.{end}") for end in ("pt", "npz", "safetensors"))
    for other in (two, three):
        np.testing.assert_array_equal(one.mean, other.mean)
        np.testing.assert_array_equal(one.variance, other.variance)


class Named:
    """Pickles as a call of whatever it is given."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def archive_of(pickled, data=b"\0" * 16):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("stat/data.pkl", pickled)
        archive.writestr("stat/data/0", data)
    return buffer.getvalue()


class Pickler(pickle.Pickler):
    """Pickles storages by their persistent names, as torch does."""

    def persistent_id(self, value):
        return value.pid if isinstance(value, Storage) else None


class Storage:
    """A storage of float32."""

    def __init__(self, key="0", count=4, kind="storage"):
        self.pid = (kind, torch.FloatStorage, key, "cpu", count)


def tensor_file(path, shape, stride, offset=0, **storage):
    rebuild = torch._utils._rebuild_tensor_v2
    buffer = io.BytesIO()
    values = {"var": Named(rebuild, Storage(**storage), offset, shape, stride, False, None)}
    Pickler(buffer, protocol=2).dump(values)
    path.write_bytes(archive_of(buffer.getvalue()))


def test_the_hand_made_archive_is_read(tmp_path):
    tensor_file(tmp_path / "stat.pt", (1, 2, 2), (4, 2, 1))
    assert read_statistics_file(tmp_path / "stat.pt").variance.shape == (1, 2, 2)


@pytest.mark.parametrize(
    "forged",
    [
        {"shape": (1, 2, 3), "stride": (6, 3, 1)},
        {"shape": (1, 2, 2), "stride": (4, 2, 1), "offset": 1},
        {"shape": (1, 2, 2), "stride": (4, 3, 1)},
        {"shape": (1 << 40, 1 << 40, 1), "stride": (0, 0, 0)},
        {"shape": (1, -2, 2), "stride": (4, 2, 1)},
        {"shape": (1, 2, 2), "stride": (4, 2, 1), "offset": -1},
        {"shape": (1, 2, 2), "stride": (4, 2)},
        {"shape": (1, 2, 2), "stride": (4, 2, 1), "count": 1 << 60},
        {"shape": (1, 2, 2), "stride": (4, 2, 1), "key": "../elsewhere"},
        {"shape": (1, 2, 2), "stride": (4, 2, 1), "kind": "module"},
        {"shape": ("1", 2, 2), "stride": (4, 2, 1)},
    ],
    ids=str,
)
def test_a_tensor_that_does_not_lie_in_its_bytes_is_refused(tmp_path, forged):
    tensor_file(tmp_path / "stat.pt", **forged)
    with pytest.raises(UsageError, match=r"stat\.pt cannot be read as \.pt without running code") as refused:
        read_statistics_file(tmp_path / "stat.pt")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("function", [Path.touch, eval, pickle.loads, getattr, torch.load])
def test_a_pickle_that_names_a_function_is_refused_and_not_run(tmp_path, function):
    sprung = tmp_path / "sprung"
    torch.save({"var": Named(function, sprung)}, tmp_path / "stat.pt")
    with pytest.raises(UsageError, match="which is no array"):
        read_statistics_file(tmp_path / "stat.pt")
    assert not sprung.exists()


@pytest.mark.parametrize(
    "values",
    [
        {"var": torch.full(SHAPE, torch.nan)},
        {"var": -torch.ones(SHAPE)},
        {"var": torch.ones(SHAPE), "mean": torch.full(SHAPE, torch.inf)},
        {"var": torch.ones(SHAPE), "mean": torch.ones(3, 2, 3)},
        {"var": torch.ones(3)},
        {"mean": torch.ones(SHAPE)},
        {"var": "ones"},
        [torch.ones(SHAPE)],
    ],
    ids=["NaN", "negative", "infinite", "another shape", "one axis", "no variance", "text", "list"],
)
def test_what_cannot_be_statistics_is_refused_with_the_file(tmp_path, values):
    torch.save(values, tmp_path / "stat.pt")
    with pytest.raises(UsageError, match=r"stat\.pt") as refused:
        read_statistics_file(tmp_path / "stat.pt")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "content", [b"", b"no archive", b"PK\x03\x04 broken", archive_of(b""), archive_of(b"\x80")]
)
def test_a_broken_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "stat.pt").write_bytes(content)
    with pytest.raises(UsageError, match=r"stat\.pt"):
        read_statistics_file(tmp_path / "stat.pt")
