"""The image field: bytes and speed of lossless codecs on photographs, and reading against flat files.

    python benchmarks/images.py [--rounds N] [--rows N]

The images are random crops of 256 pixels, cut as `--views crop:K` cuts them, of the demo's photographs. A codec that
stock zarr v3 does not know is measured for comparison only.
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numcodecs
import numpy as np
from measuring import Result, benchmark_plan, benchmark_recipe, report, side_by_side
from PIL import Image
from reading import OwnLoader, reader_results

from pipeline.demo.photographs import PHOTOGRAPHS, open_photograph
from shards import Store, StoreWriter, open_store, random_crops, row_codec

SIDE = 256
GREY = ("brick", "cameraman", "coins", "grass", "moon")
"""Photographs without colours, which compress better than most."""


def photograph_crops(names: list[str], each: int) -> np.ndarray:
    """Crops uint8 [n, 256, 256, 3]."""
    crops: list[np.ndarray] = []
    for name in names:
        photograph = np.asarray(open_photograph(name))
        crops += random_crops(photograph, SIDE, [f"{name}/{number}" for number in range(each)], seed=0)
    return np.stack(crops)


def image_store(path: Path, images: np.ndarray, compression: str | None) -> Store:
    """Return a store of images with tokens of a single number."""
    plan = benchmark_plan(len(images), 4)
    recipe = benchmark_recipe(plan, image_compression=compression)
    tiny = dataclasses.replace(recipe.encoder, grid=(1, 1), width=1)
    recipe = dataclasses.replace(recipe, encoder=tiny, image_size=SIDE)
    writer = StoreWriter.create_or_continue(path, recipe, plan)
    for view, shard in writer.pending():
        rows = plan.rows_of(shard)
        with writer.shard(view, shard) as output:
            tokens = np.zeros((len(rows), 1, 1), np.float16)
            output.write_block(0, {"tokens": tokens, "image": images[rows.start : rows.stop]})
            output.publish()
    writer.finalize()
    return open_store(path)


def planar_delta(level: int) -> tuple[Callable[[np.ndarray], bytes], Callable[[bytes], Any]]:
    """Colours apart, differences along a line, zstd: `transpose`, `numcodecs.delta` and `zstd` in zarr-python."""
    delta, zstd = numcodecs.Delta("u1"), numcodecs.Zstd(level)

    def encode(image: np.ndarray) -> bytes:
        return bytes(zstd.encode(delta.encode(np.ascontiguousarray(image.transpose(2, 0, 1)))))

    def decode(stored: bytes) -> np.ndarray:
        planes = delta.decode(np.frombuffer(zstd.decode(stored), np.uint8)).reshape(3, SIDE, SIDE)
        return np.ascontiguousarray(planes.transpose(1, 2, 0))

    return encode, decode


def image_file(kind: str, **settings: Any) -> tuple[Callable[[np.ndarray], bytes], Callable[[bytes], Any]]:
    """Return an image format of Pillow's."""

    def encode(image: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, kind, **settings)
        return buffer.getvalue()

    return encode, lambda stored: np.asarray(Image.open(io.BytesIO(stored)))


def own_codec(name: str) -> tuple[Callable[[np.ndarray], bytes], Callable[[bytes], Any]]:
    """Return a codec of the store's."""
    codec = row_codec(name)
    out = np.empty((SIDE, SIDE, 3), np.uint8)

    def decode(stored: bytes) -> np.ndarray:
        codec.decode(np.frombuffer(stored, np.uint8), out)
        return out

    return codec.encode, decode


CODECS = {
    "blosc (zstd 1, bitshuffle)": own_codec("blosc"),
    "zstd 1": own_codec("zstd"),
    "transpose, numcodecs.delta, zstd 1": planar_delta(1),
    "PNG": image_file("PNG"),
    "WebP lossless": image_file("WEBP", lossless=True),
}


def codec_facts(images: np.ndarray, colour: np.ndarray) -> dict[str, str]:
    """Share of the bytes that is left, and rows a second of one thread."""
    facts = {}
    for name, (encode, decode) in CODECS.items():
        shares = [
            float(np.mean([len(encode(image)) for image in some])) / some[0].nbytes
            for some in (images, colour)
        ]
        stored = [encode(image) for image in images]
        times = []
        for _ in range(3):
            began = time.perf_counter()
            for part in stored:
                decoded = decode(part)
            times.append(time.perf_counter() - began)
        assert np.array_equal(decoded, images[-1]), name
        facts[name] = (
            f"{shares[0]:.2f} of the bytes, colour photographs {shares[1]:.2f}; "
            f"decodes {len(stored) / min(times):.0f} rows/s"
        )
    return facts


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/images.json"))
    options = parser.parse_args()
    images = photograph_crops(list(PHOTOGRAPHS), 4)
    colour = photograph_crops([name for name in PHOTOGRAPHS if name not in GREY], 4)
    facts = codec_facts(images, colour)
    rows = images[np.arange(options.rows) % len(images)]
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "flat.npy", rows)
        flat = np.load(Path(folder) / "flat.npy", mmap_mode="r")
        raw = image_store(Path(folder) / "raw", rows, None)
        results += reader_results(flat, raw, options.rounds, field="image")
        base = OwnLoader(raw, fields=("image",))
        for name in ("blosc", "zstd"):
            store = image_store(Path(folder) / name, rows, name)
            loader = OwnLoader(store, fields=("image",))
            rates = side_by_side(loader, base, rounds=options.rounds, slices=4, seconds=0.2)
            loader.close()
            results.append(Result(f"images through the loader, {name}", "uncompressed", None, *rates))
        base.close()
    report(results, facts, options.out)


if __name__ == "__main__":
    main()
