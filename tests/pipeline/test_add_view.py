"""`pipeline add-view`: what it adds is what an encode of all views would have written, and nobody is disturbed."""

import numpy as np
import pytest

from shards.reading.store import open_store
from shards.writing.shard_writer import ShardWriter


@pytest.fixture
def encode(folder, tmp_path, tiny, pipeline):
    """Encodes the folder into a store with some views; returns its path."""

    def run(name, views, *more):
        arguments = (
            "encode",
            folder,
            "--out",
            tmp_path / name,
            "--shards",
            3,
            "--views",
            views,
            *more,
            *tiny,
        )
        code, _, err = pipeline(*arguments)
        assert code == 0, err
        return tmp_path / name

    return run


def read_all(store, view, name):
    reader = store.reader(view, name, verify="always")
    out = np.empty((len(store.valid_rows), *reader.row_shape), reader.dtype)
    reader.read(store.valid_rows, out)
    return out


def digests(store):
    """Digest of each object that does not hold times, by its name in revision 0."""
    return {
        o.path.removeprefix("revisions/1/"): o.digest
        for o in store.manifest.objects
        if not o.path.startswith("commits/") and o.path not in ("zarr.json", "revisions/1/zarr.json")
    }


@pytest.mark.parametrize("more", [("--dtype", "int8", "--allow-error", 1), ("--format", "webdataset"), ()])
def test_flip_is_made_of_the_stored_images_as_if_encoded_from_the_start(
    encode, folder, tmp_path, pipeline, more
):
    (folder / "class 0" / "00.png").write_bytes(b"not an image")
    grown, whole = encode("grown", "center", *more), open_store(encode("whole", "center,flip", *more))
    before = open_store(grown)
    folder.rename(tmp_path / "gone")  # nothing is read from the source
    code, _, err = pipeline("add-view", grown, "--views", "flip")
    assert code == 0, err
    assert f"reading the crops that {grown} holds" in err
    after = open_store(grown)
    if "int8" not in more:  # the code is fitted to the views there are
        assert digests(after) == digests(whole)
    assert after.views == ("center", "flip")
    assert after.manifest.num_bad == 1
    assert before.statistics().count == 20
    assert len(read_all(before, "center", "tokens")) == 20
    assert pipeline("verify", grown)[0] == 0
    assert after.manifest.provenance["torch"]


def test_crops_are_cut_from_the_files_and_a_row_bad_in_them_is_bad(encode, folder, tmp_path, pipeline):
    grown, whole = encode("grown", "center"), open_store(encode("whole", "center,crop:2,flip"))
    code, _, err = pipeline("add-view", grown, "--views", "crop:2,flip")
    assert code == 0, err
    assert "reading the image files" in err
    assert digests(open_store(grown)) == digests(whole)
    code, _, err = pipeline("add-view", grown, "--views", "flip,crop:2")
    assert (code, "has the views center, crop0, crop1, flip already" in err) == (0, True)
    (folder / "class 1" / "01.png").write_bytes(b"changed since")
    code, _, err = pipeline("add-view", grown, "--views", "crop:3")
    assert code == 0, err
    assert "1 rows that were valid before lack a new view" in err
    after = open_store(grown)
    assert (after.manifest.revision, after.manifest.num_bad) == (2, 1)
    assert after.statistics(["center"]).count == 20
    assert pipeline("verify", grown)[0] == 0
    assert pipeline("clean", grown, "--wait", 0)[0] == 0
    assert pipeline("verify", grown)[0] == 0


def test_the_encoder_must_be_the_store_s(encode, pipeline):
    store = encode("store", "center")
    code, _, err = pipeline("add-view", store, "--views", "flip", "--weights", "random:1")
    assert (code, "belongs to another encoder: weights_digest" in err) == (1, True)
    code, _, err = pipeline("add-view", store, "--views", "sideways")
    assert (code, "--views must be made of" in err) == (2, True)
    assert not (store / "revisions").exists()


def test_a_run_cut_short_continues_and_the_store_stays_what_it_was_until_then(
    encode, tmp_path, pipeline, monkeypatch
):
    grown, whole = encode("grown", "center"), open_store(encode("whole", "center,flip"))
    left = [2]

    def publish(self, *arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return original(self, *arguments)

    original = ShardWriter.publish
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "publish", publish)
        code, _, err = pipeline("add-view", grown, "--views", "flip")
    assert (code, "run the same command again to continue" in err) == (130, True)
    assert open_store(grown).views == ("center",)
    assert pipeline("verify", grown)[0] == 0
    code, _, err = pipeline("add-view", grown, "--views", "crop:1")
    assert (code, "is being added to in another way" in err) == (1, True)
    code, _, err = pipeline("add-view", grown, "--views", "flip")
    assert code == 0, err
    assert f"continuing {grown}: 2 of 3 shards are there" in err
    assert digests(open_store(grown)) == digests(whole)
