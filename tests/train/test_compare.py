"""Comparing runs: what differs and nothing else, whatever state their folders are in."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json

import pytest
from PIL import Image

from shards import UsageError
from train.compare import main
from train.report.comparison import comparison_table
from train.report.finished_runs import add_scores, differing_settings, in_families, read_run, read_runs
from train.settings.presets import dit_settings
from train.settings.saved_settings import to_json


def make_run(path, *, steps=20, lr=1e-3, seed=0, varies=None, varies_in=()):
    """A run's folder as training leaves it."""
    settings = dit_settings("dit-dh-tiny")
    optimizer = dataclasses.replace(settings.optimizer, lr=lr)
    settings = dataclasses.replace(
        settings, optimizer=optimizer, seed=seed, out=path, varies=varies, varies_in=varies_in
    )
    (path / "samples").mkdir(parents=True)
    (path / "config.json").write_text(to_json(settings))
    lines = [
        {"step": step, "loss": 2 - step / 100, "samples_seen": 32 * step, "step_seconds": 36.0, "fid": None}
        for step in range(10, steps + 1, 10)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (8, 8)).save(path / "samples" / f"step-{steps:08d}.png")
    return path


@pytest.fixture
def runs(tmp_path):
    origin = {"varies": f"{tmp_path}/a/config.json", "varies_in": ("optimizer.lr: 0.001 → 0.0005",)}
    return [make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=5e-4, steps=40, **origin)]


def test_only_settings_that_differ_are_shown(runs):
    found = [read_run(path, path.name) for path in runs]
    assert differing_settings(found) == ["optimizer.lr"]
    header, rows = comparison_table(found)
    assert header == ["run", "varies", "optimizer.lr", "step", "images", "hours", "FLOPs", "loss"]
    assert rows[0][:3] == ["a", "", "0.001"]
    origin = "a (optimizer.lr: 0.001 → 0.0005)"
    assert rows[1] == ["b", origin, "0.0005", "40", "1280", "0.40", "", "1.6"]


def test_a_family_stands_together_with_each_run_behind_the_one_it_varies(tmp_path):
    elsewhere = "/another/machine/runs/base/config.json"
    make_run(tmp_path / "runs" / "child", varies=elsewhere, lr=2e-3)
    make_run(tmp_path / "runs" / "other", seed=9, varies="gone/config.json")
    make_run(tmp_path / "runs" / "grandchild", varies=f"{tmp_path}/runs/child/config.json", lr=3e-3)
    make_run(tmp_path / "runs" / "base")
    found, _ = read_runs([tmp_path / "runs"])
    assert [run.name for run in found] == ["base", "child", "grandchild", "other"]
    backwards = in_families(found[::-1])
    assert [(run.name, parent and parent.name, depth) for run, parent, depth in backwards] == [
        ("other", None, 0),
        ("base", None, 0),
        ("child", "base", 1),
        ("grandchild", "child", 2),
    ]
    _, rows = comparison_table(found)
    assert [row[1] for row in rows] == ["", "base", "child", "gone"]
    # a ring, as a copy of a run under its parent's name would make, loses none
    make_run(tmp_path / "ring" / "x", varies=f"{tmp_path}/ring/y/config.json")
    make_run(tmp_path / "ring" / "y", varies=f"{tmp_path}/ring/x/config.json")
    ring, _ = read_runs([tmp_path / "ring"])
    assert [run.name for run, _, _ in in_families(ring)] == ["x", "y"]


def test_a_folder_of_runs_stands_for_the_runs_in_it_in_order_of_number(tmp_path):
    for seed in (10, 9, 0):
        make_run(tmp_path / "x" / f"seed-{seed}", seed=seed)
    found, unreadable = read_runs([tmp_path / "x", tmp_path / "x" / "seed-9"])
    assert [run.name for run in found] == ["seed-0", "seed-9", "seed-10"]
    assert unreadable == {}


def test_hours_are_steps_times_their_seconds_and_images_those_seen(runs):
    assert read_run(runs[0], "a").progress() == [(10, 320, 0.1, 0.0), (20, 640, 0.2, 0.0)]


def test_the_page_holds_everything_and_the_table_is_written_beside_it(runs, tmp_path, capsys):
    assert main([*map(str, runs), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert 'src="data:image/png' in page
    assert "http" not in page.replace("http://www.w3.org/2000/svg", "")
    data = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert data["runs"][1]["curves"]["loss"] == [[0, 1.9], [1, 1.8], [2, 1.7], [3, 1.6]]
    assert data["runs"][1]["axes"]["images"] == [320, 640, 960, 1280]
    with (tmp_path / "page.csv").open() as file:
        assert next(csv.reader(file))[2] == "optimizer.lr"
    assert "| run | varies | optimizer.lr |" in (tmp_path / "page.md").read_text()
    assert "2 runs compared" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "no json", "metrics"])
def test_a_run_that_cannot_be_read_is_told_of_and_the_others_are_shown(runs, tmp_path, damage):
    broken = tmp_path / "broken"
    if damage != "missing":
        make_run(broken)
        name = "config.json" if damage == "no json" else "metrics.jsonl"
        (broken / name).write_text("{oops\n")
    found, unreadable = read_runs([*runs, broken])
    assert [run.name for run in found] == ["a", "b"]
    assert list(unreadable) == [broken]


def test_no_readable_run_is_an_error(tmp_path):
    with pytest.raises(UsageError, match="RUN must be folders of runs"):
        main([str(tmp_path), "--out", str(tmp_path / "page.html")])


def test_runs_of_one_name_are_told_apart(tmp_path):
    found, _ = read_runs([make_run(tmp_path / "x" / "run"), make_run(tmp_path / "y" / "run")])
    assert [run.name for run in found] == ["x/run", "y/run"]


def test_scores_are_found_inside_a_run_or_matched_by_the_snapshot_they_are_about(runs, tmp_path):
    found = [read_run(path, path.name) for path in runs]
    (runs[1] / "snapshots").mkdir()
    (runs[1] / "snapshots" / "milestone.safetensors").write_bytes(b"weights")
    inside = runs[0] / "gfid"
    inside.mkdir()
    (inside / "results.json").write_text(json.dumps({"metrics": {"fid": 3.5}}))
    outside, other = tmp_path / "gfid-b", tmp_path / "gfid-c"
    for folder, content in ((outside, b"weights"), (other, b"others")):
        folder.mkdir()
        values = {"snapshot_sha256": hashlib.sha256(content).hexdigest(), "metrics": {"fid": 2.5}}
        (folder / "results.json").write_text(json.dumps(values))
    problems = add_scores(found, [outside, other / "results.json", tmp_path / "none"])
    assert [run.scores for run in found] == [{"gfid": {"fid": 3.5}}, {"gfid-b": {"fid": 2.5}}]
    assert [problem.split(" ", 1)[1].partition(":")[0] for problem in problems] == [
        "is about a snapshot of none of these runs",
        "cannot be read",
    ]


def test_a_hundred_runs_make_a_page_of_a_few_megabytes(tmp_path):
    runs = [str(make_run(tmp_path / f"run-{n}", steps=5000, seed=n)) for n in range(100)]
    assert main([*runs, "--out", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").stat().st_size < 2e6
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png") == 24
    assert "Of 76 more runs none are shown" in page
