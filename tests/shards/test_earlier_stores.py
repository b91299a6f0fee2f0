"""Stores that earlier versions wrote open and read bit for bit, and can be worked on.

``fixtures/stores/version_1.tar.xz`` holds stores written before the modules of `shards` got their rooms: float16 in
zarr format with statistics from a file and an added field, and int8 in webdataset format; one image of each was
repaired, and its size recorded in commit records. ``version_1.json`` is what the program that wrote them read.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from shards import StoreWriter, open_store, verify_store
from shards.writing.copying import begin_copy, copied_recipe, copy_rows
from shards.writing.selection import every_row

FIXTURES = Path(__file__).parents[1] / "fixtures" / "stores"
EXPECTED = json.loads((FIXTURES / "version_1.json").read_text())


@pytest.fixture
def stores(tmp_path):
    with tarfile.open(FIXTURES / "version_1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def sha(array):
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def facts(store):
    """The same of a store as ``version_1.json`` has."""
    found = {
        "digest": store.manifest.digest,
        "repaired": store.repaired,
        "valid_rows": store.valid_rows.tolist(),
        "labels": store.labels.tolist(),
        "recipe": store.recipe.id,
        "encoder": store.recipe.encoder.id,
        "keys": store.plan.keys.tolist(),
    }
    for exact in (False, True):
        statistics = store.statistics(exact=exact)
        parts = [sha(statistics.mean), sha(statistics.variance), statistics.count]
        found[f"statistics exact={exact}"] = parts
    for view in store.views:
        for field in ("tokens", "image"):
            reader = store.reader(view, field)
            rows = np.empty((len(store.valid_rows), *reader.row_shape), reader.dtype)
            reader.read(store.valid_rows, rows)
            found[f"{view}/{field}"] = sha(rows)
            if field == "tokens":
                found[f"{view}/decoded"] = sha(store.decode(rows))
        error = store.code_error(view)
        found[f"{view}/code error"] = None if error is None else sha(error)
    return found


@pytest.mark.parametrize("name", sorted(EXPECTED))
def test_an_earlier_store_reads_as_the_program_that_wrote_it_read_it(stores, name):
    assert verify_store(stores / name) == []
    assert facts(open_store(stores / name)) == EXPECTED[name]


@pytest.mark.parametrize("name", ["zarr-float16", "webdataset-int8"])
def test_an_earlier_store_is_finished_again_and_copied_with_the_sizes_of_its_repaired_images(stores, name):
    store = open_store(stores / name)
    (sizes,) = {tuple(store.repaired.items())}
    assert StoreWriter.open(store.path).plan.repaired == dict(sizes)
    (store.path / "manifest.json").unlink()
    again = StoreWriter.open(store.path)
    assert again.pending() == []
    again.finalize(store.manifest.provenance)
    assert facts(open_store(store.path)) == EXPECTED[name]

    selection = every_row(open_store(store.path))
    writer, _ = begin_copy(selection, stores / "copy", copied_recipe(selection), store.code)
    copy_rows(selection, writer, {})
    copy = open_store(stores / "copy")
    assert verify_store(copy.path) == []
    assert copy.repaired == dict(sizes)
    assert {part: value for part, value in facts(copy).items() if part != "digest"} == {
        part: value for part, value in EXPECTED[name].items() if part != "digest"
    }
