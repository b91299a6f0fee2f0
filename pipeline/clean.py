"""`pipeline clean`: what dead workers left behind, what later revisions have superseded, and nothing else."""

from pathlib import Path

from pipeline.claims import Failures
from pipeline.console import say
from pipeline.leases import Leases, Owner
from pipeline.operations import CleanConfig
from shards.errors import UserError
from shards.layout import MANIFEST, WORK_DIR
from shards.manifest import Manifest
from shards.revisions import superseded
from shards.root import read_recipe
from shards.writing import stale_temporaries


def clean(config: CleanConfig) -> None:
    """Removes temporary files, dead leases, failure notes and superseded revisions of a store nobody is writing.

    Raises:
        UsageError: If there is no store.
        UserError: If a worker still holds a lease.
    """
    root = config.store
    read_recipe(root)
    leases = Leases(root, Owner.this_process("pipeline clean"))
    alive = leases.living(config.wait)
    if alive:
        some = ", ".join(f"{name} ({lease})" for lease, name in list(alive.items())[:4])
        raise UserError(f"a store can be cleaned when nobody writes it, {some} is at work; stop it or wait")
    temporaries = stale_temporaries(root)
    old = superseded(root, Manifest.read(root)) if (root / MANIFEST).exists() else []
    size = sum(path.stat().st_size for path in (*temporaries, *old))
    for path in (*temporaries, *old):
        path.unlink(missing_ok=True)
    _remove_empty_parents(root, old)
    leases.bury()
    Failures(root, 1).clear()
    _remove_if_empty(root / WORK_DIR)
    say(
        f"{root}: removed {len(temporaries)} temporary files, {len(old)} of earlier revisions, {size:,} bytes"
    )


def _remove_empty_parents(root: Path, files: list[Path]) -> None:
    """Removes the folders that held nothing but these files."""
    folders = {parent for file in files for parent in file.parents if parent.is_relative_to(root)} - {root}
    for folder in sorted(folders, reverse=True):
        if not any(folder.iterdir()):
            folder.rmdir()


def _remove_if_empty(folder: Path) -> None:
    """Removes the folders of leases and failures, unless somebody has begun to use them again."""
    for path in (folder / "leases", folder / "failures", folder):
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
