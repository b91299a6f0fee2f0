"""What `reshard`, `subset`, `merge` and `convert` share: room on the disk, a progress line, a last line."""

import sys

from tqdm import tqdm

from pipeline.console import log
from pipeline.encode.space import require_space
from pipeline.sources.known_roots import known_roots, remember_roots
from shards import Int8Code, Location, Recipe
from shards.metadata.layout import fields_of
from shards.storage.location import object_names, object_sizes
from shards.writing.copying import begin_copy, copy_rows
from shards.writing.selection import Selection


def copy(
    selection: Selection, recipe: Recipe, out: Location, *, command: str, code: Int8Code | None = None
) -> None:
    """Write a new store from rows of others; run again, it continues.

    Args:
        selection: The rows.
        recipe: See `shards.writing.copying.copied_recipe`.
        out: Folder of the new store.
        command: What is done, for the progress line and the store's provenance.
        code: For int8.

    Raises:
        UserError: If there is no room, a row that is read is damaged, or another store was begun in that folder.
    """
    for store in selection.stores:
        if store.manifest.fields:
            names = ", ".join(store.manifest.fields)
            log(f"fields are stores of their own and are not copied with {store.path}: {names}")
    there = sum(object_sizes(out, object_names(out)).values())
    require_space(out, expected_nbytes(selection, recipe) - there)
    writer, rows = begin_copy(selection, out, recipe, code)
    remember_roots(writer.path, [root for store in selection.stores for root in known_roots(store.path)])
    with tqdm(total=rows, unit="row", unit_scale=True, desc=command, file=sys.stderr) as bar:
        manifest = copy_rows(selection, writer, {"made by": f"pipeline {command}"}, bar.update)
    log(
        f"{out} is complete: {manifest.num_valid} rows in {recipe.num_shards} shards as {recipe.format}, "
        f"{recipe.dtype}; {manifest.num_bad} images unusable"
    )


def expected_nbytes(selection: Selection, recipe: Recipe) -> int:
    """Return the bytes that the new store's rows take; compressed rows count as the first store's, if it has any."""
    store = selection.stores[0]
    alike = {field for view in store.views for field in fields_of(store.recipe, view)}
    nbytes = 0
    for field in (field for view in recipe.views for field in fields_of(recipe, view)):
        if field.compression is None:
            nbytes += recipe.num_images * field.row_nbytes
        elif field in alike:
            stored = sum(o.nbytes for o in store.manifest.objects if o.path.startswith(f"{field.path}/c/"))
            nbytes += stored * recipe.num_images // store.recipe.num_images
        # Of other compressed rows nobody can know before.
    return nbytes
