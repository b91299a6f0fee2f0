"""Images repaired after the plan was made: whatever reads the image files of the store later takes them as they are."""

import json
import shutil

import pytest

from pipeline.encode.leases import Leases, Owner
from shards import StoreIncompleteError, open_store

REPAIRED = "class 1/04.png"


@pytest.fixture
def store(folder, tmp_path, tiny, pipeline):
    """A store in two views, one of whose rows was filled by `--retry-quarantined` from a file of another size."""
    whole = (folder / REPAIRED).read_bytes()
    (folder / REPAIRED).write_bytes(whole[:50])
    command = ("encode", folder, "--out", tmp_path / "store", "--shards", 3, *tiny)
    assert pipeline(*command)[0] == 0
    (folder / REPAIRED).write_bytes(whole)
    assert pipeline(*command, "--retry-quarantined")[0] == 0
    assert open_store(tmp_path / "store").manifest.num_bad == 0
    return tmp_path / "store"


@pytest.fixture
def again(folder, store, tiny, pipeline):
    """Runs the command again that wrote the store; gives its exit code and standard error."""

    def run(*more):
        code, _, err = pipeline("encode", folder, "--out", store, "--shards", 3, *tiny, *more)
        return code, err

    return run


def num_bad(path):
    return open_store(path).manifest.num_bad


def test_a_view_added_after_a_retry_has_the_repaired_rows(folder, store, pipeline):
    code, _, err = pipeline("add-view", store, "--views", "crop:1")
    assert code == 0, err
    assert num_bad(store) == 0, err
    assert open_store(store).repaired == {REPAIRED: (folder / REPAIRED).stat().st_size}
    assert pipeline("verify", store)[0] == 0


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_a_store_made_from_one_with_repaired_rows_has_them_and_hands_them_on(
    store, tmp_path, tiny, pipeline, form
):
    one, other = tmp_path / "larger", tmp_path / "larger still"
    for source, out, size in ((store, one, 48), (one, other, 64)):
        code, _, err = pipeline(
            "encode", source, "--out", out, "--shards", 2, "--image-size", size, "--format", form, *tiny
        )
        assert code == 0, err
        assert "reading the image files" in err
        assert num_bad(out) == 0, err


def test_a_field_added_after_a_retry_has_the_plan_of_the_store(store, tiny, pipeline):
    for _ in range(2):
        code, _, err = pipeline(
            "add-field", store, "--name", "other", *tiny[:2], "--weights", "random:1", *tiny[4:]
        )
        assert code == 0, err
        assert num_bad(store / "fields" / "other") == 0


def test_a_copy_of_a_store_with_repaired_rows_takes_further_views(store, tmp_path, pipeline):
    for name, command in (
        ("dealt", ("reshard", "--shards", 2)),
        ("tars", ("convert", "--format", "webdataset")),
    ):
        code, _, err = pipeline(command[0], store, "--out", tmp_path / name, *command[1:])
        assert code == 0, err
        assert pipeline("add-view", tmp_path / name, "--views", "crop:1")[0] == 0
        assert num_bad(tmp_path / name) == 0
        assert pipeline("verify", tmp_path / name)[0] == 0


def test_the_same_command_after_a_retry_finds_the_store_complete(store, again):
    before = open_store(store).manifest.digest
    code, err = again()
    assert code == 0, err
    assert "is complete: 21 of 21 images" in err
    assert open_store(store).manifest.digest == before


def test_a_size_that_is_neither_the_plans_nor_the_repaired_ones_is_refused(folder, store, again):
    with (folder / REPAIRED).open("ab") as file:
        file.write(b"x")
    code, err = again()
    assert code != 0
    assert f"1 source images have another size or class, such as {REPAIRED}" in err


def test_a_retry_for_other_rows_keeps_what_is_known_of_the_repaired_ones(folder, tmp_path, tiny, pipeline):
    names = [f"class {number % 3}/{number:02d}.png" for number in (4, 5)]
    whole = [(folder / name).read_bytes() for name in names]
    for name, content in zip(names, whole, strict=True):
        (folder / name).write_bytes(content[:50])
    command = ("encode", folder, "--out", tmp_path / "store", "--shards", 1, *tiny)
    assert pipeline(*command)[0] == 0
    for name, content in zip(names, whole, strict=True):
        (folder / name).write_bytes(content)
        assert pipeline(*command, "--retry-quarantined")[0] == 0
    sizes = dict(zip(names, map(len, whole), strict=True))
    assert open_store(tmp_path / "store").repaired == sizes
    assert pipeline(*command)[0] == 0


def test_a_shard_that_is_made_again_reads_the_repaired_images(store, again):
    for path in [
        *store.glob("flip/tokens/c/*/0/0"),
        *store.glob("commits/flip/*.json"),
        store / "manifest.json",
    ]:
        path.unlink()
    code, err = again()
    assert code == 0, err
    assert num_bad(store) == 0, err


def test_only_a_store_with_repaired_images_says_so(folder, store, tmp_path, tiny, pipeline):
    assert json.loads((store / "repaired.json").read_bytes()) == {
        "nbytes": {REPAIRED: (folder / REPAIRED).stat().st_size}
    }
    assert "repaired.json" in open_store(store).manifest.by_path
    assert pipeline("encode", folder, "--out", tmp_path / "whole", "--shards", 3, *tiny)[0] == 0
    assert not (tmp_path / "whole" / "repaired.json").exists()


def test_every_view_of_a_shard_may_be_withdrawn_and_its_repaired_images_are_still_read(
    store, again, pipeline
):
    sizes = open_store(store).repaired
    for path in store.glob("*/tokens/c/*/0/0"):
        path.unlink()
    assert "6 damaged shards" in pipeline("verify", store, "--withdraw")[2]
    code, err = again()
    assert code == 0, err
    assert open_store(store).repaired == sizes
    assert num_bad(store) == 0


def test_a_retry_that_is_killed_anywhere_is_finished_by_the_same_command(folder, tmp_path, tiny, pipeline):
    """After each of its removals, in their order, the store is left as a kill would leave it."""
    whole = (folder / REPAIRED).read_bytes()
    (folder / REPAIRED).write_bytes(whole[:50])
    command = ("encode", folder, "--shards", 2, *tiny)
    assert pipeline(*command, "--out", tmp_path / "before")[0] == 0
    (folder / REPAIRED).write_bytes(whole)
    bad = [path for path in tmp_path.glob("before/commits/*/*.json") if json.loads(path.read_bytes())["bad"]]
    (shard,) = {int(path.stem) for path in bad}
    removals = [
        "manifest.json",
        f"center/tokens/c/{shard}/0/0",
        f"center/image/c/{shard}/0/0/0",
        f"commits/center/{shard:05d}.json",
        f"flip/tokens/c/{shard}/0/0",
    ]
    names = [name for name in removals if "/c/" in name] + ["stats/flip/mean/c/0/0/0"]
    found = []
    for count in range(len(removals) + 1):
        store = tmp_path / f"store {count}"
        shutil.copytree(tmp_path / "before", store)
        for name in removals[:count]:
            (store / name).unlink()
        if count > 1:  # the sizes are recorded behind the manifest's removal
            (store / "repaired.json").write_text(json.dumps({"nbytes": {REPAIRED: len(whole)}}))
        if count:
            with pytest.raises(StoreIncompleteError, match="is not finished"):
                open_store(store)
        code, _, err = pipeline(*command, "--out", store, "--retry-quarantined")
        assert code == 0, err
        assert pipeline("verify", store)[0] == 0
        assert num_bad(store) == 0
        found.append({path: (store / path).read_bytes() for path in names})
    assert all(content == found[0] for content in found)


def test_a_retry_is_refused_while_somebody_writes_the_store(folder, store, again):
    with Leases(store, Owner.this_process("worker 7")) as leases:
        assert leases.take("shard-00001")
        code, err = again("--retry-quarantined")
    assert code == 1
    assert "can be retried when nobody writes it, worker 7" in err
    assert (store / "manifest.json").exists()
