"""Other people's loaders, each as its own documentation advises, behind one small protocol.

Run by benchmarks/reading.py inside a virtual environment a peer: ``python peers.py NAME prepare TOKENS DIR`` writes the
rows in the peer's own format; ``python peers.py NAME serve TOKENS DIR`` then answers each line ``SECONDS`` on standard
input with the rows a second it delivered in shuffled batches of 64 during that time.

A batch counts as delivered when the training loop holds it as one array; nothing is computed on it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 64
WORKERS = 2
ROWS_PER_SHARD = 256


def tokens_of(path: Path) -> np.ndarray:
    """Return the rows, as a flat memory map."""
    return np.load(path, mmap_mode="r")


class RowsOfMap:
    """A map-style dataset over a flat memory map."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows = tokens_of(path)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        import torch

        return torch.from_numpy(np.array(self.rows[index]))


class RowsOfZarr:
    """A map-style dataset over a sharded zarr array, opened in the worker."""

    def __init__(self, path: Path, pipeline: str | None) -> None:
        self.path = path
        self.pipeline = pipeline
        self.array: Any = None
        self.length = self._open().shape[0]

    def _open(self) -> Any:
        import zarr

        if self.pipeline is not None:
            zarr.config.set({"codec_pipeline.path": self.pipeline})
        return zarr.open_array(self.path, mode="r")

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        import torch

        if self.array is None:
            self.array = self._open()
        return torch.from_numpy(np.asarray(self.array[index]))


def shuffled_loader(dataset: Any) -> Iterator[Any]:
    """PyTorch's own loader with worker processes."""
    from torch.utils.data import DataLoader

    loader = DataLoader(
        dataset, BATCH, shuffle=True, num_workers=WORKERS, persistent_workers=True, drop_last=True
    )
    while True:
        yield from loader


def memmap_batches(tokens: Path, _: Path) -> Iterator[Any]:
    """Return the process DataLoader over a flat memory map."""
    return shuffled_loader(RowsOfMap(tokens))


def write_zarr(tokens: Path, out: Path) -> None:
    """Return a sharded zarr v3 array with one row an inner chunk, uncompressed, by zarr-python."""
    import zarr

    rows = tokens_of(tokens)
    array = zarr.create_array(
        out / "tokens",
        shape=rows.shape,
        dtype=rows.dtype,
        shards=(ROWS_PER_SHARD, *rows.shape[1:]),
        chunks=(1, *rows.shape[1:]),
        compressors=None,
        filters=None,
    )
    for first in range(0, len(rows), ROWS_PER_SHARD):
        array[first : first + ROWS_PER_SHARD] = rows[first : first + ROWS_PER_SHARD]


def zarr_batches(_: Path, out: Path) -> Iterator[Any]:
    """zarr-python in worker processes."""
    return shuffled_loader(RowsOfZarr(out / "tokens", None))


def zarrs_batches(_: Path, out: Path) -> Iterator[Any]:
    """zarr-python with the codec pipeline of zarrs, which must not be opened before the fork."""
    import multiprocessing

    multiprocessing.set_start_method("spawn", force=True)
    return shuffled_loader(RowsOfZarr(out / "tokens", "zarrs.ZarrsCodecPipeline"))


def tensorstore_batches(_: Path, out: Path) -> Iterator[Any]:
    """TensorStore's asynchronous reads, one batch ahead."""
    import tensorstore as ts

    source = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(out / "tokens")}}
    array = ts.open(source, open=True, read=True).result()

    def batches() -> Iterator[Any]:
        generator = np.random.default_rng(0)
        while True:
            order = generator.permutation(array.shape[0])
            for first in range(0, len(order) - BATCH + 1, BATCH):
                yield array[np.sort(order[first : first + BATCH])].read()

    pending = batches()
    ahead = next(pending)
    while True:
        current, ahead = ahead, next(pending)
        yield current.result()


def write_webdataset(tokens: Path, out: Path) -> None:
    """Tars by webdataset's own writer."""
    import webdataset

    rows = tokens_of(tokens)
    with webdataset.ShardWriter(str(out / "%05d.tar"), maxcount=ROWS_PER_SHARD, verbose=0) as sink:
        for index, row in enumerate(rows):
            sink.write({"__key__": f"{index:09d}", "npy": np.asarray(row)})


def webdataset_batches(_: Path, out: Path) -> Iterator[Any]:
    """Shards and a buffer shuffled, batched in the worker, as the documentation's training example does."""
    import webdataset

    shards = sorted(str(path) for path in out.glob("*.tar"))
    dataset = (
        webdataset.WebDataset(shards, shardshuffle=len(shards), resampled=True, nodesplitter=None)
        .shuffle(1000)
        .decode()
        .to_tuple("npy")
        .batched(BATCH, partial=False)
    )
    loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=WORKERS)
    while True:
        for (batch,) in loader:
            yield batch


def write_litdata(tokens: Path, out: Path) -> None:
    """LitData chunks of its default size."""
    import litdata

    litdata.optimize(
        fn=LitRow(tokens),
        inputs=list(range(len(tokens_of(tokens)))),
        output_dir=str(out),
        chunk_bytes="64MB",
        num_workers=WORKERS,
    )


class LitRow:
    """Gives LitData one row as a tensor."""

    def __init__(self, tokens: Path) -> None:
        self.tokens = tokens

    def __call__(self, index: int) -> Any:
        """Return the row at an index."""
        import torch

        return torch.from_numpy(np.array(tokens_of(self.tokens)[index]))


def litdata_batches(_: Path, out: Path) -> Iterator[Any]:
    """LitData's dataset and loader."""
    import litdata

    dataset = litdata.StreamingDataset(str(out), shuffle=True, drop_last=True)
    loader = litdata.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=WORKERS)
    while True:
        yield from loader


def write_mds(tokens: Path, out: Path) -> None:
    """MosaicML shards of the default size."""
    from streaming import MDSWriter

    rows = tokens_of(tokens)
    shape = ",".join(map(str, rows.shape[1:]))
    with MDSWriter(out=str(out), columns={"tokens": f"ndarray:float16:{shape}"}) as sink:
        for row in rows:
            sink.write({"tokens": np.asarray(row)})


def mds_batches(_: Path, out: Path) -> Iterator[Any]:
    """MosaicML's dataset in PyTorch's loader."""
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(out), shuffle=True, batch_size=BATCH)
    loader = DataLoader(dataset, BATCH, num_workers=WORKERS, persistent_workers=True, drop_last=True)
    while True:
        for batch in loader:
            yield batch["tokens"]


def nothing(_tokens: Path, _out: Path) -> None:
    """Build nothing: the peer reads the flat file."""


Prepare = Callable[[Path, Path], None]
Batches = Callable[[Path, Path], Iterator[Any]]
PEERS: dict[str, tuple[Prepare, Batches]] = {
    "memmap-dataloader": (nothing, memmap_batches),
    "webdataset": (write_webdataset, webdataset_batches),
    "litdata": (write_litdata, litdata_batches),
    "mosaicml-streaming": (write_mds, mds_batches),
    "tensorstore": (write_zarr, tensorstore_batches),
    "zarrs": (write_zarr, zarrs_batches),
    "zarr-python": (write_zarr, zarr_batches),
}


def serve(batches: Iterator[Any]) -> None:
    """Answer requests until standard input ends; the first batch is waited for before the first answer."""
    shape = tuple(next(batches).shape)
    assert shape[0] == BATCH, shape
    print(json.dumps({"ready": shape}), flush=True)
    for line in sys.stdin:
        seconds = float(line)
        begun = time.perf_counter()
        count = 0
        while (elapsed := time.perf_counter() - begun) < seconds:
            next(batches)
            count += BATCH
        print(json.dumps({"rows_per_second": count / elapsed}), flush=True)


def main() -> None:
    """Prepare a peer's copy of the rows, or serve from it."""
    name, task, tokens, out = sys.argv[1:]
    prepare, batches = PEERS[name]
    if task == "prepare":
        Path(out).mkdir(parents=True, exist_ok=True)
        prepare(Path(tokens), Path(out))
    else:
        serve(batches(Path(tokens), Path(out)))


if __name__ == "__main__":
    main()
