"""Reading a store from a server, against as many plain parallel ranged reads of the same rows from the same server.

    AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret S3_BUCKET=latents weed mini -dir=DIR -ip=127.0.0.1 &
    AWS_ENDPOINT_URL=http://127.0.0.1:8333 AWS_ACCESS_KEY_ID=key AWS_SECRET_ACCESS_KEY=secret \
        python benchmarks/remote_reading.py s3://latents/benchmark

The plain reads are fsspec's own `cat_ranges`, a range a row, as many under way at once as the reader has. Both are
measured in turns, batch after batch of rows in the order of training; ours also finds the rows, checks their CRC32C
and puts them into the batch's buffer.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import fsspec
import numpy as np
from measuring import Result, make_store, make_tokens, report

from shards import Loader, RemotePath, Store, as_location, open_store
from shards.formats import object_path, scan_extents
from shards.metadata.layout import field_of
from shards.storage.parallel import IN_FLIGHT
from shards.storage.range_cache import RangeCache

_FIRST = 4  # batches before the measurement: as many as the loader has buffers


class Counted:
    """Counts the bytes that are asked of a server."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.requests = 0
        read_range = RemotePath.read_range

        def counted(path: RemotePath, offset: int, nbytes: int) -> bytes:
            self.nbytes += nbytes
            self.requests += 1
            return read_range(path, offset, nbytes)

        RemotePath.read_range = counted  # type: ignore[method-assign]


def loader(store: Store, batch_size: int) -> Loader:
    """Read as training does, from the first position of the stream."""
    return Loader(store, views=("center",), seed=0, global_batch_size=batch_size)


def read_by_loader(store: Store, batch_size: int, batches: int) -> float:
    """Rows a second in the midst of the stream: it reads ahead at the end of the measurement as at its begin."""
    with loader(store, batch_size) as reading:
        stream = iter(reading)
        for _ in range(_FIRST):
            next(stream).release()
        begun = time.perf_counter()
        for _ in range(batches):
            next(stream).release()
        seconds = time.perf_counter() - begun
    return batches * batch_size / seconds


class PlainReads:
    """The same rows in the same order by ranged reads alone; where they are is found before."""

    def __init__(self, store: Store) -> None:
        self.field = field_of(store.recipe, "center", "tokens")
        scheme, _, self._root = str(store.path).partition("://")
        self._system = fsspec.filesystem(scheme, use_listings_cache=False)
        self._extents = [
            scan_extents(store.path, store.recipe, self.field, shard).offsets
            for shard in range(store.recipe.num_shards)
        ]
        self._capacity = store.capacity
        self._recipe = store.recipe

    def read(self, rows: np.ndarray) -> None:
        """One row a request, `IN_FLIGHT` of them at once."""
        shards, places = np.divmod(rows, self._capacity)
        pairs = zip(shards.tolist(), places.tolist(), strict=True)
        starts = [int(self._extents[shard][place]) for shard, place in pairs]
        ends = [start + self.field.row_nbytes for start in starts]
        paths = [f"{self._root}/{object_path(self._recipe, self.field, shard)}" for shard in shards.tolist()]
        contents = self._system.cat_ranges(paths, starts, ends, batch_size=IN_FLIGHT)
        assert all(len(content) == self.field.row_nbytes for content in contents)


def read_plainly(store: Store, plain: PlainReads, batch_size: int, batches: int) -> float:
    """Rows a second."""
    rows = loader(store, batch_size).order.rows(0, batch_size * batches)
    begun = time.perf_counter()
    plain.read(rows)
    return len(rows) / (time.perf_counter() - begun)


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", help="URL the store is at, or is made at")
    parser.add_argument("--data", type=Path, default=Path("data/benchmarks"), help="where rows are kept")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/remote_reading.json"))
    options = parser.parse_args()
    tokens = make_tokens(options.data / f"tokens-{options.rows}.npy", options.rows)
    store = make_store(as_location(options.store), tokens, options.shards)
    epoch = options.rows // options.batch_size
    batches = 2 * epoch
    plain = PlainReads(store)
    ours, theirs, cached = [], [], []
    cache = RangeCache(options.data / f"cache-{time.time_ns()}", 10**10)
    read_by_loader(open_store(options.store, cache), options.batch_size, epoch)
    for number in range(options.rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            if which:
                ours.append(read_by_loader(open_store(options.store), options.batch_size, batches))
            else:
                theirs.append(read_plainly(store, plain, options.batch_size, batches))
        cached.append(read_by_loader(open_store(options.store, cache), options.batch_size, batches))
    counted = Counted()
    reader = open_store(options.store).reader("center", "tokens")
    out = np.empty((options.batch_size, *reader.row_shape), reader.dtype)
    for batch in range(epoch):
        rows = loader(store, options.batch_size).order.rows(batch * options.batch_size, options.batch_size)
        reader.read(rows, out)
    payload = options.rows * plain.field.row_nbytes
    results = [
        Result("loader, from the server", "plain parallel ranged reads", 0.9, ours, theirs),
        Result("loader, from the cache", "plain parallel ranged reads", None, cached, theirs),
    ]
    facts = {
        "row bytes": plain.field.row_nbytes,
        "requests in flight": IN_FLIGHT,
        "MB/s from the server": round(float(np.median(ours)) * plain.field.row_nbytes / 1e6, 1),
        # What an epoch asks for besides its rows: the shards' indices and the bytes between neighbours.
        "bytes besides the rows, share": round(counted.nbytes / payload - 1, 6),
        "requests": counted.requests,
    }
    report(results, facts, options.out)


if __name__ == "__main__":
    main()
