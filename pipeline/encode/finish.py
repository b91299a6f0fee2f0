"""The end of an encode: counts that add up, then index, statistics and manifest."""

import time
from importlib.metadata import version

from pipeline.console import log
from pipeline.encode.calibrate import report_measured
from pipeline.encode.claims import Failures
from pipeline.encode.leases import Leases, Owner, remove_if_empty, remove_work
from pipeline.settings.config import EncodeConfig
from shards import Location, Plan, StoreWriter, UserError, bad_rows, open_store
from shards.metadata.layout import WORK_DIR
from shards.storage.location import require_own_files
from shards.writing.added_fields import publish_fields
from shards.writing.finalize import read_commits

_NAMED_AT_MOST = 20


def finish_once(config: EncodeConfig, writer: StoreWriter) -> None:
    """Finish the store; of several workers one does it and the others wait for it."""
    if writer.finished():
        finish(config, writer)
        return
    with Leases(writer.path, Owner.this_process("finish")) as leases:
        while not leases.take("finish"):
            if writer.finished():
                return
            time.sleep(0.5)
        if not writer.finished():  # else somebody was done between the look and the lease
            finish(config, writer)
            return
    remove_if_empty(writer.path / WORK_DIR)  # this one's lease made it again


def finish(config: EncodeConfig, writer: StoreWriter) -> None:
    """Write index, statistics and manifest once every shard is published, and print a summary of the store.

    Raises:
        UserError: If shards are missing, more images are bad than allowed, or int8 has cost more than allowed.
    """
    if writer.pending():
        _refuse_unfinished(config, writer)
    commits = read_commits(writer.path, writer.recipe)
    reasons = bad_rows(writer.recipe, writer.plan, commits)
    _check_bad(config, writer.plan, reasons)
    writer.finalize({name: version(name) for name in ("torch", "timm", "numpy", "pillow")})
    remove_work(writer.path)
    store = open_store(writer.path)  # refuses what is damaged, before anything is said to be complete
    num_images, num_bad = writer.plan.num_images, len(reasons)
    log(
        f"{writer.path} is complete: {num_images - num_bad} of {num_images} images in "
        f"{writer.recipe.num_shards} shards, {num_bad} unusable"
    )
    report_measured(store, config.store.allow_error)


def list_fields(store: Location) -> None:
    """List a finished store's finished fields in its manifest, which one process at a time may change."""
    require_own_files(store)
    with Leases(store, Owner.this_process("fields")) as leases:
        while not leases.take("finish"):
            time.sleep(0.5)
        publish_fields(store)
    remove_if_empty(store / WORK_DIR)


def _check_bad(config: EncodeConfig, plan: Plan, reasons: dict[int, str]) -> None:
    key_of = dict(zip(plan.rows.tolist(), plan.keys, strict=True)) if reasons else {}
    for row in list(reasons)[:_NAMED_AT_MOST]:
        log(f"  unusable: {key_of[row]}: {reasons[row]}")
    if len(reasons) > _NAMED_AT_MOST:
        log(f"  … and {len(reasons) - _NAMED_AT_MOST} more")
    if len(reasons) == plan.num_images:
        raise UserError(
            f"none of the {plan.num_images} images can be used, for reasons such as those above; a store "
            "needs at least one "
            "row: repair them and add --retry-quarantined, or give another SOURCE"
        )
    if len(reasons) > config.work.allowed_bad(plan.num_images):
        raise UserError(
            f"{len(reasons)} of {plan.num_images} images are unusable, more than --max-bad "
            f"{config.work.max_bad}; "
            f"repair them and add --retry-quarantined, or allow them with --max-bad {len(reasons)}"
        )


def _refuse_unfinished(config: EncodeConfig, writer: StoreWriter) -> None:
    shards = {shard for _, shard in writer.pending()}
    parked = Failures(writer.path, config.work.max_attempts).parked()
    for shard, reason in parked.items():
        log(f"  shard {shard} failed {config.work.max_attempts} times: {reason}")
    raise UserError(
        f"{len(shards)} of {writer.recipe.num_shards} shards are not done ({len(parked)} of them failed too "
        "often); "
        "remove the cause and run the same command again"
    )
