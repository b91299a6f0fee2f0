"""int8 from end to end: the code is fitted first, kept, measured, and refused where it is not good enough."""

import json
import re

import numpy as np
import pytest
import torch

from pipeline.encode.tokens import TokenStorage
from shards.errors import UserError
from shards.reading.store import open_store
from shards.values.code_error import Calibration, fit_and_judge
from shards.values.quantize import fit_code


@pytest.fixture
def encode(pipeline, folder, tiny):
    """Encodes the folder: `encode(out, *arguments)`."""

    def run(out, *arguments):
        return pipeline("encode", folder, "--out", out, "--shards", 3, *tiny, *arguments)

    return run


def test_an_int8_store_holds_the_float_stores_tokens_within_its_stated_error(encode, tmp_path, pipeline):
    assert encode(tmp_path / "exact", "--dtype", "float32")[0] == 0
    code, _, messages = encode(tmp_path / "int8", "--dtype", "int8")
    assert code == 0, messages
    assert "calibrating int8 on 21 images" in messages
    assert "in view flip" in messages
    exact, int8 = open_store(tmp_path / "exact"), open_store(tmp_path / "int8")
    for view in int8.views:
        stored = [store.reader(view, "tokens") for store in (exact, int8)]
        values = [np.empty((21, *reader.row_shape), reader.dtype) for reader in stored]
        for reader, out in zip(stored, values, strict=True):
            reader.read(int8.valid_rows, out)
        lost = int8.decode(values[1]).astype(np.float64) - values[0]
        expected = np.sqrt(np.square(lost).mean((0, 1))) / int8.decode(values[1]).astype(np.float64).std(
            (0, 1)
        )
        np.testing.assert_allclose(int8.code_error(view), expected, rtol=1e-6)
        assert expected.max() < 0.02
    _, text, _ = pipeline("inspect", tmp_path / "int8")
    assert "int8 error flip:" in text
    _, facts, _ = pipeline("inspect", tmp_path / "int8", "--json")
    largest = json.loads(facts)["int8_error"]["center"]["largest"]
    assert largest == int8.code_error("center").max()


def test_statistics_are_of_the_decoded_numbers(encode, tmp_path):
    assert encode(tmp_path / "int8", "--dtype", "int8")[0] == 0
    store = open_store(tmp_path / "int8")
    reader = store.reader("center", "tokens")
    codes = np.empty((21, *reader.row_shape), reader.dtype)
    reader.read(store.valid_rows, codes)
    numbers = store.decode(codes).astype(np.float64).reshape(21, *store.grid, -1).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(store.statistics(["center"]).mean, numbers.mean(0), atol=1e-12)
    np.testing.assert_allclose(store.statistics(["center"]).variance, numbers.var(0), rtol=1e-9)


def test_encoding_twice_gives_the_same_code_and_the_same_rows(encode, tmp_path):
    stores = []
    for name, batch_size in (("one", 64), ("two", 2)):
        assert (
            encode(tmp_path / name, "--dtype", "int8", "--views", "center", "--batch-size", batch_size)[0]
            == 0
        )
        stores.append(open_store(tmp_path / name))
    first, second = stores
    # The encoder's own sums may differ in the last bit between batch sizes, and with them a level.
    np.testing.assert_allclose(first.code.table[:, 1:], second.code.table[:, 1:], atol=1e-3)
    assert encode(tmp_path / "three", "--dtype", "int8", "--views", "center")[0] == 0
    third = open_store(tmp_path / "three")
    assert third.recipe.id == first.recipe.id
    assert third.manifest.by_path["code/table/c/0/0"] == first.manifest.by_path["code/table/c/0/0"]
    tokens = [path for path in first.manifest.by_path if path.startswith(("center/", "stats/"))]
    assert all(third.manifest.by_path[path] == first.manifest.by_path[path] for path in tokens)


def test_a_continued_encode_writes_with_the_code_it_was_begun_with(encode, tmp_path):
    out = tmp_path / "int8"
    assert encode(out, "--dtype", "int8")[0] == 0
    code = open_store(out).code.digest
    rows = (out / "center/tokens/c/1/0/0").read_bytes()
    for path in (
        "manifest.json",
        "commits/center/00001.json",
        "center/tokens/c/1/0/0",
        "center/image/c/1/0/0/0",
    ):
        (out / path).unlink()
    status, _, messages = encode(out, "--dtype", "int8")
    assert status == 0, messages
    assert "calibrating" not in messages
    assert open_store(out).code.digest == code
    assert (out / "center/tokens/c/1/0/0").read_bytes() == rows


def test_a_channel_that_cannot_make_it_stops_encode_before_the_first_shard(encode, tmp_path):
    status, _, messages = encode(tmp_path / "int8", "--dtype", "int8", "--allow-error", "0.0001")
    assert status == 1
    last = messages.splitlines()[-1]
    assert last.startswith("error: int8 costs")
    assert "--allow-error" in last
    assert "--dtype" in last
    assert not (tmp_path / "int8").exists()


def test_more_lost_than_calibration_promised_is_an_error_that_keeps_the_store(encode, tmp_path, pipeline):
    out = tmp_path / "int8"
    # A code fitted to one image and judged on it promises too much of the others.
    arguments = (out, "--dtype", "int8", "--calibration-rows", "1")
    status, _, messages = encode(*arguments, "--allow-error", "0.5")
    assert status == 1
    last = messages.splitlines()[-1]
    assert re.match(
        r"error: int8 costs \d+ of \d+ channels more than 50 % .* on the rows of view center: ", last
    )
    assert f"which keeps {out} as it is" in last
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    assert open_store(out).code_error("center").max() > 0.5
    assert encode(*arguments, "--allow-error", "0.5")[0] == 1
    assert encode(*arguments, "--allow-error", "100")[0] == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    assert pipeline("verify", out)[0] == 0


def test_converting_to_int8_keeps_the_same_limit(encode, tmp_path, pipeline):
    assert encode(tmp_path / "exact", "--dtype", "float32")[0] == 0
    convert = (
        "convert",
        tmp_path / "exact",
        "--out",
        tmp_path / "int8",
        "--format",
        "zarr",
        "--dtype",
        "int8",
    )
    assert pipeline(*convert, "--allow-error", "0.9")[0] == 0
    status, _, messages = pipeline(*convert, "--allow-error", "0.0001")
    assert status == 1
    assert "on the rows of view center" in messages.splitlines()[-1]
    assert open_store(tmp_path / "int8").code is not None


def test_the_refusal_names_the_worst_channels_first_and_an_error_that_would_do():
    calibration = Calibration(fit_code(np.arange(12.0).reshape(4, 3)), np.array([0.0301, 0.01, 0.04567]))
    with pytest.raises(
        UserError, match=r"2 of 3 channels .* 2 %.*: 2 \(4.57 %\), 0 \(3.01 %\); .*error 0.0457,"
    ):
        calibration.require(0.02)
    calibration.require(0.0457)


def test_a_channel_whose_error_is_not_a_number_is_refused():
    calibration = Calibration(fit_code(np.arange(8.0).reshape(4, 2)), np.array([0.001, np.nan]))
    with pytest.raises(UserError, match="1 of 2 channels"):
        calibration.require(0.02)


def test_the_error_is_judged_on_images_that_were_not_fitted():
    samples = np.random.default_rng(0).standard_normal((40, 50, 2)).astype(np.float32)
    samples[1::2, :, 1] *= 100
    error = fit_and_judge(samples).error
    assert error[0] < 0.01
    assert error[1] > 0.2


@pytest.mark.parametrize(
    "settings", [["--calibration-rows", "0"], ["--code-error", "1"], ["--allow-error", "0"]]
)
def test_settings_that_make_no_sense_are_wrong_usage(encode, tmp_path, settings):
    status, _, messages = encode(tmp_path / "int8", "--dtype", "int8", *settings)
    assert status == 2
    assert settings[0] in messages


def test_torch_codes_as_numpy_does():
    scale = 10.0 ** np.linspace(-1, 0.5, 24)
    tokens = (np.random.default_rng(0).standard_normal((5, 16, 24)) * scale + scale).astype(np.float32)
    code = fit_code(tokens.reshape(-1, 24))
    storage = TokenStorage("int8", code)
    on_host, on_device = storage(torch.from_numpy(tokens)), storage.code_on_device(torch.from_numpy(tokens))
    assert torch.equal(on_host.values, on_device.values)
    torch.testing.assert_close(on_host.square_error, on_device.square_error, rtol=1e-12, atol=0)
    assert torch.equal(on_host.values, torch.from_numpy(code.encode(tokens)))
