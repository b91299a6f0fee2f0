"""`pipeline inspect` and `report` of a store that is still being written."""

import json

import pytest

from pipeline.encode.claims import Failures


@pytest.fixture
def unfinished(folder, tmp_path, tiny, pipeline):
    """A store of 21 usable images and a broken one whose shard 1 is missing in the mirrored view."""
    (folder / "class 0" / "broken.jpg").write_bytes(b"text")
    assert pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 3, *tiny)[0] == 0
    store = tmp_path / "store"
    (store / "manifest.json").unlink()
    (store / "commits/flip/00001.json").unlink()
    Failures(store, 3).add(1, "the disk was full")
    return store


def test_inspect_tells_what_is_there_so_far_as_text_and_json(unfinished, pipeline):
    facts = json.loads(pipeline("inspect", unfinished, "--json")[1])
    assert facts["complete"] is False
    assert (facts["shards_done"], facts["shards_pending"]) == (5, 1)
    assert (facts["images"], facts["classes"], facts["unusable"]) == (22, 3, 1)
    assert facts["rows_by_view"]["center"] == 21
    assert facts["rows_by_view"]["flip"] in (14, 15)
    assert [image["key"] for image in facts["unusable_images"]] == ["class 0/broken.jpg"]
    assert facts["failed_shards"] == {"1": "the disk was full"}
    stored = [path for path in (unfinished / "center").rglob("c/*/**/*") if path.is_file()]
    by_part = facts["bytes_by_part"]
    assert by_part["center/tokens"] + by_part["center/image"] == sum(p.stat().st_size for p in stored)
    assert [len(rates) for rates in facts["rows_a_second"].values()] == [3, 2]
    text = pipeline("inspect", unfinished)[1]
    assert "5 of 6 done, 1 to come (3 shards × 2 views)" in text
    assert "class 0/broken.jpg" in text
    assert "shard 1: the disk was full" in text


def test_a_report_of_an_unfinished_store_says_so(unfinished, tmp_path, pipeline):
    assert pipeline("report", unfinished)[0] == 0
    page = (tmp_path / "store.html").read_text()
    assert "UNFINISHED: 5 of 6 done, 1 to come (3 shards × 2 views)" in page
    assert "class 0/broken.jpg" in page
    assert "rows a second by shard" in page


def test_a_store_that_was_only_begun_is_described(unfinished, tmp_path, pipeline):
    for record in (unfinished / "commits").rglob("*.json"):
        record.unlink()
    facts = json.loads(pipeline("inspect", unfinished, "--json")[1])
    assert (facts["shards_done"], facts["bytes"]) == (0, 0)
    assert pipeline("inspect", unfinished)[0] == 0
    assert pipeline("report", unfinished)[0] == 0
    assert "None yet" in (tmp_path / "store.html").read_text()


def test_a_page_that_cannot_be_written_gets_one_line(unfinished, tmp_path, pipeline):
    (tmp_path / "afile").write_text("")
    code, _, err = pipeline("report", unfinished, "--out", tmp_path / "afile" / "x.html")
    assert (code, err.count("\n")) == (2, 1)
    assert "--out must be a file that can be written" in err


def test_a_damaged_commit_record_is_named_with_what_to_do(unfinished, pipeline):
    record = unfinished / "commits/center/00002.json"
    values = json.loads(record.read_text())
    del values["objects"][0]["blake3"]
    record.write_text(json.dumps(values))
    code, _, err = pipeline("inspect", unfinished)
    assert (code, err.count("\n")) == (1, 1)
    assert f"{record} is not a readable commit record" in err
    assert "restore it" in err
