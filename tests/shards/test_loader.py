"""The loader: the same batches for any ranks, threads and micro-batches, or an error that says where."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from itertools import islice

import numpy as np
import pytest

from shards.errors import StoreDamagedError, UsageError
from shards.metadata.layout import field_of
from shards.reading.loader import Loader, page_aligned
from shards.reading.store import Store, open_store
from shards.testing.contract import StoreKind, build_store, expected_row, flip_bit

BATCH = 12


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return build_store(tmp_path_factory.mktemp("loader") / "store", StoreKind(bad={3: "bad"}))


def read_steps(store, num_steps, **settings) -> list[list[tuple[int, int, int, int, bytes]]]:
    """Position, row, view, label and first bytes of each sample of each step of one rank."""
    steps: dict[int, list[tuple[int, int, int, int, bytes]]] = {}
    with Loader(store, **{"seed": 5, "global_batch_size": BATCH, **settings}) as loader:
        finished = 0
        for batch in loader:
            samples = steps.setdefault(batch.step, [])
            for i in range(len(batch.rows)):
                content = batch.arrays["tokens"][i].tobytes()
                values = (batch.positions[i], batch.rows[i], batch.views[i], batch.labels[i])
                samples.append((*map(int, values), content))
            batch.release()
            finished += batch.last_of_step
            if finished == num_steps:
                return list(steps.values())
    raise AssertionError


def read_for_ever(batches):
    for batch in batches:
        batch.release()


def joined(parts):
    """The ranks' shares of each step, one after another."""
    return [[sample for share in shares for sample in share] for shares in zip(*parts, strict=True)]


@pytest.fixture(scope="module")
def reference(store):
    return read_steps(store, 9, threads=1, ring=2)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 8])
def test_global_batches_are_the_same_for_any_number_of_ranks(store, reference, world_size):
    parts = [read_steps(store, 5, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert joined(parts) == reference[:5]


@pytest.mark.parametrize(
    "settings",
    [{"threads": 4}, {"micro_batch_size": 1}, {"micro_batch_size": 5, "threads": 3, "ring": 6}, {"mode": "pread"},
     {"mode": "mmap"}, {"verify": "always"}, {"verify": "never"}, {"micro_batch_size": 100}],
    ids=str,
)  # fmt: skip
def test_batches_do_not_depend_on_threads_micro_batches_or_reading(store, reference, settings):
    assert read_steps(store, 5, **settings) == reference[:5]


@pytest.mark.parametrize("stopped", [1, 2, 4])
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_stopped_run_continues_with_other_ranks_as_if_it_had_not_stopped(
    store, reference, stopped, world_size
):
    parts = [
        read_steps(store, 5, rank=rank, world_size=world_size, start_sample=stopped * BATCH)
        for rank in range(world_size)
    ]
    assert joined(parts) == reference[stopped : stopped + 5]


def test_each_valid_row_comes_once_an_epoch(store, reference):
    rows = [sample[1] for step in reference for sample in step]
    size = len(store.valid_rows)
    for first in range(0, len(rows) - size + 1, size):
        assert sorted(rows[first : first + size]) == store.valid_rows.tolist()


def test_the_delivered_numbers_are_the_rows(store, reference):
    for _, row, view, label, content in reference[0]:
        assert content == expected_row(field_of(store.recipe, store.views[view], "tokens"), row).tobytes()
        assert label == store.labels[row]


def test_micro_batches_say_where_a_step_ends(store):
    with Loader(store, seed=0, global_batch_size=10, micro_batch_size=4) as loader:
        ends = []
        for batch in islice(loader, 6):
            ends.append((batch.step, len(batch.rows), batch.last_of_step))
            batch.release()
    assert ends == [(0, 4, False), (0, 4, False), (0, 2, True), (1, 4, False), (1, 4, False), (1, 2, True)]


def test_arrays_stay_as_they_are_until_the_batch_is_released(store):
    with Loader(store, seed=0, global_batch_size=4, ring=3, threads=2) as loader:
        batches = iter(loader)
        held = next(batches)
        before = held.arrays["tokens"].copy()
        for _ in range(20):
            next(batches).release()
        assert np.array_equal(held.arrays["tokens"], before)
        held.release()
        held.release()  # twice is once
        for _ in range(20):
            next(batches).release()


def test_buffers_come_from_the_given_allocator_and_are_reused(store):
    made = []

    def allocate(shape, dtype):
        made.append(np.zeros(shape, dtype))
        return made[-1]

    with Loader(store, seed=0, global_batch_size=4, ring=3, allocate=allocate) as loader:
        for batch in islice(loader, 12):
            assert any(np.shares_memory(batch.arrays["tokens"], buffer) for buffer in made)
            batch.release()
    assert len(made) == 3


def test_own_buffers_begin_on_a_page():
    array = page_aligned((3, 5, 7), np.dtype(np.float16))
    assert array.ctypes.data % 4096 == 0
    assert (array.shape, array.dtype) == ((3, 5, 7), np.float16)


def test_waiting_for_data_is_counted(store):
    with Loader(store, seed=0, global_batch_size=4) as loader:
        assert loader.data_wait == 0
        next(iter(loader)).release()
        assert loader.data_wait > 0


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_a_damaged_shard_stops_the_run_with_shard_row_and_file(tmp_path, damage):
    store = build_store(tmp_path / "store", StoreKind())
    path = store.path / "center/tokens/c/2/0/0"
    with Loader(store, seed=0, views=("center",), global_batch_size=23) as loader:
        if damage == "flip":
            flip_bit(path, 1234)
        elif damage == "truncate":
            path.write_bytes(path.read_bytes()[:50])
        else:
            path.unlink()
        with pytest.raises(StoreDamagedError, match=r"row 1\d of shard 2 of center/tokens.*c/2/0/0"):
            next(iter(loader))


@pytest.mark.parametrize("mode", ["auto", "pread"])
def test_a_shard_that_is_shortened_while_it_is_read_stops_the_run(tmp_path, mode):
    store = build_store(tmp_path / "store", StoreKind())
    path = store.path / "center/tokens/c/2/0/0"
    with Loader(store, seed=0, views=("center",), global_batch_size=23, mode=mode) as loader:
        batches = iter(loader)
        next(batches).release()
        os.truncate(path, 100)
        where = r"row 1\d of shard 2 of center/tokens.*c/2/0/0.*truncated"
        with pytest.raises(StoreDamagedError, match=where):
            read_for_ever(batches)


def test_a_missing_or_shortened_shard_is_refused_on_opening(tmp_path):
    store = build_store(tmp_path / "store", StoreKind())
    path = store.path / "center/tokens/c/2/0/0"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(StoreDamagedError, match="center/tokens/c/2/0/0 has 459 bytes instead of 460"):
        open_store(store.path)
    path.unlink()
    with pytest.raises(StoreDamagedError, match="center/tokens/c/2/0/0 is missing"):
        open_store(store.path)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader-")]


def test_threads_start_when_reading_begins_and_end_when_the_loader_is_closed_or_dropped(store):
    before = len(loader_threads())
    loader = Loader(store, seed=0, global_batch_size=4, threads=3)
    assert len(loader_threads()) == before
    batches = iter(loader)
    next(batches)
    assert len(loader_threads()) == before + 3
    loader.close()
    assert len(loader_threads()) == before
    with pytest.raises(RuntimeError, match="closed"):
        next(batches)
    batches = iter(loader)
    next(batches)
    del loader, batches
    gc.collect()
    deadline = time.monotonic() + 10
    while len(loader_threads()) > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(loader_threads()) == before


def test_a_program_that_ends_while_reading_ends(store):
    script = (
        "import sys\n"
        "from shards.reading.loader import Loader\n"
        "from shards.reading.store import open_store\n"
        "loader = Loader(open_store(sys.argv[1]), seed=0, global_batch_size=4)\n"
        "batches = iter(loader)\n"
        "next(batches)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", script, store.path], check=True, timeout=60)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 2, "world_size": 2}, "rank must be between 0 and 1, not 2"),
        ({"global_batch_size": 2, "world_size": 3}, "without a sample"),
        ({"start_sample": 7}, "7 samples seen is not a multiple of the global batch size 12"),
        ({"micro_batch_size": 0}, "micro-batch size must be 1 or more"),
        ({"threads": 0}, "at least 1 thread"),
        ({"ring": 1}, "2 buffers"),
        ({"views": ()}, "at least one view"),
        ({"fields": ("codes",)}, "has no 'codes'"),
        ({"views": ("crop0",)}, "not 'crop0'"),
    ],
)
def test_what_cannot_be_read_is_refused_at_once(store, settings, message):
    with pytest.raises(UsageError, match=message):
        Loader(store, **{"seed": 0, "global_batch_size": BATCH, **settings})
