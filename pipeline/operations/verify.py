"""`pipeline verify`: every byte of a store against its manifest, damage named down to the row."""

import sys

from tqdm import tqdm

from pipeline.console import say
from pipeline.cores import usable_cores
from pipeline.operations.settings import VerifyConfig
from shards.errors import StoreDamagedError
from shards.manifest import Manifest
from shards.verify import verify_store


def verify(config: VerifyConfig) -> None:
    """Re-reads a store and says what is wrong with it.

    Raises:
        UsageError: If there is no store.
        StoreDamagedError: If anything in it is not what was written; every problem has been named before.
    """
    with tqdm(unit="B", unit_scale=True, desc="verify", file=sys.stderr) as bar:

        def show(read: int, total: int) -> None:
            bar.total = total
            bar.update(read - bar.n)

        problems = verify_store(config.store, threads=usable_cores(), progress=show)
    for problem in problems:
        say(f"  {problem}")
    if problems:
        raise StoreDamagedError(
            f"{config.store} is damaged: {len(problems)} problems, named above; restore the objects or encode anew"
        )
    manifest = Manifest.read(config.store)
    size = sum(record.nbytes for record in manifest.objects)
    say(
        f"{config.store} is as its manifest says: {len(manifest.objects)} objects, {size:,} bytes, "
        f"{manifest.num_valid} rows, {manifest.num_bad} images unusable"
    )
