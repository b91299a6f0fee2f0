"""Every kind of source lists the same images in one order, and gives back their bytes."""

import io
import json
import os
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.sources.labels import LabelTable
from pipeline.sources.listing import list_source
from shards.errors import UsageError
from shards.metadata.plan import SourceRecord
from shards.sources.find import find_images
from shards.sources.reading import BadImageError, SourceGoneError, SourceReader


def png(seed):
    """A small picture file."""
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)).save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def add(tar, name, content):
    """Puts a file into a tar."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def contents(listing):
    """Bytes of every image by key."""
    reader = SourceReader()
    found = {record.key: reader.read(record) for record in listing.records}
    reader.close()
    return found


def labels(listing):
    """Class name of every image by key."""
    return {record.key: listing.class_names[record.label] for record in listing.records}


@pytest.fixture
def folder(tmp_path):
    """Two classes with names that are not plain."""
    root = tmp_path / "images"
    for number, name in enumerate(
        ["a class/one.png", "a class/two words.PNG", "zebra/é ü.jpeg", "zebra/deep/er.webp"]
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(number))
    (root / "zebra" / "notes.txt").write_text("not an image")
    (root / "zebra" / ".hidden.png").write_bytes(b"")
    return root


def test_a_folder_s_classes_are_its_first_level_and_its_order_is_that_of_the_keys(folder):
    listing = list_source(str(folder))
    keys = ["a class/one.png", "a class/two words.PNG", "zebra/deep/er.webp", "zebra/é ü.jpeg"]
    assert [record.key for record in listing.records] == keys
    assert [record.label for record in listing.records] == [0, 0, 1, 1]
    assert listing.class_names == ("a class", "zebra")
    assert contents(listing)["zebra/é ü.jpeg"] == png(2)


def test_what_is_found_can_be_read_without_a_plan(folder):
    found = find_images(str(folder))
    with SourceReader() as reader:
        assert [reader.read(image) for image in found.images] == [png(0), png(1), png(3), png(2)]


def test_a_flat_folder_has_no_classes(tmp_path):
    (tmp_path / "one.png").write_bytes(png(0))
    listing = list_source(str(tmp_path))
    assert listing.class_names == ()
    assert [record.label for record in listing.records] == [-1]


def test_images_beside_class_folders_are_refused(folder):
    (folder / "loose.png").write_bytes(png(9))
    with pytest.raises(UsageError, match=r"got loose\.png beside"):
        list_source(str(folder))


def test_a_name_that_is_not_utf8_is_kept_readable(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.png")).write_bytes(png(1))
    listing = list_source(str(tmp_path))
    assert contents(listing) == {"caf\\xe9.png": png(1)}


def test_a_link_that_leads_nowhere_is_one_missing_image_of_its_class(folder):
    (folder / "zebra" / "dead.png").symlink_to(folder / "gone.png")
    (folder / "zebra" / "itself.png").symlink_to("itself.png")
    records = {record.key: record for record in list_source(str(folder)).records}
    assert len(records) == 6
    assert (records["zebra/dead.png"].label, records["zebra/dead.png"].nbytes) == (1, 0)
    with pytest.raises(BadImageError, match="missing"):
        SourceReader().read(records["zebra/dead.png"])
    with pytest.raises(BadImageError, match="leads to itself"):
        SourceReader().read(records["zebra/itself.png"])


def test_a_link_to_a_folder_is_followed_unless_it_lies_in_that_folder(folder, tmp_path):
    plain = list_source(str(folder)).records
    (folder / "zebra" / "up").symlink_to("..")
    (folder / "zebra" / "deep" / "here").symlink_to(".")
    assert list_source(str(folder)).records == plain
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "more.png").write_bytes(png(5))
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    assert contents(list_source(str(folder)))["linked/more.png"] == png(5)


def test_the_imagenet_tar_of_tars_is_read_where_it_lies(tmp_path):
    with tarfile.open(tmp_path / "train.tar", "w") as outer:
        for name in ("n01440764", "n01443537"):
            buffer = io.BytesIO()
            with tarfile.open(fileobj=buffer, mode="w") as inner:
                for number in range(3):
                    add(inner, f"{name}_{number}.JPEG", png(number) + name.encode())
            add(outer, f"{name}.tar", buffer.getvalue())
    listing = list_source(str(tmp_path / "train.tar"))
    assert listing.class_names == ("n01440764", "n01443537")
    found = contents(listing)
    assert len(found) == 6
    assert found["n01443537/n01443537_2.JPEG"] == png(2) + b"n01443537"
    assert labels(listing)["n01443537/n01443537_2.JPEG"] == "n01443537"


def test_a_cut_off_tar_is_refused(tmp_path):
    with tarfile.open(tmp_path / "whole.tar", "w") as tar:
        add(tar, "0.png", png(0) * 40)
        add(tar, "1.png", png(1) * 40)
    content = (tmp_path / "whole.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(content[: 512 + len(png(0)) * 20])
    with pytest.raises(UsageError, match="not a whole uncompressed tar"):
        list_source(str(tmp_path / "cut.tar"))


def test_webdataset_tars_join_the_files_of_a_sample(tmp_path):
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            add(tar, "a/000.jpg", png(shard))
            add(tar, "a/000.cls", str(shard).encode())
            add(tar, "a/001.json", json.dumps({"label": 12}).encode())
            add(tar, "a/001.seg.png", png(7))
            add(tar, "a/001.png", png(8))
            add(tar, "a/002.txt", b"no image")
    for source in (tmp_path, tmp_path / "train-*.tar"):
        listing = list_source(str(source))
        assert contents(listing)["train-1/a/000"] == png(1)
        assert contents(listing)["train-1/a/001"] == png(8)
        assert labels(listing) == {
            "train-0/a/000": "0", "train-0/a/001": "12", "train-1/a/000": "1", "train-1/a/001": "12",
        }  # fmt: skip
        assert [record.label for record in listing.records] == [0, 12, 1, 12]


def webdataset(path, *files):
    """A tar of these files, whose content is a picture or a text; gives its path as a source."""
    with tarfile.open(path, "w") as tar:
        for name, content in files:
            add(tar, name, png(content) if isinstance(content, int) else content.encode())
    return str(path)


def test_samples_of_one_name_are_all_kept_each_with_its_class(tmp_path):
    source = webdataset(
        tmp_path / "x.tar",
        *[("a.png", 0), ("a.cls", "0"), ("b.png", 1), ("b.cls", "1")],
        *[("a.png", 2), ("a.cls", "2"), ("a.cls", "3"), ("a.png", 3)],
    )
    listing = list_source(source)
    assert contents(listing) == {"x/a": png(0), "x/a#2": png(2), "x/a#3": png(3), "x/b": png(1)}
    assert labels(listing) == {"x/a": "0", "x/a#2": "2", "x/a#3": "3", "x/b": "1"}


@pytest.mark.parametrize("reverse", [False, True])
def test_a_tar_that_is_sorted_by_ending_keeps_its_classes(tmp_path, capsys, reverse):
    images = [("a.jpg", 0), ("b.jpg", 1), ("a.seg.png", 2), ("b.seg.png", 3)]
    classes = [("a.cls", "0"), ("b.cls", "1")]
    source = webdataset(tmp_path / "x.tar", *(classes + images if reverse else images + classes))
    listing = list_source(source)
    assert contents(listing) == {"x/a": png(0), "x/b": png(1)}
    assert labels(listing) == {"x/a": "0", "x/b": "1"}
    assert "left out 2 images" in capsys.readouterr().err


def test_an_image_with_a_dot_in_its_name_is_taken_where_its_sample_has_no_other(tmp_path, capsys):
    source = webdataset(tmp_path / "x.tar", ("cat/a.v1.png", 0), ("cat/a.cls", "7"), ("cat/._a.png", 9))
    assert contents(list_source(source)) == {"x/cat/a": png(0)}
    assert "left out: 1 names that begin with a dot" in capsys.readouterr().err


def test_images_that_are_left_out_of_samples_are_counted_and_said_once(tmp_path, capsys):
    for part in "xy":
        webdataset(tmp_path / f"{part}.tar", ("a.seg.png", 0), ("a.jpg", 1), ("a.png", 2), ("b.jpg", 3))
    assert contents(list_source(str(tmp_path)))["x/a"] == png(1)
    said = [line for line in capsys.readouterr().err.splitlines() if "left out 4 images" in line]
    assert len(said) == 1
    assert "a.seg.png" in said[0]


def test_class_folders_in_tars_without_class_files_give_the_classes(tmp_path):
    webdataset(tmp_path / "0.tar", ("./cat/deep/a.png", 0), ("./notes.txt", "no image"))
    webdataset(tmp_path / "1.tar", ("dog/a.png", 1))
    assert labels(list_source(str(tmp_path))) == {"0/./cat/deep/a": "cat", "1/dog/a": "dog"}


@pytest.mark.parametrize("other", [("a.png", 1), ("cat/b.json", "{}"), ("b.cls", "")])
def test_folders_in_tars_are_classes_also_beside_loose_images_and_files_that_say_none(tmp_path, other):
    listing = list_source(webdataset(tmp_path / "x.tar", ("cat/a.png", 0), other))
    assert listing.class_names == ("cat",)
    assert [record.label for record in listing.records] == ([-1, 0] if other[0] == "a.png" else [0])


@pytest.mark.parametrize("names", [None, ["crane", "dog", "crane"]])
def test_parquet_with_images_inside_keeps_the_numbers_of_its_classes(tmp_path, names):
    table = pa.table(
        {
            "image": pa.array(
                [{"bytes": png(number), "path": None} for number in range(5)],
                pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
            ),
            "label": [2, 0, 2, 0, 0],
        }
    )
    if names:
        features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "part-0.parquet", row_group_size=2)
    listing = list_source(str(tmp_path))
    assert contents(listing) == {f"part-0/{number:09d}": png(number) for number in range(5)}
    assert [record.label for record in listing.records] == [2, 0, 2, 0, 0]
    assert listing.class_names == (("0 crane", "1 dog", "2 crane") if names else ("0", "1", "2"))


def test_a_parquet_row_without_bytes_is_the_file_that_its_path_names_or_unusable(tmp_path):
    (tmp_path / "there.png").write_bytes(png(1))
    rows = [
        {"bytes": png(0), "path": "there.png"},
        *(
            {"bytes": None, "path": path}
            for path in ("there.png", str(tmp_path / "there.png"), ".", "no.png", None)
        ),
        None,
    ]
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    pq.write_table(pa.table({"image": pa.array(rows, image)}), tmp_path / "x.parquet")
    records = list_source(str(tmp_path / "x.parquet")).records
    reader = SourceReader()
    assert [reader.read(record) for record in records[:3]] == [png(0), png(1), png(1)]
    for record in records[3:]:
        with pytest.raises(
            BadImageError, match=r"row of x\.parquet holds no bytes, and its path names no file"
        ):
            reader.read(record)
    reader.close()


def test_a_csv_names_paths_beside_it_and_labels(tmp_path, folder):
    (tmp_path / "list.csv").write_text(
        "path,label\nimages/zebra/é ü.jpeg,stripes\nimages/a class/one.png,other\nimages/a class/one.png,other\n",
        encoding="utf-8",
    )
    listing = list_source(str(tmp_path / "list.csv"))
    assert labels(listing) == {
        "images/a class/one.png": "other", "images/a class/one.png#2": "other", "images/zebra/é ü.jpeg": "stripes",
    }  # fmt: skip
    assert contents(listing)["images/a class/one.png#2"] == png(0)


@pytest.mark.parametrize(
    ("text", "named"), [("path\nmissing.png\n", "line 2 names missing.png"), ("name\nx\n", "column of paths")]
)
def test_a_csv_that_names_no_files_is_refused(tmp_path, text, named):
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(UsageError, match=named):
        list_source(str(tmp_path / "list.csv"))


def test_a_csv_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "list.csv").write_bytes(b"path\ncaf\xe9.png\n")
    with pytest.raises(UsageError, match=r"list\.csv must be CSV in UTF-8"):
        list_source(str(tmp_path / "list.csv"))


@pytest.mark.parametrize("damage", ["cut", "empty", "footer", "page"])
def test_a_damaged_parquet_file_is_refused(tmp_path, damage):
    images = [{"bytes": np.random.default_rng(number).bytes(500)} for number in range(20)]
    pq.write_table(pa.table({"image": images}), tmp_path / "x.parquet")
    content = bytearray((tmp_path / "x.parquet").read_bytes())
    if damage == "footer":
        content[-100:-8] = b"\xff" * 92
    if damage == "page":
        content[4:60] = b"\xff" * 56
    kept = {"cut": len(content) // 2, "empty": 0}.get(damage, len(content))
    (tmp_path / "x.parquet").write_bytes(content[:kept])
    with pytest.raises(UsageError, match=r"x\.parquet is not a readable parquet file"):
        list_source(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("labels.json", b'["zebra",', "Invalid JSON"),
        ("labels.json", b'["caf\xe9"]', "must be UTF-8"),
        ("labels.txt", b"caf\xe9\n", "must be UTF-8"),
    ],
)
def test_a_file_of_labels_that_is_no_text_or_no_json_is_refused(tmp_path, name, content, named):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError, match=named):
        LabelTable.read(tmp_path / name)


@pytest.mark.parametrize("names", [None, ["crane", "dog"]])
def test_a_label_of_minus_one_in_a_table_is_none(tmp_path, names):
    table = pa.table({"image": [{"bytes": png(number)} for number in range(3)], "label": [-1, 1, -1]})
    if names:
        features = {"info": {"features": {"label": {"names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    pq.write_table(table, tmp_path / "x.parquet")
    listing = list_source(str(tmp_path / "x.parquet"))
    assert [record.label for record in listing.records] == [-1, 1, -1]
    assert listing.class_names == (("0 crane", "1 dog") if names else ("0", "1"))
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "list.csv").write_text("path,label\na.png,-1\na.png,1\n")
    assert [record.label for record in list_source(str(tmp_path / "list.csv")).records] == [-1, 1]


def test_a_source_s_classes_may_begin_alike_and_those_of_a_file_of_labels_may_not(tmp_path):
    names = ["2012", "2012 Audi A5", "2012 BMW M3", "2013 BMW M3"]
    for name in names:
        (tmp_path / "cars" / name).mkdir(parents=True)
        (tmp_path / "cars" / name / "1.png").write_bytes(png(0))
    listing = list_source(str(tmp_path / "cars"))
    assert listing.class_names == tuple(names)
    assert labels(listing) == {f"{name}/1.png": name for name in names}
    ids = LabelTable.of_source(names[1:]).ids
    assert ids == {"2012 Audi A5": 0, "2012 BMW M3": 1, "2013 BMW M3": 2, "2013": 2}
    (tmp_path / "labels.txt").write_text("\n".join(names[1:]))
    with pytest.raises(UsageError, match="'2012' is the name of labels 0 and 1"):
        LabelTable.read(tmp_path / "labels.txt")


def test_given_labels_fix_the_ids_also_for_a_part_of_the_classes(tmp_path, folder):
    (tmp_path / "labels.txt").write_text("n01440764 tench, Tinca tinca\nzebra\na class\n")
    listing = list_source(str(folder), LabelTable.read(tmp_path / "labels.txt"))
    assert [record.label for record in listing.records] == [2, 2, 1, 1]
    assert listing.class_names[0] == "n01440764 tench, Tinca tinca"
    assert LabelTable.read(tmp_path / "labels.txt").ids["n01440764"] == 0


def test_a_class_that_the_labels_lack_is_named(tmp_path, folder):
    (tmp_path / "labels.json").write_text('["zebra"]')
    with pytest.raises(UsageError, match="'a class'"):
        list_source(str(folder), LabelTable.read(tmp_path / "labels.json"))


def test_reading_names_what_has_changed_since_the_listing(folder):
    reader = SourceReader()
    path = folder / "zebra" / "deep" / "er.webp"
    record = SourceRecord("key", 0, str(path), 0, path.stat().st_size)
    path.write_bytes(b"short")
    with pytest.raises(BadImageError, match=r"changed since it was listed: .* 5 now"):
        reader.read(record)
    path.unlink()
    with pytest.raises(BadImageError, match="missing"):
        reader.read(record)
    path.parent.rmdir()
    with pytest.raises(SourceGoneError, match="does not exist any more"):
        reader.read(record)


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 5000, "loop"])
def test_a_name_that_no_file_can_have_is_no_file(tmp_path, name):
    (tmp_path / "loop").symlink_to("loop")
    table = tmp_path / "images.csv"
    table.write_text(f"path\n{name}\n")
    with pytest.raises(UsageError, match=r"line 2 names .*: no such file") as refused:
        find_images(str(table))
    assert len(str(refused.value)) < 1000
