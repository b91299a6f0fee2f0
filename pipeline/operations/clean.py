"""`pipeline clean`: what dead workers left behind, what later revisions have superseded, and nothing else."""

from pathlib import PurePosixPath

from pipeline.console import log
from pipeline.encode.claims import Failures
from pipeline.encode.leases import Leases, Owner, remove_if_empty, require_nobody_at_work
from pipeline.settings.operations import CleanConfig
from shards import Location, stale_temporaries
from shards.metadata.layout import MANIFEST, WORK_DIR
from shards.metadata.root import read_recipe
from shards.storage.location import object_sizes, require_own_files
from shards.writing.added_fields import publish_fields
from shards.writing.revisions import give_up_unfinished, superseded


def clean(config: CleanConfig) -> None:
    """Remove temporary files, dead leases, failure notes and superseded revisions of a store nobody is writing.

    The manifest's list of fields is brought up to date, should somebody have removed one.

    Raises:
        UsageError: If there is no store.
        UserError: If a worker still holds a lease.
    """
    root = config.store
    read_recipe(root)
    require_own_files(root)
    require_nobody_at_work(root, config.wait, what="cleaned")
    if config.give_up:
        log(f"{root}: gave up {give_up_unfinished(root)} files of an addition that was not finished")
    temporaries = stale_temporaries(root)
    old = superseded(root, publish_fields(root)) if (root / MANIFEST).exists() else []
    size = sum(object_sizes(root, [*temporaries, *old]).values())
    for name in (*temporaries, *old):
        (root / name).unlink(missing_ok=True)
    _remove_empty_parents(root, old)
    Leases(root, Owner.this_process("pipeline clean")).remove_all()
    Failures(root, 1).clear()
    remove_if_empty(root / WORK_DIR)
    log(
        f"{root}: removed {len(temporaries)} temporary files, {len(old)} of earlier revisions, {size:,} bytes"
    )


def _remove_empty_parents(root: Location, names: list[str]) -> None:
    """Remove the folders that held nothing but these files."""
    folders = {parent for name in names for parent in PurePosixPath(name).parents} - {PurePosixPath()}
    for folder in sorted(folders, reverse=True):
        if (root / folder).is_dir() and not any((root / folder).iterdir()):
            (root / folder).rmdir()
