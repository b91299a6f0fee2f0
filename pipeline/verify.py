"""`pipeline verify`: every byte of a store against its manifest, damage named down to the row."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from pipeline.config import VerifyConfig
from pipeline.console import say
from pipeline.cores import usable_cores
from pipeline.leases import WORK_DIR
from shards.atomic import is_temporary
from shards.checksum import crc32c
from shards.commit import ObjectRecord
from shards.errors import StoreDamagedError
from shards.forms import object_path
from shards.identity import Recipe
from shards.index import Index
from shards.layout import INDEX, MANIFEST, PLAN, Field, fields_of
from shards.manifest import Manifest
from shards.plan import Plan
from shards.published import object_record, published_rows
from shards.root import read_recipe

_ROWS_NAMED = 8


def verify(config: VerifyConfig) -> None:
    """Re-reads a store and says what is wrong with it.

    Raises:
        StoreIncompleteError: If the store has no manifest yet.
        StoreDamagedError: If anything in it is not what the manifest says.
    """
    root = config.store
    recipe = read_recipe(root)
    manifest = Manifest.read(root)
    problems = []
    if manifest.recipe.id != recipe.id:
        problems.append(f"zarr.json and {MANIFEST} differ: {'; '.join(manifest.recipe.diff(recipe))}")
    wrong = dict(_wrong_objects(root, manifest))
    problems += [f"{path}: {what}" for path, what in wrong.items()]
    problems += list(_damaged_rows(root, manifest.recipe, set(wrong)))
    problems += [f"{path}: is not part of the store" for path in _unknown_files(root, manifest)]
    for problem in problems:
        say(f"  {problem}")
    if problems:
        raise StoreDamagedError(
            f"{root} is damaged: {len(problems)} problems, named above; restore it or encode anew"
        )
    total = sum(record.nbytes for record in manifest.objects)
    say(
        f"{root} is as its manifest says: {len(manifest.objects)} objects, {total:,} bytes, "
        f"{manifest.num_valid} rows, {manifest.num_bad} images unusable"
    )


def _wrong_objects(root: Path, manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Path and fault of each object whose size or digest is not the manifest's."""
    with (
        ThreadPoolExecutor(usable_cores(), thread_name_prefix="verify") as pool,
        tqdm(total=sum(o.nbytes for o in manifest.objects), unit="B", unit_scale=True, desc="verify") as bar,
    ):
        # As an iterator this keeps the manifest's order and holds no object's content.
        for record, fault in pool.map(lambda record: (record, _fault_of(root, record)), manifest.objects):
            bar.update(record.nbytes)
            if fault is not None:
                yield record.path, fault


def _fault_of(root: Path, record: ObjectRecord) -> str | None:
    try:
        found = object_record(root, record.path)
    except (FileNotFoundError, NotADirectoryError):
        return "is missing"
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    if found.nbytes != record.nbytes:
        return f"has {found.nbytes} bytes instead of {record.nbytes}"
    return None if found.sha256 == record.sha256 else "holds other bytes than were written"


def _damaged_rows(root: Path, recipe: Recipe, wrong: set[str]) -> Iterator[str]:
    """Which rows of the wrong shards are damaged, as far as index and plan can still tell."""
    if not wrong or {INDEX, PLAN} & wrong:
        return
    plan = Plan.read(root / PLAN)
    index = Index((root / INDEX).read_bytes(), plan.rows, recipe.num_rows, path=root / INDEX)
    for view in recipe.views:
        for field in fields_of(recipe, view):
            for shard in range(recipe.num_shards):
                if object_path(recipe, field, shard) in wrong:
                    yield from _damaged_rows_of(root, recipe, plan, index, field, shard)


def _damaged_rows_of(
    root: Path, recipe: Recipe, plan: Plan, index: Index, field: Field, shard: int
) -> Iterator[str]:
    first = shard * recipe.capacity
    expected = index.checksums(field.path)[first : first + recipe.capacity]
    present = dict(zip(plan.rows_of(shard), plan.records_of(shard), strict=True))
    rows: list[int] = []
    try:
        for place, row in published_rows(root, recipe, field, shard):
            if (0 if row is None else crc32c(row)) != expected[place]:
                rows.append(first + place)
    except (StoreDamagedError, FileNotFoundError) as error:
        yield str(error)
    for number in rows[:_ROWS_NAMED]:
        source = present[number].key if number in present else "no image"
        yield f"{field.path}: shard {shard}, row {number} ({source}) is damaged"
    if len(rows) > _ROWS_NAMED:
        yield f"{field.path}: shard {shard}, and {len(rows) - _ROWS_NAMED} more rows"


def _unknown_files(root: Path, manifest: Manifest) -> list[str]:
    """Files that are neither the store's nor a worker's temporary ones."""
    known = {*manifest.by_path, MANIFEST}
    unknown = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if (
            path.is_file()
            and name not in known
            and not is_temporary(path)
            and not name.startswith(f"{WORK_DIR}/")
        ):
            unknown.append(name)
    return unknown
