"""`pipeline verify`: every byte of a store against its manifest, damage named down to the row."""

import sys

from tqdm import tqdm

from pipeline.console import log
from pipeline.encode.leases import require_nobody_at_work
from pipeline.settings.operations import VerifyConfig
from shards import Manifest, Problem, StoreDamagedError, usable_cores, verify_store, withdraw_damaged


def _withdraw(config: VerifyConfig, problems: list[Problem]) -> None:
    require_nobody_at_work(config.store, config.wait, what="taken apart")
    shards = withdraw_damaged(config.store, problems)
    log(
        f"{config.store}: {len(shards)} damaged shards are taken out and the store is unfinished; "
        "run the command that wrote it again to make them again"
    )


def verify(config: VerifyConfig) -> None:
    """Read a store again and print what is wrong with it; remove damaged shards if asked to.

    Raises:
        UsageError: If there is no store.
        StoreDamagedError: If anything in it is not what was written; every problem has been named before.
    """
    follow_links = config.follow_links
    with tqdm(unit="B", unit_scale=True, desc="verify", file=sys.stderr) as bar:

        def show(read: int, total: int) -> None:
            bar.total = total
            bar.update(read - bar.n)

        problems = verify_store(
            config.store, threads=usable_cores(), progress=show, follow_links=follow_links
        )
    for problem in problems:
        log(f"  {problem}")
    if problems and config.withdraw:
        _withdraw(config, problems)
        return
    if problems:
        raise StoreDamagedError(
            f"{config.store} is damaged: {len(problems)} problems, named above; restore the objects, or add "
            "--withdraw and run the command that wrote the store again: it makes the damaged shards again"
        )
    manifest = Manifest.read(config.store)
    size = sum(record.nbytes for record in manifest.objects)
    log(
        f"{config.store} is as its manifest says: {len(manifest.objects)} objects, {size:,} bytes, "
        f"{manifest.num_valid} rows, {manifest.num_bad} images unusable"
    )
