"""Images mended after the plan was made: whatever reads the image files of the store later takes them as they are."""

import pytest

from shards.reading.store import open_store

MENDED = "class 1/04.png"


@pytest.fixture
def store(folder, tmp_path, tiny, pipeline):
    """A store in two views, one of whose rows was filled by `--retry-quarantined` from a file of another size."""
    whole = (folder / MENDED).read_bytes()
    (folder / MENDED).write_bytes(whole[:50])
    command = ("encode", folder, "--out", tmp_path / "store", "--shards", 3, *tiny)
    assert pipeline(*command)[0] == 0
    (folder / MENDED).write_bytes(whole)
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


def test_a_view_added_after_a_retry_has_the_mended_rows(folder, store, pipeline):
    code, _, err = pipeline("add-view", store, "--views", "crop:1")
    assert code == 0, err
    assert num_bad(store) == 0, err
    assert open_store(store).mended == {MENDED: (folder / MENDED).stat().st_size}
    assert pipeline("verify", store)[0] == 0


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_a_store_made_from_one_with_mended_rows_has_them_and_hands_them_on(
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


def test_a_copy_of_a_store_with_mended_rows_takes_further_views(store, tmp_path, pipeline):
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


def test_a_size_that_is_neither_the_plans_nor_the_mended_ones_is_refused(folder, store, again):
    with (folder / MENDED).open("ab") as file:
        file.write(b"x")
    code, err = again()
    assert code != 0
    assert f"1 source images have another size or class, such as {MENDED}" in err


def test_a_retry_for_other_rows_keeps_what_is_known_of_the_mended_ones(folder, tmp_path, tiny, pipeline):
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
    assert open_store(tmp_path / "store").mended == sizes
    assert pipeline(*command)[0] == 0


def test_a_shard_that_is_made_again_reads_the_mended_images(store, again):
    for path in [
        *store.glob("flip/tokens/c/*/0/0"),
        *store.glob("commits/flip/*.json"),
        store / "manifest.json",
    ]:
        path.unlink()
    code, err = again()
    assert code == 0, err
    assert num_bad(store) == 0, err


def test_only_records_of_shards_with_mended_images_say_so(store):
    said = ['"mended"' in path.read_text() for path in sorted(store.glob("commits/center/*.json"))]
    assert sorted(said) == [False, False, True]


def test_a_retry_that_was_killed_before_its_last_step_still_says_what_was_mended(store, again):
    sizes = open_store(store).mended
    (store / "manifest.json").unlink()
    for record in sorted(store.glob("commits/*/*.json")):
        staged = store / ".work" / "retry" / record.relative_to(store)
        staged.parent.mkdir(parents=True, exist_ok=True)
        record.rename(staged)
    code, err = again("--retry-quarantined")
    assert code == 0, err
    assert open_store(store).mended == sizes
    assert num_bad(store) == 0
