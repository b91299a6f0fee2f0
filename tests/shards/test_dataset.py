"""Other people's trainers read the same stream, in one process or several."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from shards.errors import UsageError
from shards.reading.dataset import SampleDataset, StreamBatchSampler
from shards.reading.loader import Loader
from shards.reading.store import Store
from shards.testing.contract import StoreKind, build_store, same_bits

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loader.py"


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return build_store(tmp_path_factory.mktemp("dataset") / "store", StoreKind())


def test_positions_hold_what_the_loader_delivers(store):
    fields = ("tokens", "image")
    dataset = SampleDataset(store.path, fields=fields, seed=9)
    with Loader(store, fields=fields, seed=9, global_batch_size=10) as loader:
        for batch in islice(loader, 6):
            own = dataset.__getitems__(batch.positions.tolist())
            assert np.array_equal(own["row"], batch.rows)
            assert np.array_equal(own["view"], batch.views)
            assert np.array_equal(own["label"], batch.labels)
            assert all(same_bits(own[name], batch.arrays[name]) for name in fields)
            batch.release()


def test_a_sample_alone_is_the_sample_in_a_batch(store):
    dataset = SampleDataset(store.path, seed=9)
    batch = dataset.__getitems__([3, 30, 7])
    for index, position in enumerate([3, 30, 7]):
        assert all(same_bits(np.asarray(v), batch[k][index]) for k, v in dataset[position].items())
    assert len(dataset) == len(store.valid_rows)


def test_a_dataset_goes_to_another_process_without_its_files(store):
    dataset = SampleDataset(store.path, seed=9)
    sent = pickle.dumps(dataset)
    assert len(sent) < 1000
    assert same_bits(pickle.loads(sent)[5]["tokens"], dataset[5]["tokens"])


def test_the_sampler_hands_out_consecutive_positions():
    sampler = StreamBatchSampler(3, num_samples=9, start_sample=6)
    assert list(sampler) == [[6, 7, 8], [9, 10, 11], [12, 13, 14]]
    assert len(sampler) == 3
    assert (sampler.batch_size, sampler.drop_last) == (3, True)


@pytest.mark.parametrize("arguments", [(0, 0, 0), (2, 3, 0), (2, 4, -1)])
def test_batches_that_cannot_be_are_refused(arguments):
    batch_size, num_samples, start = arguments
    with pytest.raises(UsageError):
        StreamBatchSampler(batch_size, num_samples=num_samples, start_sample=start)


def test_shards_can_be_imported_and_read_without_torch(store):
    script = (
        "import sys, pkgutil, importlib, shards\n"
        "names = [m.name for m in pkgutil.iter_modules(shards.__path__) if m.name != 'testing']\n"
        "[importlib.import_module(f'shards.{name}') for name in names]\n"
        "shards.open_store(sys.argv[1])\n"
        "assert 'zarr' not in sys.modules, 'it is loaded with the first array, not with a store'\n"
        "shards.SampleDataset(sys.argv[1], seed=0)[0]\n"
        "assert 'torch' not in sys.modules and 'webdataset' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script, store.path], check=True, timeout=120)


def run_example(store, num_processes):
    """(rank, positions, rows) of every batch, in the order of the positions."""
    launcher = (
        [] if num_processes == 1 else ["-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
    )
    if launcher:
        launcher += ["--master_port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
    command = [sys.executable, *launcher, str(EXAMPLE), str(store.path), "24"]
    answer = subprocess.run(command, check=True, timeout=240, capture_output=True, text=True)
    lines = [json.loads(line) for line in answer.stdout.splitlines() if line.startswith("[")]
    return sorted((line[1], line[2], line[0]) for line in lines)


def test_the_accelerate_example_reads_the_same_stream_with_one_process_and_with_two(store):
    alone, together = run_example(store, 1), run_example(store, 2)
    assert [line[:2] for line in together] == [line[:2] for line in alone]
    assert [p for positions, _, _ in alone for p in positions] == list(range(24))
    assert [rank for _, _, rank in together] == [0, 1] * 3
    expected = SampleDataset(store.path, seed=0).__getitems__(range(24))["row"].tolist()
    assert [row for _, rows, _ in alone for row in rows] == expected
