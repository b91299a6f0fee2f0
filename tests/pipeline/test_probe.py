"""`pipeline probe` and `pipeline neighbours`: what a stored representation is worth, before anything is trained."""

import builtins
import json

import numpy as np
import pytest
from PIL import Image

from pipeline.operations.neighbours import nearest
from shards import open_store

HUES = {"red": (200, 60, 50), "green": (60, 190, 70), "blue": (50, 70, 210)}


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """A store of 60 noisy pictures in three colours with their class tokens, through an untrained encoder."""
    from pipeline.cli import main

    root = tmp_path_factory.mktemp("probe")
    for number in range(60):
        name = list(HUES)[number % 3]
        generator = np.random.default_rng(number)
        noise = generator.integers(-50, 50, (40, 40, 3))
        picture = np.clip(np.array(HUES[name]) + noise, 0, 255).astype(np.uint8)
        (root / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(root / "images" / name / f"{number:02d}.png")
    arguments = ["encode", str(root / "images"), "--out", str(root / "store"), "--shards", "2"]
    arguments += ["--encoder", "test_vit", "--weights", "random:0", "--input-size", "32"]
    assert main([*arguments, "--views", "center", "--class-token"]) == 0
    return root / "store"


@pytest.mark.parametrize("features", ["pooled", "cls"])
def test_colours_are_told_apart_by_both_probes(stored, pipeline, features):
    code, out, err = pipeline("probe", stored, "--features", features, "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["rows"] == {"fitted": 48, "held_out": 12}
    assert facts["classes"] == 3
    assert facts["linear"]["top1"] == 1
    assert facts["linear"]["converged"]
    assert facts["neighbours"]["top1"] == 1
    assert facts["neighbours"]["k"] == 20
    text = pipeline("probe", stored, "--features", features)[1]
    assert "linear     top-1 100.00% ± 0.00%" in text


def test_labels_that_mean_nothing_are_guessed_by_chance_only(stored, pipeline, monkeypatch):
    """The rows that are judged are not those that were fitted: shuffled labels would else be told apart, too."""
    from shards import Store

    labels = open_store(stored).labels.copy()
    valid = labels >= 0
    labels[valid] = np.random.default_rng(1).permutation(labels[valid])
    monkeypatch.setattr(Store, "labels", labels)
    facts = json.loads(pipeline("probe", stored, "--json")[1])
    assert facts["linear"]["top1"] < 0.8
    assert facts["neighbours"]["top1"] < 0.8


def test_the_rows_are_drawn_by_the_seed(stored, pipeline):
    first, again, other = (
        pipeline("probe", stored, "--rows", 30, "--seed", seed, "--json")[1] for seed in (0, 0, 1)
    )
    assert first == again
    assert json.loads(first)["rows"] == {"fitted": 24, "held_out": 6}
    assert json.loads(other)["seed"] == 1


def test_a_row_s_nearest_are_of_its_colour(stored, pipeline):
    store = open_store(stored)
    row = int(store.valid_rows[5])
    rows, similarity = nearest(store, row, store.valid_rows[store.valid_rows != row], 10)
    assert (store.labels[rows] == store.labels[row]).all()
    assert (np.diff(similarity) <= 0).all()
    code, _, err = pipeline("neighbours", stored, "--row", row, "--count", 10)
    assert code == 0, err
    page = stored.with_name(f"store-row-{row}.html").read_text()
    assert page.count("<tr>") == 12
    assert f"<th>{rows[0]}</th><td>{similarity[0]:.4f}</td>" in page
    assert "data:image/png" in page
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("command", "more", "complaint"),
    [
        ("probe", ["--rows", 0], "--rows must be at least 1, got 0"),
        ("probe", ["--rows", 9], "a probe needs at least 10 labelled rows, got 9"),
        ("probe", ["--view", "flip"], "has the views center, not 'flip'"),
        ("neighbours", ["--row", 999], "--row must be a valid row of"),
        ("neighbours", ["--row", 0, "--count", 0], "--count and --rows must be at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(stored, pipeline, command, more, complaint):
    code, _, err = pipeline(command, stored, *more)
    assert code == 2
    assert complaint in err
    assert err.count("\n") == 1


def test_a_store_without_labels_or_class_tokens_is_refused(folder, tmp_path, tiny, pipeline):
    for number, path in enumerate(folder.rglob("*.png")):
        path.rename(folder / f"{number}.png")
    for inside in folder.iterdir():
        if inside.is_dir():
            inside.rmdir()
    assert pipeline("encode", folder, "--out", tmp_path / "store", "--shards", 1, *tiny)[0] == 0
    code, _, err = pipeline("probe", tmp_path / "store")
    assert code == 2
    assert "has no labels" in err
    code, _, err = pipeline("neighbours", tmp_path / "store", "--row", 0, "--features", "cls")
    assert code == 2
    assert "holds no class tokens; use --features pooled, or encode with --class-token" in err


def test_without_scikit_learn_the_probe_names_what_to_install(stored, pipeline, monkeypatch):
    real = builtins.__import__

    def without(name, *more):
        if name.startswith("sklearn"):
            raise ImportError(name)
        return real(name, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    code, _, err = pipeline("probe", stored)
    assert code == 2
    assert "pip install -e '.[probe]'" in err
