"""Image files that were repaired after the plan was made, and have another size since.

No line of a plan ever changes, because its digest is part of the recipe's. ``repaired.json`` stands beside it and says
how many bytes each repaired image has now; `read_plan` gives the plan with these sizes, and nothing else has to know.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass

from shards.documents import read_document
from shards.errors import StoreDamagedError, UserError
from shards.metadata.commit import CommitRecord
from shards.metadata.identity import Recipe
from shards.metadata.layout import REPAIRED, commit_path, plan_path
from shards.metadata.plan import Plan
from shards.metadata.root import read_recipe
from shards.storage.location import Location, read_object, read_objects, replace_atomically


def read_plan(root: Location, recipe: Recipe) -> Plan:
    """Return the plan of a store, finished or not, with the sizes its images have now.

    Args:
        root: The store.
        recipe: Of one of its revisions.

    Raises:
        StoreDamagedError: If the plan or ``repaired.json`` is not readable.
    """
    plan = Plan.read(root / plan_path(recipe))
    return plan.with_repaired(_recorded(root, plan))


def require_planned(recipe: Recipe, plan: Plan, *, path: object) -> None:
    """Refuse a recipe of other counts than the plan's, whose rows show what is right.

    Raises:
        StoreDamagedError: Naming ``path``.
    """
    asked = (recipe.num_images, recipe.num_shards, recipe.seed)
    given = (plan.num_images, plan.num_shards, plan.seed)
    if asked != given or recipe.earlier != plan.earlier:
        raise StoreDamagedError(
            f"{path} has images, shards and seed {given}, the store's recipe {asked}; restore what is wrong"
        )


def record_repaired(root: Location, plan: Plan) -> Plan:
    """Add what a plan knows of repaired images to a store; nobody may read it as a finished one.

    Args:
        root: A store that has this plan.
        plan: With the sizes of some repaired images.

    Returns:
        The plan with all sizes that are recorded then.
    """
    known = _recorded(root, plan)
    sizes = {**known, **plan.repaired}
    if plan.repaired.items() - known.items():
        content = json.dumps({"nbytes": sizes}, indent=1, sort_keys=True, ensure_ascii=False)
        replace_atomically(root / REPAIRED, content.encode())
    return plan.with_repaired(sizes)


def continued_plan(root: Location, listing: Plan, recipe: Recipe) -> Plan:
    """Return the plan of a store, if a new listing is of the same images, some of them repaired since.

    Args:
        root: A store.
        listing: What would be the plan of a new store.
        recipe: Of the store's newest revision.

    Returns:
        The listing itself where the store is of other images.
    """
    begun = read_plan(root, recipe)
    if any(listing == plan or listing.deals_images_of(plan) for plan in (begun, begun.as_listed_now())):
        return begun.with_repaired({**begun.repaired, **listing.repaired})
    return listing


def _recorded(root: Location, plan: Plan) -> dict[str, int]:
    path = root / REPAIRED
    try:
        content = read_object(path)
    except FileNotFoundError:
        return _in_commit_records(root, plan)
    return read_document(
        content, _Document, name=path, error=StoreDamagedError, remedy="restore it from a copy"
    ).nbytes


@dataclass(frozen=True, kw_only=True)
class _Document:
    """``repaired.json``."""

    nbytes: dict[str, int]

    def __post_init__(self) -> None:
        """Refuse sizes no file can have."""
        for key, nbytes in self.nbytes.items():
            if not 0 <= nbytes < 1 << 63:
                raise UserError(f"nbytes of {key} is {nbytes}")


def _in_commit_records(root: Location, plan: Plan) -> dict[str, int]:
    """Return sizes that stores of earlier versions have in their commit records, by slot."""
    recipe = read_recipe(root)
    plan = plan.at_stage(min(len(recipe.earlier), len(plan.earlier)))  # only stores of then have such records
    require_planned(recipe, plan, path=root / plan_path(recipe))
    names = [commit_path(view, shard) for view in recipe.views for shard in range(recipe.num_shards)]
    sizes: dict[str, int] = {}
    for name, content in read_objects(root, names).items():
        if b'"mended"' in content:
            # A record that is damaged is none: whoever needs the shard it describes says so.
            with suppress(StoreDamagedError):
                record = CommitRecord.from_bytes(content, path=root / name)
                record.require_fits(recipe, path=root / name)
                images = plan.records_of(record.shard)
                sizes |= {images[slot].key: nbytes for slot, nbytes in record.repaired.items()}
    return sizes
