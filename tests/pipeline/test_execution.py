"""How the encoder is run is chosen when a store is begun, recorded, and kept by whoever continues it."""

import dataclasses
import json

import pytest
import torch

from pipeline.cli import parse
from pipeline.encode.execution import choose_execution, compiling_repays, execution_of, fastest_batch
from pipeline.encode.limits import Limits
from shards import Execution, StoreWriter, UserError, open_store
from shards.errors import StoreDamagedError
from shards.metadata.identity import Recipe


def recipe_of(path):
    return StoreWriter.open(path).recipe


def test_a_store_names_the_batch_and_whether_the_encoder_was_compiled(folder, tmp_path, tiny, pipeline):
    for name, more, expected in (("one", (), 64), ("other", ("--batch-size", 3), 3)):
        code, _, err = pipeline("encode", folder, "--out", tmp_path / name, "--shards", 2, *tiny, *more)
        assert code == 0, err
        assert recipe_of(tmp_path / name).execution == Execution(batch_size=expected, compiled=False)
    assert recipe_of(tmp_path / "one").id == recipe_of(tmp_path / "other").id


def test_whoever_continues_keeps_it_and_cannot_change_it(folder, tmp_path, tiny, pipeline):
    out = tmp_path / "store"
    arguments = ("encode", folder, "--out", out, "--shards", 2, *tiny)
    assert pipeline(*arguments, "--batch-size", 3)[0] == 0
    whole = open_store(out).manifest
    (out / "manifest.json").unlink()
    for name in ("center/tokens/c/1/0/0", "commits/center/00001.json"):
        (out / name).unlink()
    code, _, err = pipeline(*arguments, "--batch-size", 4)
    assert code == 2
    assert "begun with --batch-size 3, not 4" in err
    code, _, err = pipeline(*arguments, "--compile", "on")
    assert code == 2
    assert "begun with --compile off, not on" in err
    code, _, err = pipeline(*arguments)
    assert code == 0, err
    objects = {o.path: o.digest for o in open_store(out).manifest.objects}
    assert objects == {o.path: objects[o.path] if "commits" in o.path else o.digest for o in whole.objects}


def test_a_store_that_recorded_nothing_is_continued_as_each_command_says(folder, tmp_path, tiny, pipeline):
    out = tmp_path / "store"
    arguments = ("encode", folder, "--out", out, "--shards", 2, *tiny)
    assert pipeline(*arguments)[0] == 0
    plan = StoreWriter.open(out).plan
    recipe = dataclasses.replace(recipe_of(out), execution=None)
    older = StoreWriter.create_or_continue(tmp_path / "older", recipe, plan)
    continued = ("encode", folder, "--out", older.path, "--shards", 2, *tiny, "--batch-size", 5)
    code, _, err = pipeline(*continued)
    assert code == 0, err
    assert recipe_of(older.path).execution is None
    config = parse([str(argument) for argument in continued])
    assert execution_of(recipe, config) == Execution(batch_size=5, compiled=False)
    assert choose_execution(config, recipe, None) is None


def test_the_batch_is_the_smallest_that_is_as_fast_as_the_device_gets():
    rates = {64: 5070.0, 128: 5400.0, 256: 5550.0, 512: 5560.0}
    assert fastest_batch(rates, rates.__getitem__) == (256, 5550.0)
    assert fastest_batch(rates, {64: 100.0, 128: None}.__getitem__) == (64, 100.0)
    with pytest.raises(UserError, match="smaller --batch-size"):
        fastest_batch(rates, lambda size: None)


def test_compiling_is_for_runs_that_it_makes_shorter():
    repaid, line = compiling_repays(2_560_000, 5550.0, 1)
    assert repaid
    assert line.startswith("the encoder is compiled: 2,560,000 images take 461 s without")
    repaid, line = compiling_repays(2_560_000, 5550.0, 8)
    assert not repaid
    assert "the encoder is not compiled" in line


def test_a_worker_without_a_compiler_gives_up_in_one_line(folder, tmp_path, tiny, pipeline, monkeypatch):
    def refuse(*inputs):
        raise RuntimeError("Failed to find C compiler.\nMore lines.")

    monkeypatch.setattr(torch, "compile", lambda network: refuse)
    arguments = ("encode", folder, "--out", tmp_path / "store", "--shards", 2, "--batch-size", 4, *tiny)
    code, _, err = pipeline(*arguments, "--compile", "on")
    assert code == 1
    (line,) = [line for line in err.splitlines() if "cannot encode" in line]
    assert "cannot encode 4 images at once, compiled, as" in line
    assert "Failed to find C compiler.; leave this device out" in line
    assert "--compile off" in line


@pytest.mark.parametrize(
    "values", [{"batch_size": 0, "compiled": False}, {"batch_size": 1}, {"batch_size": 1, "compiled": 1}]
)
def test_a_recipe_with_a_damaged_execution_is_refused(folder, tmp_path, tiny, pipeline, values):
    assert pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny)[0] == 0
    recipe = recipe_of(tmp_path / "store").to_dict()
    with pytest.raises(StoreDamagedError):
        Recipe.from_dict({**recipe, "execution": values})


def test_the_limit_is_the_slowest_stage_and_the_disk_where_it_takes_most_of_the_writers_time():
    assert Limits.of_busy(0, {}).limit is None
    limits = Limits.of_busy(100, {"decode": 10.0, "device": 20.0, "writer": 5.0, "disk": 4.0})
    assert str(limits) == "limit: device (images/s each could reach: decode 10, device 5, writer 20, disk 25)"
    assert Limits.of_busy(100, {"read": 10.0, "device": 5.0}).limit == "read"  # of a derived field
    assert Limits.of_busy(100, {"decode": 1.0, "device": 2.0, "writer": 5.0, "disk": 4.0}).limit == "disk"
    assert Limits.of_busy(100, {"decode": 1.0, "device": 2.0, "writer": 5.0, "disk": 1.0}).limit == "writer"


def test_the_log_says_what_each_batch_took(folder, tmp_path, tiny, pipeline):
    out = tmp_path / "store"
    assert pipeline("encode", folder, "--out", out, "--shards", 2, *tiny)[0] == 0
    lines = [
        json.loads(line) for line in (tmp_path / "store.logs" / "progress.jsonl").read_text().splitlines()
    ]
    written = [line for line in lines if line["event"] == "BatchWritten"]
    assert len(written) == 4
    assert all(
        0 < line["disk_seconds"] < line["write_seconds"] and line["device_seconds"] > 0 for line in written
    )


def test_the_page_of_a_store_shows_what_limited_its_encode(folder, tmp_path, tiny, pipeline):
    out = tmp_path / "store"
    assert pipeline("encode", folder, "--out", out, "--shards", 2, *tiny)[0] == 0
    assert pipeline("report", out)[0] == 0
    assert "What limited the encode" not in (tmp_path / "store.html").read_text()
    with (tmp_path / "store.logs" / "progress.jsonl").open("a") as log:
        for second, device in ((0, 50.0), (10, 60.0), (20, 900.0)):
            rates = {"decode": 100.0, "device": device, "writer": 500.0}
            log.write(
                json.dumps({"time": second, "event": "Limits", "limit": "?", "images_per_second": rates})
                + "\n"
            )
        log.write('{"time": 30, "event": "Limits", "limit": "dec')
    assert pipeline("report", out)[0] == 0
    assert "By time: decode 33%, device 67%." in (tmp_path / "store.html").read_text()
