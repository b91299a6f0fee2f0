"""Images that are read again are the same images, from where the user has said, or they are refused."""

import io
import os
import shutil
import struct
import sys
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.operations.subset import named_keys
from pipeline.sources.listing import list_source
from shards import (
    BadImageError,
    Plan,
    SourceDamagedError,
    SourceOptions,
    SourceReader,
    SourceRecord,
    SourceRoots,
    UndecodableImageError,
    UserError,
    decode_image,
    open_store,
    printable_text,
    run_command,
)
from shards.metadata.archives import ArchiveIdentity
from shards.sources import parquet_bounds, parquet_files
from shards.sources.parquet_files import open_parquet
from shards.sources.parquet_pages import page_sizes

IMAGES = [np.random.default_rng(number).bytes(600) for number in range(6)]


def pack(path, order, contents=IMAGES, folder=""):
    with tarfile.open(path, "w") as tar:
        for number in order:
            member = tarfile.TarInfo(f"{folder}{number}.bmp")
            member.size = len(contents[number])
            tar.addfile(member, io.BytesIO(contents[number]))


def write_rows(path, order, **how):
    rows = [{"bytes": IMAGES[number], "path": None} for number in order]
    pq.write_table(pa.table({"image": rows}), path, row_group_size=2, **how)


def read_all(listing, archives=None, **how):
    with SourceReader(listing.archives if archives is None else archives) as reader:
        return {record.key: reader.read(record, **how) for record in listing.records}


EXPECTED = {f"x/{number}": content for number, content in enumerate(IMAGES)}


@pytest.mark.parametrize("known", [True, False])
def test_a_tar_packed_anew_gives_each_image_its_own_bytes(tmp_path, known):
    pack(tmp_path / "x.tar", range(6))
    listing = list_source(str(tmp_path / "x.tar"))
    pack(tmp_path / "x.tar", reversed(range(6)))
    assert read_all(listing, None if known else {}) == EXPECTED


def test_a_tar_of_tars_with_one_name_in_two_classes_gives_each_its_own(tmp_path):
    def outer(order):
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            for number in order:
                pack(tmp_path / "inner", [0], [IMAGES[number]])
                tar.add(tmp_path / "inner", f"n{number}.tar")

    outer(range(3))
    listing = list_source(str(tmp_path / "x.tar"))
    outer(reversed(range(3)))
    assert read_all(listing) == {f"n{number}/0.bmp": IMAGES[number] for number in range(3)}


def test_images_of_a_repaired_tar_have_other_sizes_and_the_same_names(tmp_path):
    pack(tmp_path / "x.tar", range(6))
    listing = list_source(str(tmp_path / "x.tar"))
    repaired = [content + b"more" * number for number, content in enumerate(IMAGES)]
    pack(tmp_path / "x.tar", [3, 1, 0, 5, 4, 2], repaired)
    assert read_all(listing, any_size=True) == {f"x/{n}": content for n, content in enumerate(repaired)}
    with pytest.raises(BadImageError, match="changed since it was listed: 600 bytes then, 604 now"):
        SourceReader(listing.archives).read(listing.records[1])


def test_an_image_that_a_tar_no_longer_holds_is_missing(tmp_path):
    pack(tmp_path / "x.tar", range(6))
    listing = list_source(str(tmp_path / "x.tar"))
    pack(tmp_path / "x.tar", range(5))
    with pytest.raises(BadImageError, match=r"missing: x\.tar holds no image of this name"):
        SourceReader(listing.archives).read(listing.records[5])


def test_what_take_readable_has_left_out_is_recorded_in_the_plan(tmp_path):
    pack(tmp_path / "x.tar", range(6))
    content = bytearray((tmp_path / "x.tar").read_bytes())
    content[3 * 1536] ^= 1
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(SourceDamagedError, match="a damaged header at byte 4608"):
        list_source(str(tmp_path / "x.tar"))
    listing = list_source(str(tmp_path / "x.tar"), options=SourceOptions(take_readable=True))
    plan = Plan.build(listing.records, (), 1, 0, listing.archives)
    (tmp_path / "plan.parquet").write_bytes(plan.to_bytes())
    kept = Plan.read(tmp_path / "plan.parquet")
    assert [archive.lost for archive in kept.archives.values()] == [1536]
    pack(tmp_path / "y", range(6))  # the time differs, so names are looked up, in what is readable
    os.utime(tmp_path / "x.tar", (1, 1))
    assert read_all(listing) == {key: value for key, value in EXPECTED.items() if key != "x/3"}


def test_a_copied_parquet_file_is_the_same_and_one_written_anew_is_refused(tmp_path):
    write_rows(tmp_path / "x.parquet", range(6))
    listing = list_source(str(tmp_path / "x.parquet"))
    os.utime(tmp_path / "x.parquet", (1, 1))
    assert list(read_all(listing).values()) == IMAGES
    write_rows(tmp_path / "x.parquet", reversed(range(6)))
    with pytest.raises(UserError, match=r"x\.parquet is not the file that was listed: it was rewritten"):
        read_all(listing)
    with pytest.raises(UserError, match="bring the old file back"):
        SourceReader(listing.archives).require_same_rows()


def test_of_a_known_parquet_file_that_is_untouched_no_image_is_read_again(tmp_path, monkeypatch):
    rows = [{"bytes": content, "path": None} for content in IMAGES]
    pq.write_table(pa.table({"image": rows, "label": [0, 1] * 3}), tmp_path / "x.parquet")
    listing = list_source(str(tmp_path / "x.parquet"))
    plan = Plan.build(listing.records, listing.class_names, 2, 0, listing.archives)
    read = parquet_files.batches

    def labels_alone(path, file, columns, rows):
        assert columns == ["label"], "images are read"
        return read(path, file, columns, rows)

    monkeypatch.setattr(parquet_files, "batches", labels_alone)
    assert list_source(str(tmp_path / "x.parquet"), known=plan) == listing
    os.utime(tmp_path / "x.parquet", (1, 1))
    with pytest.raises(TypeError, match="labels_alone"):
        list_source(str(tmp_path / "x.parquet"), known=plan)


def test_a_row_group_that_would_fill_the_memory_is_refused_by_its_footer(tmp_path, monkeypatch):
    rows = [{"bytes": bytes(100_000), "path": None}]
    pq.write_table(pa.table({"image": rows}), tmp_path / "x.parquet", compression="zstd")
    monkeypatch.setattr(parquet_bounds, "LARGEST_UNSUSPICIOUS", 10_000)
    with pytest.raises(UserError, match="must unfold to no more than"):
        list_source(str(tmp_path / "x.parquet"))


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_headers_of_parquet_pages_are_read_without_decoding_a_page(tmp_path, version, dictionary, codec):
    path, rows = tmp_path / "x.parquet", [bytes([number]) * 9_000 for number in range(60)]
    pq.write_table(
        pa.table({"image": rows}),
        path,
        data_page_version=version,
        use_dictionary=dictionary,
        compression=codec,
        data_page_size=20_000,
        write_page_checksum=True,
    )
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(0)
    content = path.read_bytes()
    sizes = page_sizes(lambda nbytes, offset: content[offset : offset + nbytes], chunk)
    headers = chunk.total_uncompressed_size - sizes.unfolded
    assert 0 < headers < 60 * 20_000
    assert sizes.unfolded >= sum(map(len, rows))
    assert sizes.dictionary == (sum(map(len, rows)) + 4 * len(rows) if dictionary else 0)
    with pytest.raises(ValueError, match=r"is not whole|leads out"):
        page_sizes(lambda nbytes, offset: content[: chunk.data_page_offset][offset : offset + nbytes], chunk)


def test_a_page_that_claims_more_than_the_footer_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    rows = [{"bytes": bytes(40_000), "path": None}]
    pq.write_table(pa.table({"image": rows}), path, compression="zstd", use_dictionary=False)
    assert len(list_source(str(path)).records) == 1
    content = path.read_bytes()
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    # Type, then the size decompressed: 40,010 in three bytes, which can say up to 1,048,575.
    assert content[start : start + 3] == b"\x15\x00\x15"
    path.write_bytes(content[: start + 3] + b"\xfe\xff\x7f" + content[start + 6 :])
    monkeypatch.setattr(parquet_bounds, "LARGEST_UNSUSPICIOUS", 500_000)
    with pytest.raises(UserError, match=r"must unfold to no more than .* that unfold to 10485\d\d;"):
        list_source(str(path))


def test_a_dictionary_that_many_rows_repeat_is_decoded_in_small_steps_up_to_a_limit(tmp_path, monkeypatch):
    path = tmp_path / "x.parquet"
    image = np.random.default_rng(0).bytes(100_000)
    pq.write_table(pa.table({"image": [{"bytes": image, "path": None}] * 50}), path)
    monkeypatch.setattr(parquet_bounds, "LARGEST_UNSUSPICIOUS", 400_000)
    steps = []

    def read():
        with open_parquet(path) as file:
            steps.extend(len(batch) for batch in parquet_files.batches(path, file, ["image.bytes"]))

    with pytest.raises(UserError, match="that unfold to 1"):
        read()
    assert steps == [3, 3, 3]
    monkeypatch.setattr(parquet_bounds, "LARGEST_RATIO", 51)
    assert len(list_source(str(path)).records) == 50


def test_plans_of_plain_files_are_written_as_before_and_those_of_archives_say_what_these_were(tmp_path):
    records = [SourceRecord("a", -1, "/x.tar", 512, 3)]
    plain, described = (
        Plan.build(records, (), 1, 0, archives)
        for archives in (None, {"/x.tar": ArchiveIdentity(9, "5"), "/y.tar": ArchiveIdentity(1, "2")})
    )
    assert plain == described
    assert plain.source_digest() == described.source_digest()
    assert b"archives" not in plain.to_bytes()
    (tmp_path / "plan").write_bytes(described.to_bytes())
    assert Plan.read(tmp_path / "plan").archives == {"/x.tar": ArchiveIdentity(9, "5")}


@pytest.mark.parametrize(
    "uri", ["{outside}", "file://{outside}", "http://127.0.0.1:1/x.png", "{folder}/../b/0.png", "/dev/zero"]
)
def test_a_plan_s_addresses_outside_of_what_was_named_are_not_opened(tmp_path, uri):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"12345")
    address = uri.format(outside=tmp_path / "b" / "0.png", folder=tmp_path / "a")
    reader = SourceReader(roots=SourceRoots.of([tmp_path / "a"]))
    assert reader.read(SourceRecord("k", 0, str(tmp_path / "a" / "0.png"), 0, 5)) == b"12345"
    with pytest.raises(BadImageError, match=r"outside of the source: .* allow it with --source PLACE"):
        reader.read(SourceRecord("k", 0, address, 0, 5))


def test_roots_are_folders_files_and_urls_and_compared_part_by_part():
    roots = SourceRoots.of(["/data/a/", "s3://bucket/in", "https://"])
    held = ["/data/a", "/data/a/b.png", "file:///data/a/b.png", "s3://bucket/in/x", "https://any/x"]
    others = [
        "/data/ab",
        "/data/a/../b",
        "s3://bucket/inner",
        "s3://other/in",
        "http://any/x",
        "gs://bucket/in",
    ]
    assert [roots.hold(place) for place in held + others] == [True] * len(held) + [False] * len(others)


def test_nothing_but_regular_files_is_opened_and_no_more_than_their_stated_bytes(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    reader = SourceReader()
    for name in ("pipe.tar", "pipe.parquet"):
        os.mkfifo(tmp_path / name)
    places = [tmp_path / name for name in ("pipe.png", "pipe.tar", "pipe.parquet")]
    for address in (*places, "/dev/zero", tmp_path):
        with pytest.raises(BadImageError, match="no regular file"):
            reader.read(SourceRecord("k", 0, str(address), 0, 5))
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(BadImageError, match="changed since it was listed"):
        reader.read(SourceRecord("k", 0, str(tmp_path / "huge.png"), 0, 5))
    for size in (1 << 40, 5):
        with pytest.raises(BadImageError, match="more than an image may have"):
            reader.read(SourceRecord("k", 0, str(tmp_path / "huge.png"), 0, size), any_size=size == 5)


def test_a_view_is_made_of_the_encoded_images_alone_and_where_the_user_says(
    tmp_path, pipeline, tiny, draw, monkeypatch
):
    folder, store = tmp_path / "in", tmp_path / "store"
    folder.mkdir()
    for number in range(4):
        Image.fromarray(draw(number)).save(folder / f"{number}.bmp")
    code, _, err = pipeline("encode", folder, "--out", store, "--shards", 1, "--views", "center", *tiny)
    assert code == 0, err
    assert "4 images, no labels; images are in the folder itself" in err
    for name, other in (("0.bmp", "swap"), ("1.bmp", "0.bmp"), ("swap", "1.bmp")):
        (folder / name).rename(folder / other)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "another user"))
    code, _, err = pipeline("add-view", store, "--views", "crop:1")
    assert (code, open_store(store).views) == (2, ("center",))
    assert f"such as in {folder}; name where they may be read with --source PLACE" in err
    code, _, err = pipeline("add-view", store, "--views", "crop:1", "--source", folder)
    assert code == 0, err
    table = open_store(store).index.table("key", "reason").to_pylist()
    reasons = {row["key"]: row["reason"] for row in table}
    assert (reasons["2.bmp"], reasons["3.bmp"]) == (None, None)
    assert "another image than the one that was encoded" in reasons["0.bmp"]
    assert "another image than the one that was encoded" in reasons["1.bmp"]


def test_a_source_without_one_usable_image_is_a_failure(tmp_path, pipeline, tiny):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.png").write_bytes(b"nothing")
    code, _, err = pipeline("encode", tmp_path / "in", "--out", tmp_path / "store", "--shards", 1, *tiny)
    assert code == 1
    assert "none of the 1 images can be used" in err.splitlines()[-1]
    shutil.rmtree(tmp_path / "store")


def png(**how):
    buffer = io.BytesIO()
    Image.fromarray(np.arange(5 * 6 * 3, dtype=np.uint8).reshape(5, 6, 3)).save(buffer, "PNG", **how)
    return buffer.getvalue()


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


@pytest.mark.parametrize(
    "extra",
    [
        chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * (2 << 20))),
        chunk(b"iCCP", b"icc\0\0" + zlib.compress(bytes(2 << 20))),
        chunk(b"tEXt", b"k\0v")[:-4] + bytes(4),
        chunk(b"eXIf", b"\0\x08\0\x02\x01\x12\0\x03"),
        chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"a" * (2 << 20))),
    ],
    ids=["large text", "large profile", "damaged text", "damaged exif", "large international text"],
)
def test_the_metadata_of_a_png_does_not_decide_about_its_pixels(extra):
    content = png()
    found = decode_image(content[:33] + extra + content[33:])
    np.testing.assert_array_equal(np.asarray(found), np.asarray(decode_image(content)))


def test_a_png_with_damaged_pixels_is_refused_whatever_its_metadata():
    content = bytearray(png())
    content[-30] ^= 0xFF
    with pytest.raises(UndecodableImageError):
        decode_image(bytes(content))


def test_an_image_of_more_pixels_than_allowed_is_refused_by_its_header():
    with pytest.raises(UndecodableImageError, match="6 × 5 pixels are more than --max-pixels 29"):
        decode_image(png(), max_pixels=29)
    assert decode_image(png(), max_pixels=30).size == (6, 5)


@pytest.mark.parametrize("side", [9_800, 12_000, 20_000])
def test_a_picture_too_large_for_pillow_is_refused_by_our_own_option(side):
    header = struct.pack(">2I5B", side, side + 1_000, 1, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))
    with pytest.raises(UndecodableImageError, match="pixels are more than --max-pixels 100000000"):
        decode_image(content)


def test_an_image_beyond_pillows_own_limit_is_decoded_if_it_is_allowed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert decode_image(png(), max_pixels=30).size == (6, 5)


def test_keys_with_line_breaks_of_any_kind_can_be_named():
    known = {"a\u2028b", "n\x85l", "two\nlines", "tab\there", "plain", "esc\x1b[31m"}
    raw = "\n".join(sorted(known))
    assert set(named_keys(raw, known)[0]) == known
    printed = "\r\n".join(printable_text(key) for key in known)
    assert set(named_keys(printed, known)[0]) == known
    assert named_keys("plain\nno\n", known) == (["plain"], ["no"])


def test_what_a_terminal_would_act_on_is_printed_with_escapes():
    assert printable_text("a\x1b[31m\n\x9b\u202eé🙂") == "a\\x1b[31m\\n\\u009b\\u202eé🙂"
    assert str(UserError("bad\nname")) == "bad\\nname"


def test_output_that_the_terminal_s_encoding_lacks_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", write_through=True)
    monkeypatch.setattr(sys, "stdout", stream)
    assert run_command(lambda: sys.stdout.write("🙂") and 0, on_interrupt=str) == 0
    assert stream.buffer.getvalue() == b"\\U0001f642"
