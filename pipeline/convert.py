"""`pipeline convert`: the same rows in the other form of a store, or with another compression."""

import sys

from tqdm import tqdm

from pipeline.config import ConvertConfig
from pipeline.console import say
from shards.convert import convert_store


def convert(config: ConvertConfig) -> None:
    """Copies a store into another form, row for row and bit for bit; run again, it continues.

    Raises:
        UserError: If the store is damaged, or the copy cannot be made.
    """
    with tqdm(unit="shard", desc="convert", file=sys.stderr) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        compression = None if config.compression == "none" else config.compression
        manifest = convert_store(
            config.store, config.out, format=config.format, compression=compression, progress=show
        )
    say(f"{config.out} is complete: {manifest.num_valid} rows as {config.format}")
