"""Room on the disk, asked for before long work is begun."""

from collections.abc import Collection

from shards import Location, Plan, Recipe, UserError
from shards.metadata.layout import commit_path, fields_of
from shards.storage.location import free_bytes, object_sizes


def require_space(path: Location, nbytes: int) -> None:
    """Refuse to begin what will not fit.

    Args:
        path: Folder that will be written, or is begun.
        nbytes: What is still to be written.

    Raises:
        UserError: If less than that is free.
    """
    free = free_bytes(path)
    if free is not None and nbytes > free:
        raise UserError(
            f"{path} needs {gigabytes(nbytes)} more, and {gigabytes(free)} are free there; "
            "free space or name another folder"
        )


def missing_nbytes(
    path: Location, recipe: Recipe, plan: Plan, names: Collection[str] = ("tokens", "cls", "image")
) -> int:
    """Return the bytes that a store's missing rows will take; 0 for compressed rows, whose size is not known before.

    Args:
        path: The store, begun or not.
        recipe: What it will hold.
        plan: Which image goes where.
        names: Arrays of a view that count.
    """
    records = [commit_path(view, shard) for view in recipe.views for shard in range(recipe.num_shards)]
    done = object_sizes(path, records)
    return sum(
        plan.shard_size(shard) * field.row_nbytes
        for view in recipe.views
        for field in fields_of(recipe, view)
        for shard in range(recipe.num_shards)
        if field.name in names and field.compression is None and commit_path(view, shard) not in done
    )


def gigabytes(size: float) -> str:
    """Return a number of bytes in three digits."""
    return f"{size / 1e9:,.3g} GB" if size < 1e12 else f"{size / 1e12:,.3g} TB"
