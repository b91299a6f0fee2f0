"""docs/store-format.md is enough to read a store: a reader written from the page alone, and the page's worked example.

The reader uses no code of this repository and no zarr, only the standard library, BLAKE3's package and numpy to compare
numbers.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from shards.metadata.identity import Recipe
from shards.metadata.plan import Plan, SourceRecord
from shards.testing.contract import StoreKind, build_store, tiny_encoder
from shards.testing.stock_readers import stock_rows
from shards.writing.store_writer import StoreWriter

PAGE = Path(__file__).parents[2] / "docs" / "store-format.md"
ABSENT = 2**64 - 1
MASK = ABSENT


def crc32c(data):
    """Castagnoli's CRC, reflected, polynomial 0x82F63B78."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def philox_words(seed, name, count, epoch=0):
    """The first words of a stream of draws: Philox4x64-10, the counter stepped before each block of four."""
    key = struct.unpack("<2Q", hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16])
    words = []
    for block in range(1, -(-count // 4) + 1):
        c0, c1, c2, c3 = block, 0, 0, epoch
        k0, k1 = key
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c0, 0xCA5A826395121157 * c2
            c0, c1, c2, c3 = p1 >> 64 ^ c1 ^ k0, p1 & MASK, p0 >> 64 ^ c3 ^ k1, p0 & MASK
            k0, k1 = k0 + 0x9E3779B97F4A7C15 & MASK, k1 + 0xBB67AE8584CAA73B & MASK
        words += [c0, c1, c2, c3]
    return words[:count]


def deal(count, seed):
    """Order in which images sorted by key fill the shards."""
    bits = max(count - 1, 1).bit_length()
    words = [r >> bits << bits | j for j, r in enumerate(philox_words(seed, "plan", count))]
    return [word & (1 << bits) - 1 for word in sorted(words)]


def canonical(value):
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def short_digest(value):
    return hashlib.sha256(canonical(value)).hexdigest()[:32]


def read_store(root):
    """Stored bytes of every row by (view, field, row), and everything the page says a reader checks."""
    manifest = json.loads((root / "manifest.json").read_text())
    others = {name: value for name, value in manifest.items() if name != "digest"}
    assert hashlib.sha256(canonical(others)).hexdigest() == manifest["digest"]
    for listed in manifest["objects"]:
        content = (root / listed["path"]).read_bytes()
        algorithm = blake3 if "blake3" in listed else hashlib.sha256
        digest = listed["blake3" if "blake3" in listed else "sha256"]
        assert (len(content), algorithm(content).hexdigest()) == (listed["nbytes"], digest)
    recipe = manifest["recipe"]
    assert recipe == json.loads((root / "zarr.json").read_text())["attributes"]["recipe"]
    deciding = {name: value for name, value in recipe["encoder"].items() if name != "weights"}
    assert manifest["encoder_id"] == short_digest(deciding)
    assert manifest["recipe_id"] == short_digest(
        {name: value for name, value in recipe.items() if name not in ("object_digest", "execution")}
        | {"encoder": manifest["encoder_id"]}
    )
    capacity = -(-recipe["num_images"] // recipe["num_shards"])
    rows = {}
    for view in recipe["views"]:
        for shard in range(recipe["num_shards"]):
            record = json.loads((root / f"commits/{view}/{shard:05d}.json").read_text())
            for name, packed in record["crc32c"].items():
                field = json.loads((root / view / name / "zarr.json").read_text())
                tail = "/0" * (len(field["shape"]) - 1)
                content = (root / view / name / f"c/{shard}{tail}").read_bytes()
                index, crc = content[-16 * capacity - 4 : -4], content[-4:]
                assert struct.unpack("<I", crc) == (crc32c(index),)
                checksums = struct.unpack(f"<{capacity}I", base64.b64decode(packed))
                for slot, (offset, nbytes) in enumerate(struct.iter_unpack("<2Q", index)):
                    if offset != ABSENT:
                        row = content[offset : offset + nbytes]
                        assert crc32c(row) == checksums[slot]
                        rows[view, name, shard * capacity + slot] = row
    return rows


def test_the_tars_hold_the_same_rows(tmp_path):
    kinds = {form: StoreKind(format=form, bad={4: "not an image"}) for form in ("zarr", "webdataset")}
    stores = {form: build_store(tmp_path / form, kind) for form, kind in kinds.items()}
    rows = read_store(stores["zarr"].path)
    members = {}
    for view in ("center", "flip"):
        for shard in range(4):
            with tarfile.open(stores["webdataset"].path / view / f"{shard:05d}.tar", "r:") as tar:
                for member in tar:
                    number, _, kind = member.name.partition(".")
                    members[view, kind, int(number)] = tar.extractfile(member).read()
    arrays = {
        (v, k.removesuffix(".npy"), row): content for (v, k, row), content in members.items() if ".npy" in k
    }
    assert {slot: content[128:] for slot, content in arrays.items()} == rows
    about = json.loads(members["center", "json", 0])
    assert about["row"] == 0
    assert members["center", "cls", 0] == str(about["label"]).encode()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int8"])
def test_a_reader_written_from_the_page_reads_every_row(tmp_path, dtype):
    store = build_store(tmp_path / "store", StoreKind(dtype=dtype, bad={4: "not an image"}, num_images=11))
    rows = read_store(store.path)
    for view in store.views:
        for name in store.recipe.fields(view):
            stock = stock_rows(store, view, name)
            found = {row: content for (v, f, row), content in rows.items() if (v, f) == (view, name)}
            assert sorted(found) == store.valid_rows.tolist()
            assert all(found[row] == np.ascontiguousarray(stock[row]).tobytes() for row in found)


def test_the_deal_follows_from_the_page():
    records = [SourceRecord(f"{i:03d}.png", -1, "", 0, 0) for i in range(150)]
    keys = Plan.build(records, (), 7, seed=5).keys.tolist()
    assert keys == [records[j].key for j in deal(150, seed=5)]


def test_the_source_digest_follows_from_the_page():
    records = [SourceRecord("ä.png", 1, "", 0, 12), SourceRecord("b.png", -1, "", 0, 7)]
    plan = Plan.build(records, ("cat", "größe"), 1, seed=0)
    text = json.dumps(["cat", "größe"]) + "b.png\x007\x00-1\n" + "ä.png\x0012\x001\n"
    assert plan.source_digest() == hashlib.sha256(text.encode()).hexdigest()[:32]


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The worked example's store: a.png and c.png are usable, b.png is not."""
    root = tmp_path_factory.mktemp("example") / "store"
    records = [
        SourceRecord(f"{name}.png", label, f"images/{name}.png", 0, 10 + label)
        for label, name in enumerate("abc")
    ]
    plan = Plan.build(records, ("ape", "bee", "cat"), 2, seed=1)
    recipe = Recipe(
        encoder=tiny_encoder((1, 2), 3),
        source_digest=plan.source_digest(),
        num_images=3,
        num_shards=2,
        seed=1,
        views=("center",),
        image_size=0,
    )
    writer = StoreWriter.create_or_continue(root, recipe, plan)
    for view, shard in writer.pending():
        with writer.shard(view, shard) as output:
            for slot, record in enumerate(plan.records_of(shard)):
                if record.key == "b.png":
                    output.quarantine(slot, "not an image")
                else:
                    tokens = np.arange(6).reshape(2, 3) / 2 + record.label
                    output.write(slot, {"tokens": tokens.astype(np.float16)})
            output.publish()
    writer.finalize({})
    return root


def example_blocks(root):
    """What the page shows of the worked example, block by block."""
    recipe = json.loads((root / "zarr.json").read_text())["attributes"]["recipe"]
    keys = ["a.png", "b.png", "c.png"]
    key = struct.unpack("<2Q", hashlib.sha256(b"1/plan").digest()[:16])
    raw = philox_words(1, "plan", 3)
    words = [r >> 2 << 2 | j for j, r in enumerate(raw)]
    deal_lines = [f"key    {key[0]:016x} {key[1]:016x}"]
    deal_lines += [
        f"{name}  r = {r:016x}  word = {word:016x}" for name, r, word in zip(keys, raw, words, strict=True)
    ]
    order = [keys[j] for j in deal(3, 1)]
    deal_lines.append(
        f"shard 0: rows 0, 1 = {order[0]}, {order[1]};  shard 1: row 2 = {order[2]}, row 3 is spare"
    )

    blocks = ["\n".join(deal_lines)]
    for shard in range(2):
        content = (root / f"center/tokens/c/{shard}/0/0").read_bytes()
        lines = []
        start = 0
        for slot, (offset, nbytes) in enumerate(struct.iter_unpack("<2Q", content[-36:-4])):
            if offset != ABSENT:
                numbers = " ".join(f"{x:g}" for x in struct.unpack("<6e", content[offset : offset + nbytes]))
                lines.append(
                    f"{start:04x}  {content[offset : offset + nbytes].hex(' ')}  slot {slot}: {numbers}"
                )
                start += nbytes
        for slot in range(2):
            entry = content[start : start + 16]
            what = "none" if entry[0] == 0xFF else "offset, nbytes"
            lines.append(f"{start:04x}  {entry[:8].hex(' ')}  {entry[8:].hex(' ')}  slot {slot}: {what}")
            start += 16
        lines.append(f"{start:04x}  {content[start:].hex(' ')}  CRC32C of the 32 bytes before")
        blocks.append("\n".join(lines))
    record = json.loads((root / "commits/center/00000.json").read_text())
    record["seconds"] = 0.005
    blocks.append(json.dumps(record, indent=1))
    small = [f"{name:<10} {(root / name).read_bytes().hex(' ')}" for name in ("label/c/0", "valid/c/0")]
    for name in ("mean", "variance"):
        values = struct.unpack("<6d", (root / f"stats/center/{name}/c/0/0/0").read_bytes())
        small.append(f"stats/center/{name:<8} " + " ".join(f"{x:g}" for x in values))
    blocks.append("\n".join(small))
    deciding = {name: value for name, value in recipe["encoder"].items() if name != "weights"}
    blocks.append(f"{canonical(deciding).decode()}\nid {short_digest(deciding)}")
    assert recipe.pop("object_digest") == "blake3"
    recipe_text = canonical({**recipe, "encoder": short_digest(deciding)})
    blocks.append(f"{recipe_text.decode()}\nid {hashlib.sha256(recipe_text).hexdigest()[:32]}")
    return blocks


def test_the_worked_example_is_what_is_written(example):
    section = PAGE.read_text().partition("## Worked example")[2]
    shown = re.findall(r"```(?:text|json)\n(.*?)\n```", section, flags=re.DOTALL)
    assert shown == example_blocks(example)


def test_the_worked_example_reads_back(example):
    rows = read_store(example)
    label = struct.unpack("<4i", (example / "label/c/0").read_bytes())
    valid = (example / "valid/c/0").read_bytes()
    assert {row for *_, row in rows} == {row for row in range(4) if valid[row]}
    for (_, _, row), content in rows.items():
        assert struct.unpack("<6e", content) == tuple(label[row] + i / 2 for i in range(6))
