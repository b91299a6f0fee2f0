"""Arrays of .npz files from outside: what they claim is compared with what is there, before it is allocated."""

from __future__ import annotations

import io
import zipfile
from contextlib import suppress

import numpy as np
import pytest

from eval.images import npz
from eval.images.samples import map_samples
from eval.metrics.reference_file import holds_statistics, read_statistics
from shards import UserError

SAMPLES = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)


def header(shape, descr="|u1"):
    text = io.BytesIO()
    np.lib.format.write_array_header_1_0(text, {"descr": descr, "fortran_order": False, "shape": shape})
    return text.getvalue()


def write(path, compression=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def array(values):
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("values", [SAMPLES, np.asfortranarray(SAMPLES)], ids=["C", "F"])
def test_samples_are_read_as_they_were_written(tmp_path, compression, values):
    path = write(tmp_path / "samples.npz", compression, arr_0=array(values))
    assert np.array_equal(map_samples(path), SAMPLES)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "content",
    [
        header((10**6, 10**6, 10**6, 3)) + bytes(100),
        header((2**63, 2**63, 1, 3)) + bytes(100),
        header((-1, 4, 4, 3)) + bytes(100),
        header((2, 4, 4, 3), "|O") + bytes(96),
        b"\x93NUMPY\x09\x00" + bytes(100),
        b"no array",
        b"",
    ],
)
def test_an_array_that_is_not_what_its_header_says_is_one_line(tmp_path, compression, content):
    path = write(tmp_path / "samples.npz", compression, arr_0=content)
    with pytest.raises(UserError, match=r"samples.npz is not a whole .npz") as refused:
        map_samples(path)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500


@pytest.mark.parametrize("name", ["arr_0", "mu"])
def test_every_flipped_or_missing_byte_is_noticed_or_harmless(tmp_path, name):
    """Of what stands around the arrays' bytes; samples have no checksum that is compared."""
    gaussian = {"mu": np.zeros(3), "sigma": np.eye(3)}
    content = {
        key: array(values) for key, values in (gaussian if name == "mu" else {"arr_0": SAMPLES}).items()
    }
    whole = write(tmp_path / "whole.npz", **content).read_bytes()
    path = tmp_path / "samples.npz"
    refused = 0
    for number in range(len(whole)):
        for spoiled in (whole[:number], whole[:number] + bytes([whole[number] ^ 255]) + whole[number + 1 :]):
            path.write_bytes(spoiled)
            with suppress(UserError):
                if name == "mu":
                    holds_statistics(path)
                    read_statistics(path, {"pool"})
                else:
                    map_samples(path)
                continue
            refused += 1
    assert refused > len(whole)


def test_an_array_that_unfolds_beyond_the_limit_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(npz, "LARGEST_ARRAY", 1000)
    path = write(tmp_path / "samples.npz", zipfile.ZIP_DEFLATED, arr_0=header((99, 4, 4, 3)) + bytes(99 * 48))
    with pytest.raises(UserError, match="4,752 bytes, and is read up to 1,000"):
        map_samples(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": np.array([0.0, np.nan, 0.0])}, "mu holds what is no finite number"),
        ({"sigma": np.eye(2)}, r"must be \[n\] and \[n, n\]"),
        ({"sigma": -np.eye(3)}, "a negative variance"),
        ({"mu": np.array(["a", "b", "c"])}, "no finite number"),
        ({"count": np.arange(3)}, "must be a single value"),
        ({"network": np.array(3)}, "must be a single value"),
        ({"manifold": np.zeros(3, np.float32)}, "width"),
    ],
)
def test_statistics_that_are_none_are_refused_where_they_are_read(tmp_path, change, message):
    whole = {
        "mu": np.zeros(3),
        "sigma": np.eye(3),
        "manifold": np.zeros((4, 3), np.float32),
        "network": np.array("0" * 64),
        "kind": np.array("folder"),
        "count": np.array(4),
    }
    np.savez(tmp_path / "whole.npz", **whole)
    assert read_statistics(tmp_path / "whole.npz", {"pool"}).count == 4
    np.savez(tmp_path / "spoiled.npz", **{**whole, **change})
    with pytest.raises(UserError, match=message):
        read_statistics(tmp_path / "spoiled.npz", {"pool"})


def test_what_is_no_file_is_not_read(tmp_path):
    (tmp_path / "endless.npz").symlink_to("/dev/zero")
    with (
        pytest.raises(UserError, match=r"there is no file .*endless\.npz"),
        npz.open_npz(tmp_path / "endless.npz"),
    ):
        pass
