"""The commands on stores and sources behind URLs: the same commands, the same bytes."""

import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.sources.listing import list_source
from shards.errors import UsageError
from shards.reading.store import open_store
from shards.sources.reading import BadImageError, SourceReader
from shards.storage.location import as_location, object_names, read_objects


@pytest.fixture
def encode(folder, tiny, pipeline):
    """Encodes the folder's images."""

    def run(source, out, *more):
        return pipeline("encode", source, "--out", out, "--shards", "3", *tiny, *more)

    return run


@pytest.fixture
def in_memory(tmp_path):
    """Copies a folder to a URL of fsspec's own memory."""

    def copy(root):
        place = as_location(f"memory://{tmp_path.name}/{root.name}")
        for name, content in read_objects(root, object_names(root)).items():
            (place / name).write_bytes(content)
        return place

    return copy


def tokens_of(store):
    """Everything in a store but times and places of its making."""
    kept = {o.path: o.digest for o in open_store(store).manifest.objects}
    return {
        name: digest
        for name, digest in kept.items()
        if not name.startswith(("commits/", "plan.parquet", "index.parquet"))
    }


def test_a_store_on_a_server_is_encoded_inspected_verified_and_converted_like_any(
    s3, tmp_path, folder, encode, pipeline, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert encode(folder, tmp_path / "local")[0] == 0
    remote = s3 / "store"
    code, _, messages = encode(folder, remote)
    assert (code, messages.splitlines()[-1]) == (
        0,
        f"{remote} is complete: 21 of 21 images in 3 shards, 0 unusable",
    )
    assert tokens_of(remote) == tokens_of(tmp_path / "local")
    assert not [name for name in object_names(remote) if name.startswith((".work", "moments"))]
    assert encode(folder, remote)[0] == 0
    facts = json.loads(pipeline("inspect", remote, "--json")[1])
    assert (facts["store"], facts["complete"], facts["rows"]) == (str(remote), True, 21)
    assert "is as its manifest says" in pipeline("verify", remote)[2]
    assert pipeline("convert", remote, "--out", s3 / "tars", "--format", "webdataset")[0] == 0
    assert pipeline("convert", s3 / "tars", "--out", tmp_path / "back", "--format", "zarr")[0] == 0
    assert tokens_of(tmp_path / "back") == tokens_of(tmp_path / "local")
    assert pipeline("clean", remote, "--wait", "0")[0] == 0
    texts = [*read_objects(remote, object_names(remote)).values()]
    texts += [path.read_bytes() for path in tmp_path.rglob("*.jsonl")]
    assert (tmp_path / "store.logs" / "progress.jsonl").exists()
    assert not any(b"tester-secret" in text or b"tester-key-id" in text for text in texts)


def test_a_server_that_refuses_is_one_line(s3, folder, encode, monkeypatch):
    from shards.storage.file_systems import forget_connections

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret")
    forget_connections()
    code, _, messages = encode(folder, s3)
    assert code == 2
    assert messages.splitlines()[-1].startswith("error: looking at s3://latents/")
    assert "is refused" in messages
    assert "wrong-secret" not in messages


def test_a_url_that_means_nothing_is_one_line(pipeline):
    code, _, messages = pipeline("verify", "nothing://bucket/store")
    assert (code, messages) == (
        2,
        "error: nothing:// is not a scheme that fsspec knows; use s3://, gs://, https:// or a folder\n",
    )


def test_a_folder_of_images_on_a_server_lists_and_encodes_like_a_local_one(
    tmp_path, folder, in_memory, encode
):
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "x.png").write_bytes(b"")
    remote = in_memory(folder)
    here, there = list_source(str(folder)), list_source(str(remote))
    assert there.class_names == here.class_names
    assert [(r.key, r.label, r.nbytes) for r in there.records] == [
        (r.key, r.label, r.nbytes) for r in here.records
    ]
    assert encode(folder, tmp_path / "one")[0] == 0
    assert encode(remote, tmp_path / "other")[0] == 0
    assert tokens_of(tmp_path / "one") == tokens_of(tmp_path / "other")
    (remote / "class 0" / "00.png").unlink()
    with pytest.raises(BadImageError, match="missing"):
        SourceReader().read(there.records[0])


def make_tars(root, images):
    for part, names in enumerate((sorted(images)[:3], sorted(images)[3:6])):
        with tarfile.open(root / f"part-{part}.tar", "w") as tar:
            for number, name in enumerate(names):
                for ending, content in ((".png", images[name]), (".cls", b"%d" % (number % 2))):
                    member = tarfile.TarInfo(f"{number:03d}{ending}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def make_parquet(root, images):
    column = pa.array(
        [{"bytes": images[name], "path": None} for name in sorted(images)],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    pq.write_table(
        pa.table({"image": column, "label": [1] * len(images)}), root / "a.parquet", row_group_size=5
    )


def make_csv(root, images):
    for name in sorted(images):
        (root / name.replace("/", "-")).write_bytes(images[name])
    lines = [f"{name.replace('/', '-')},{name[:7]}" for name in sorted(images)]
    (root / "list.csv").write_text("\n".join(["path,label", *lines]))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (make_tars, ""),
        (make_tars, "*.tar"),
        (make_tars, "part-1.tar"),
        (make_parquet, ""),
        (make_csv, "list.csv"),
    ],
)
def test_archives_and_tables_on_a_server_are_read_like_local_ones(tmp_path, folder, in_memory, make, name):
    root = tmp_path / "archives"
    root.mkdir()
    make(root, read_objects(folder, object_names(folder)))
    here, there = (
        list_source(f"{root}/{name}".rstrip("/")),
        list_source(f"{in_memory(root)}/{name}".rstrip("/")),
    )
    assert [(r.key, r.label, r.nbytes) for r in there.records] == [
        (r.key, r.label, r.nbytes) for r in here.records
    ]
    reader = SourceReader()
    assert [reader.read(r) for r in there.records] == [reader.read(r) for r in here.records]
    reader.close()


def test_a_source_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"got memory://nowhere/at-all"):
        list_source("memory://nowhere/at-all")


def test_a_tar_behind_a_web_server_is_read_by_range(tmp_path, folder, web_server):
    make_tars(tmp_path, read_objects(folder, object_names(folder)))
    here, there = list_source(str(tmp_path / "part-0.tar")), list_source(f"{web_server.url}/part-0.tar")
    web_server.requests.clear()
    reader = SourceReader()
    assert [reader.read(r) for r in there.records] == [reader.read(r) for r in here.records]
    reader.close()
    # Each with the header in front, which says whose bytes they are.
    assert [last - first + 1 for _, first, last in web_server.requests] == [
        512 + r.nbytes for r in there.records
    ]
