"""`pipeline extend`: what a source has gained, in further shards, while nothing that was there moves."""

import itertools
import shutil

import numpy as np
import pytest
import zarr
from PIL import Image

from shards.errors import UsageError
from shards.metadata.plan import Plan
from shards.reading.store import open_store
from shards.storage.folder import LocalOutput
from shards.writing import finalize, revisions, shard_writer
from shards.writing.shard_writer import ShardWriter


@pytest.fixture
def grow(folder, draw):
    """Adds photographs to the folder: class by number; returns their keys."""

    def add(numbers, class_name=None):
        keys = []
        for number in numbers:
            key = f"{class_name or f'class {number % 3}'}/{number:02d}.png"
            (folder / key).parent.mkdir(exist_ok=True)
            Image.fromarray(draw(number)).save(folder / key)
            keys.append(key)
        return keys

    return add


@pytest.fixture
def store(folder, tmp_path, tiny, pipeline):
    """Encodes the folder of 21 photographs into 3 shards; returns the path."""

    def make(*more, name="store"):
        path = tmp_path / name
        code, _, err = pipeline("encode", folder, "--out", path, "--shards", 3, *more, *tiny)
        assert code == 0, err
        return path

    return make


def read_all(store, view="center", field="tokens"):
    reader = store.reader(view, field, verify="always")
    out = np.empty((len(store.valid_rows), *reader.row_shape), reader.dtype)
    reader.read(store.valid_rows, out)
    return out


def files_of(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def by_key(store, array):
    """Rows of an array over the valid rows, by key."""
    key_of = dict(zip(store.plan.rows.tolist(), store.plan.keys, strict=True))
    return {key_of[row]: array[i].tobytes() for i, row in enumerate(store.valid_rows.tolist())}


FORMS = {
    "zarr": (),
    "webdataset": ("--format", "webdataset"),
    "int8": ("--dtype", "int8", "--allow-error", 1),
    "views": ("--views", "center,flip,crop:1", "--class-token", "--image-compression", "blosc"),
}


@pytest.mark.parametrize("more", FORMS.values(), ids=FORMS)
def test_new_images_fill_further_shards_and_nothing_there_moves(
    store, grow, folder, tmp_path, pipeline, more
):
    path = store(*more)
    before, old_files = open_store(path), files_of(path)
    grow(range(21, 31))
    (folder / "class 0" / "99.png").write_bytes(b"not an image")
    code, _, err = pipeline("extend", path, folder, "--max-bad", 1)
    assert code == 0, err
    assert "11 new images" in err
    after = open_store(path)
    assert (after.recipe.num_shards, after.recipe.num_images, after.capacity) == (5, 32, 7)
    assert (after.manifest.num_valid, after.manifest.num_bad, after.manifest.revision) == (31, 1, 1)
    now = files_of(path)
    changed = {name for name, content in old_files.items() if now.get(name) != content}
    arrays = {name for name in old_files if name.endswith("/zarr.json") and name.count("/") == 2}
    assert changed == {"manifest.json"} | ({n for n in arrays if n.startswith(before.views)})
    # rows keep their number
    assert after.plan.keys[:21].tolist() == before.plan.keys.tolist()
    assert np.array_equal(after.plan.rows[:21], before.plan.rows)
    assert np.array_equal(after.labels[: before.num_rows], before.labels)
    # the reader of before is undisturbed, what it had not read yet included
    assert len(before.valid_rows) == 21
    assert before.statistics().count == 21 * len(before.views)
    assert len(read_all(before)) == 21
    # tokens, statistics and code error are those of all images encoded at once
    code, _, err = pipeline("verify", path)
    assert code == 0, err
    if "int8" not in more:  # its code is fitted to the images there are
        whole = open_store(store(*more, "--max-bad", "1", name="whole"))
        assert by_key(after, read_all(after)) == by_key(whole, read_all(whole))
        for view in whole.views:
            assert np.allclose(
                after.statistics([view]).mean, whole.statistics([view]).mean, rtol=1e-12, atol=1e-14
            )
            assert np.allclose(
                after.statistics([view]).variance, whole.statistics([view]).variance, rtol=1e-12
            )
    if "webdataset" not in more:
        array = zarr.open_array(path / "center" / "tokens", mode="r")
        assert array.shape[0] == after.num_rows
        assert np.array_equal(array[after.valid_rows], read_all(after), equal_nan=True)
    # and the earlier stage is what it was, by the new manifest
    stage = after.at_stage(0)
    assert stage.id == before.id
    assert np.array_equal(stage.valid_rows, before.valid_rows)
    assert np.array_equal(stage.labels, before.labels)
    assert stage.class_names == before.class_names
    for view in before.views:
        mine, theirs = stage.statistics([view]), before.statistics([view])
        assert mine.mean.tobytes() == theirs.mean.tobytes()
        assert mine.variance.tobytes() == theirs.variance.tobytes()
        if before.code is not None:
            assert np.array_equal(stage.code_error(view), before.code_error(view))
    assert np.array_equal(read_all(stage), read_all(before))
    assert stage.index.table("key").num_rows == 21


def test_two_extensions_a_view_and_a_run_cut_short_anywhere_give_the_bytes_of_an_uninterrupted_one(
    store, grow, folder, tmp_path, pipeline, monkeypatch
):
    path = store("--views", "center")
    shutil.copytree(path, tmp_path / "cut" / "store")
    cut = tmp_path / "cut" / "store"
    grow(range(21, 30))
    assert pipeline("extend", path, folder)[0] == 0
    survived = 0
    for allowed in itertools.count():
        with monkeypatch.context() as patch:
            stop_after(patch, allowed)
            code, _, err = pipeline("extend", cut, folder)
        if code == 0:
            break
        survived += 1
        assert code == 130, err
        # whenever it is cut short, the store can be opened and is what it was, or all of what it is to be
        found = open_store(cut)
        assert found.recipe.num_shards in (3, 5)
        assert len(read_all(found)) == len(found.valid_rows)
        if allowed % 4 == 0:
            problems = pipeline("verify", cut)
            assert problems[0] == 0 or "other readers of zarr" in problems[1] + problems[2]
    assert survived > 8
    assert timeless(files_of(cut)) == timeless(files_of(path))
    grow([40, 41])
    for one in (path, cut):
        assert pipeline("extend", one, folder)[0] == 0
        assert pipeline("add-view", one, "--views", "flip")[0] == 0
        assert pipeline("clean", one, "--wait", 0)[0] == 0
        assert pipeline("verify", one)[0] == 0
    assert timeless(files_of(cut)) == timeless(files_of(path))
    after = open_store(path)
    assert (after.recipe.num_images, after.recipe.num_shards, after.manifest.num_valid) == (32, 6, 32)
    assert [after.at_stage(stage).manifest.recipe.at_stage(stage).num_images for stage in (0, 1, 2)] == [
        21,
        30,
        32,
    ]
    assert [after.at_stage(stage).statistics(["center"]).count for stage in (0, 1, 2)] == [21, 30, 32]
    assert [len(list(path.glob("plan-*.parquet")))] == [1]


def stop_after(patch, allowed):
    """Interrupts the process before whichever file comes after so many have been put in place."""
    left = [allowed]

    def counted(function):
        def put(*arguments, **more):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return function(*arguments, **more)

        return put

    for module in (shard_writer, revisions, finalize):
        for name in ("publish_bytes", "replace_atomically"):
            if hasattr(module, name):
                patch.setattr(module, name, counted(getattr(module, name)))
    patch.setattr(LocalOutput, "publish", counted(LocalOutput.publish))


def timeless(files):
    """Digests of files whose content does not tell how long it took."""
    named = (".parquet", ".npy", "zarr.json", "/0")
    return {name: content for name, content in files.items() if name.endswith(named)}


def test_a_changed_image_is_named_and_left_and_one_that_is_gone_stays(
    store, grow, folder, tmp_path, pipeline
):
    path = store("--views", "center")
    before = read_all(open_store(path))
    grow([25], "a class before all others")
    (folder / "class 0" / "00.png").write_bytes((folder / "class 1" / "01.png").read_bytes() + b"more")
    (folder / "class 2" / "02.png").unlink()
    code, _, err = pipeline("extend", path, folder)
    assert code == 0, err
    assert f"1 images of {path} are gone from the source, and stay in the store: class 2/02.png" in err
    assert "1 images have another size or class than before" in err
    assert "the store keeps them as they were encoded: class 0/00.png" in err
    assert "1 new images and 1 new classes: a class before all others" in err
    after = open_store(path)
    assert np.array_equal(read_all(after)[:21], before)
    assert after.class_names == ("class 0", "class 1", "class 2", "a class before all others")
    assert after.labels[after.valid_rows[-1]] == 3
    assert after.at_stage(0).num_classes == 3
    files = files_of(path)
    code, _, err = pipeline("extend", path, folder)
    assert (code, f"{path} has every image of {folder} already" in err) == (0, True)
    assert files_of(path) == files
    code, _, err = pipeline("encode", folder, "--out", path, "--shards", 3, "--views", "center")
    assert (code, err.count("\n") < 4) != (0, True)


def test_new_images_may_come_alone_and_labels_may_name_their_classes(store, folder, tmp_path, draw, pipeline):
    path = store("--views", "center")
    more = tmp_path / "more" / "zebra"
    more.mkdir(parents=True)
    Image.fromarray(draw(50)).save(more / "50.png")
    labels = tmp_path / "labels.txt"
    labels.write_text("zebra\nclass 0\nclass 1\nclass 2\n")
    code, _, err = pipeline("extend", path, more.parent, "--labels", labels)
    assert (code, "an extension keeps the labels there are" in err) == (2, True)
    labels.write_text("class 0\nclass 1\nclass 2\nyak\nzebra\n")
    code, _, err = pipeline("extend", path, more.parent, "--labels", labels)
    assert code == 0, err
    assert f"{more.parent} holds new images alone; the 21 that {path} has stay" in err
    after = open_store(path)
    assert after.class_names == ("class 0", "class 1", "class 2", "yak", "zebra")
    assert after.labels[after.valid_rows[-1]] == 4
    assert Plan.read(path / "plan.parquet").num_images == 21


def test_a_flipped_bit_of_what_an_extension_added_is_found(store, grow, folder, pipeline):
    path = store("--views", "center")
    grow(range(21, 24))
    assert pipeline("extend", path, folder)[0] == 0
    own = [
        "center/tokens/c/3/0/0",
        "commits/center/00003.json",
        "center/tokens/zarr.json",
        "revisions/1/stats/stage-0/center/mean/c/0/0/0",
        next(path.glob("plan-*.parquet")).name,
    ]
    for name in own:
        content = (path / name).read_bytes()
        damaged = bytearray(content)
        damaged[len(content) // 3] ^= 4
        (path / name).write_bytes(damaged)
        code, out, err = pipeline("verify", path)
        assert (code, name in out + err) == (1, True), name
        (path / name).write_bytes(content)
    assert pipeline("verify", path)[0] == 0
    # a damaged shard of either part is encoded again by the same command
    for shard in (0, 3):
        name = f"center/tokens/c/{shard}/0/0"
        whole = (path / name).read_bytes()
        (path / name).write_bytes(bytes(len(whole)))
        code, _, err = pipeline("verify", path, "--withdraw", "--wait", 0)
        assert not (path / "manifest.json").exists(), err
        code, _, err = pipeline("extend", path, folder)
        assert code == 0, err
        assert (path / name).read_bytes() == whole
        assert pipeline("verify", path)[0] == 0


def test_what_cannot_be_extended_is_refused_in_one_line(store, grow, folder, tmp_path, tiny, pipeline):
    path = store("--views", "center")
    other = store("--views", "center", "--seed", 1, name="other")
    grow([21])
    for arguments, code, message in (
        ((tmp_path / "none", folder), 2, "is not a store"),
        ((path, tmp_path / "none"), 2, "none"),
        ((path, other), 2, "`pipeline merge` puts the rows of two stores into one"),
        ((path, folder, "--weights", "random:1"), 1, "belongs to another encoder: weights_digest"),
        ((path, folder, "--batch-size", 3), 2, "was begun with --batch-size 64, not 3"),
        ((path, folder, "--compressor", "x"), 2, "is not a derived field; leave out --compressor"),
    ):
        found, _, err = pipeline("extend", *arguments)
        errors = [line for line in err.splitlines() if line.startswith("error")]
        assert (found, len(errors), message in errors[-1]) == (code, 1, True), err
    assert not (path / "revisions").exists()
    code, _, err = pipeline("encode", folder, "--out", path, "--shards", 3, "--views", "center", *tiny)
    assert (code, "1 source images are new" in err, "`pipeline extend STORE SOURCE`" in err) == (
        1,
        True,
        True,
    )
    (other / "manifest.json").unlink()
    code, _, err = pipeline("extend", other, folder)
    assert (code, "is not finished" in err) == (1, True)


def test_an_extension_that_was_begun_is_finished_with_its_own_images_or_given_up(
    store, grow, folder, pipeline, monkeypatch
):
    path = store("--views", "center")
    before = files_of(path)
    grow([21, 22])
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert pipeline("extend", path, folder)[0] == 130
    assert pipeline("verify", path)[0] == 0
    code, _, err = pipeline("add-view", path, "--views", "flip")
    assert (code, "is being added to in another way" in err) == (1, True)
    grow([23])
    code, _, err = pipeline("clean", path, "--give-up", "--wait", 0)
    assert code == 0, err
    assert files_of(path) == before
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "publish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        assert pipeline("extend", path, folder)[0] == 130
    assert pipeline("clean", path, "--wait", 0)[0] == 0
    grow([24])
    code, _, err = pipeline("extend", path, folder)
    assert (code, "finishing the extension" in err) == (0, True), err
    assert open_store(path).recipe.num_images == 24
    assert pipeline("extend", path, folder)[0] == 0
    assert open_store(path).recipe.num_images == 25


def test_fields_are_named_as_behind_and_catch_up_with_the_rows_of_their_store(
    store, grow, folder, tmp_path, tiny, pipeline
):
    path = store("--views", "center")
    field = path / "fields" / "other"
    other = [*tiny[:3], "random:1", *tiny[4:]]
    assert pipeline("add-field", path, "--name", "other", *other)[0] == 0
    grow(range(21, 31))
    code, _, err = pipeline("extend", path, folder)
    assert code == 0, err
    assert f"field other is behind by 10 images; `pipeline extend {field} {path}` catches up" in err
    with pytest.raises(UsageError, match="is behind by 10 images; `pipeline extend"):
        open_store(path).reader("center", "other")
    assert open_store(path).at_stage(0).field("other").recipe.num_images == 21
    code, _, err = pipeline("extend", field, folder)
    message = f"has its rows; extend {path} by new images, and the field by {path}: `pipeline extend {field} {path}`"
    assert (code, message in err) == (2, True), err
    code, _, err = pipeline("extend", field, path)
    assert code == 0, err
    assert open_store(path).at_stage(0).field("other").recipe.num_images == 21
    outer, inner = open_store(path), open_store(field)
    assert inner.plan == outer.plan
    assert inner.recipe.earlier == outer.recipe.earlier
    shard = "center/image/c/4/0/0/0"
    assert (path / shard).stat().st_ino == (field / shard).stat().st_ino
    assert pipeline("verify", path)[0] == 0
    assert pipeline("add-field", path, "--name", "third", *other)[0] == 0
    third = open_store(path / "fields" / "third")
    assert third.plan == outer.plan
    assert np.array_equal(read_all(third), read_all(inner))


def test_commands_that_copy_and_tell_work_on_an_extended_store(store, grow, folder, tmp_path, pipeline):
    path = store("--views", "center")
    grow(range(21, 31))
    assert pipeline("extend", path, folder)[0] == 0
    whole = open_store(path)
    for number, (command, *arguments) in enumerate(
        (
            ("reshard", "--shards", 5),
            ("convert", "--format", "webdataset"),
            ("convert", "--format", "zarr", "--compression", "zstd"),
            ("subset", "--sample", 10),
        )
    ):
        out = tmp_path / f"copy{number}"
        code, _, err = pipeline(command, path, "--out", out, *arguments)
        assert code == 0, err
        assert pipeline("verify", out)[0] == 0
        copy = open_store(out)
        rows, old = by_key(copy, read_all(copy)), by_key(whole, read_all(whole))
        assert rows.items() <= old.items()
        assert bool(copy.recipe.earlier) == (command == "convert")
    other = store("--views", "center", name="other")
    for command in (("inspect", path), ("stats", path), ("report", path), ("diff", path, other)):
        code, out, err = pipeline(*command)
        assert code in (0, 1), err
        assert "error" not in err, err
    assert "extended" in pipeline("inspect", path)[1]
