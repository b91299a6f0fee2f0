"""A worker under failures of the device, and what it promises about batches."""

import json
import queue
import shutil
import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.cli import parse
from pipeline.encode import job, worker
from pipeline.encode.claims import Claims
from pipeline.encode.decoding import batch_length
from pipeline.encode.job import WorkerSpec, run_worker
from pipeline.encode.progress import Progress, ShardFailed
from pipeline.encoders.frozen import Encoder
from pipeline.engines.local import follow
from shards.errors import UserError
from shards.formats import object_path
from shards.metadata.layout import commit_path, field_of
from shards.reading.store import open_store


@pytest.fixture
def failing(monkeypatch):
    """Makes the encoder fail as a device does, for the given calls, counted from 1."""

    def fail(calls):
        seen = iter(range(1, 10_000))
        working = Encoder.encode_all

        def encode_all(self, pixels, *rest, **more):
            if next(seen) in calls:
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return working(self, pixels, *rest, **more)

        monkeypatch.setattr(Encoder, "encode_all", encode_all)

    return fail


def test_a_shard_that_fails_once_is_tried_again(folder, tmp_path, tiny, pipeline, failing):
    failing({3})
    code, _, err = pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 5, *tiny)
    assert code == 0, err
    assert "failed on worker 0 (cpu): RuntimeError: CUDA error" in err
    assert len(open_store(tmp_path / "store").valid_rows) == 21
    records = [
        json.loads(path.read_bytes()) for path in (tmp_path / "store" / "commits" / "center").iterdir()
    ]
    assert sorted(record["attempts"] for record in records) == [1, 1, 1, 1, 2]


def test_a_worker_with_which_everything_fails_gives_up_and_leaves_the_attempts_to_others(
    folder, tmp_path, tiny, pipeline, monkeypatch
):
    arguments = ("encode", folder, "--out", tmp_path / "store", "--shards", 10, *tiny)
    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "encode_all", _out_of_memory)
        code, _, err = pipeline(*arguments)
    assert code == 1
    assert "worker 0 (cpu) gives up: 5 shards have failed here one after another" in err
    assert "RuntimeError: CUDA error: out of memory" in err
    noted = sorted((tmp_path / "store" / ".work" / "failures").iterdir())
    assert [len(json.loads(path.read_text())) for path in noted] == [1] * 5, "no shard was tried twice"
    code, _, err = pipeline(*arguments)
    assert code == 0, err
    assert len(open_store(tmp_path / "store").valid_rows) == 21


def _out_of_memory(self, pixels, *rest, **more):
    raise RuntimeError("CUDA error: out of memory")


def test_shards_that_fail_between_others_do_not_end_a_worker(folder, tmp_path, tiny, pipeline, failing):
    failing({1, 3, 5, 7, 9, 11})
    code, _, err = pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 10, *tiny)
    assert code == 0, err
    assert len(open_store(tmp_path / "store").valid_rows) == 21


class _Process:
    """A worker process that ended with an exit code."""

    def __init__(self, exitcode):
        self.exitcode = exitcode


def test_a_worker_that_dies_is_named_while_the_others_keep_the_news_flowing(tmp_path, capsys):
    news, seen = queue.Queue(), []
    busy = _Process(None)

    class Flowing(Progress):
        """A progress line in whose queue there is never a pause."""

        def __call__(self, event):
            seen.append("died" in capsys.readouterr().err)
            if len(seen) < 200 and not seen[-1]:
                time.sleep(0.005)
                news.put(event)
            else:
                busy.exitcode = 0

    news.put(ShardFailed("busy", 3, "reason"))
    with Flowing(tmp_path, num_rows=8, rows_done=lambda: 0) as progress:
        follow({"busy": busy, "dead": _Process(-9)}, news, progress, look_seconds=0.05)
    assert seen[-1], "named before the last news came"
    assert len(seen) < 200


def test_a_worker_makes_its_device_the_current_one_before_the_encoder_comes_there(
    folder, tmp_path, tiny, pipeline, monkeypatch
):
    # An event is recorded on a stream of the current device: with another one current, nothing waits for the tokens.
    assert pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny)[0] == 0
    done = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: done.append(str(device)))

    def to_device(self, device, precision):
        done.append(f"encoder on {device}")
        raise UserError("far enough")

    monkeypatch.setattr(Encoder, "to_device", to_device)
    config = parse(
        ["encode", str(folder), "--out", str(tmp_path / "store"), "--shards", "2", *map(str, tiny)]
    )
    with pytest.raises(UserError, match="far enough"):
        run_worker(WorkerSpec(config=config, device="cuda:3", name="w"), lambda event: None)
    assert done == ["cuda:3", "encoder on cuda:3"]


def test_what_fails_always_is_set_aside_named_and_tried_by_the_next_run(
    folder, tmp_path, tiny, pipeline, monkeypatch, failing
):
    arguments = ("encode", folder, "--out", tmp_path / "store", "--shards", 2, *tiny)
    with monkeypatch.context() as patch:
        working = Encoder.encode_all

        def encode_all(self, pixels, *rest, **more):
            # The first shard has 11 rows in one batch, the second 10 and a slot of zeros.
            if pixels[-1].any():
                raise RuntimeError("out of memory")
            return working(self, pixels, *rest, **more)

        patch.setattr(Encoder, "encode_all", encode_all)
        code, _, err = pipeline(*arguments)
    assert code == 1
    assert "shard 0 failed 3 times: RuntimeError: out of memory" in err
    assert err.splitlines()[-1].startswith("error: 1 of 2 shards are not done")
    assert len(list((tmp_path / "store" / "commits").rglob("*.json"))) == 2
    assert not list((tmp_path / "store").rglob("*.tmp"))
    code, _, err = pipeline(*arguments)
    assert code == 0
    assert "continuing" in err
    assert "1 of 2 shards are there" in err


@given(st.integers(1, 5000), st.integers(1, 512))
def test_a_shard_is_cut_into_the_fewest_batches_and_they_are_equal(capacity, at_most):
    length = batch_length(capacity, at_most)
    batches = -(-capacity // length)
    assert 1 <= length <= at_most
    assert batches == -(-capacity // at_most)
    assert batches * length - capacity < batches


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_batch_size_changes_tokens_by_rounding_only(folder, tmp_path, tiny, pipeline, batch_size):
    stores = []
    for name, size in (("one", 5), ("other", batch_size)):
        arguments = ("encode", folder, "--out", tmp_path / name, "--shards", 2, "--batch-size", size, *tiny)
        assert pipeline(*arguments, "--dtype", "float32")[0] == 0
        store = open_store(tmp_path / name)
        reader = store.reader("flip", "tokens")
        out = np.empty((21, *reader.row_shape), reader.dtype)
        reader.read(store.valid_rows, out)
        stores.append(out)
    assert np.abs(stores[0] - stores[1]).max() <= 2e-5


@pytest.fixture
def one_at_a_time(folder, tmp_path, tiny, pipeline):
    """Objects of a store that was written shard by shard, without the times in commit records."""
    return encoded(folder, tmp_path / "one", tiny, pipeline)


def encoded(folder, out, tiny, pipeline):
    arguments = ("encode", folder, "--out", out, "--shards", 6, "--batch-size", 2, "--devices", "cpu", *tiny)
    code, _, err = pipeline(*arguments)
    assert code == 0, err
    return {o.path: o.digest for o in open_store(out).manifest.objects if not o.path.startswith("commits/")}


def test_several_shards_at_once_give_the_same_store(
    folder, tmp_path, tiny, pipeline, monkeypatch, one_at_a_time
):
    """Whoever waits for writers at all, as any device does for its first buffers, writes another shard beside."""
    monkeypatch.setattr(job, "most_shards", lambda spec, writer: 3)
    monkeypatch.setattr(worker, "SHARE_WAITED", 0.0)
    assert encoded(folder, tmp_path / "many", tiny, pipeline) == one_at_a_time
    log = list(map(json.loads, (tmp_path / "many.logs" / "progress.jsonl").read_text().splitlines()))
    shards = [line["shard"] for line in log if line["event"] == "BatchEncoded"]
    assert sum(one != other for one, other in pairwise(shards)) > 5, (
        "the batches of 6 shards are taken in turns"
    )
    added = [line for line in log if line["event"] == "WritersAdded"]
    assert [line["shards"] for line in added] == [2, 3]
    assert added[0]["nbytes"] < added[1]["nbytes"]


def test_a_failure_among_several_shards_at_once_leaves_nothing_behind(
    folder, tmp_path, tiny, pipeline, monkeypatch, failing, one_at_a_time
):
    monkeypatch.setattr(job, "most_shards", lambda spec, writer: 3)
    monkeypatch.setattr(worker, "SHARE_WAITED", 0.0)
    failing({5, 9})
    assert encoded(folder, tmp_path / "many", tiny, pipeline) == one_at_a_time
    assert not list((tmp_path / "many").rglob("*.tmp"))


@pytest.mark.parametrize("views", [("center",), ("center", "flip")])
def test_what_others_commit_between_claim_and_work_is_not_made_again(
    folder, tmp_path, tiny, pipeline, monkeypatch, one_at_a_time, views
):
    whole, late = open_store(tmp_path / "one"), []
    working = Claims.next

    def overtaken(self):
        task = working(self)
        if task is not None and not late:
            late.append(task)
            for view in views:
                fields = [field_of(whole.recipe, view, field) for field in whole.recipe.fields(view)]
                names = [object_path(whole.recipe, field, task.shard) for field in fields]
                for name in (*names, commit_path(view, task.shard)):
                    (tmp_path / "many" / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(whole.path / name, tmp_path / "many" / name)
        return task

    monkeypatch.setattr(Claims, "next", overtaken)
    assert encoded(folder, tmp_path / "many", tiny, pipeline) == one_at_a_time
    assert len(late) == 1
