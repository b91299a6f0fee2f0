"""A few-step model beside its teacher: distances of tokens, one sheet from one noise, and what does not belong."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from eval.few_step import main
from shards.errors import IdentityMismatchError, UsageError
from train.weights.snapshot import load_snapshot, save_snapshot


@pytest.fixture
def compare(store, dit, decoder, tmp_path):
    """Run the command; its result."""

    def run(student, more=""):
        given = f"--teacher {dit} --decoder {decoder} --store {store} --out {tmp_path / 'out'}"
        assert (
            main([str(student), *given.split(), *["--num-samples", "8", "--columns", "4"], *more.split()])
            == 0
        )
        return json.loads((tmp_path / "out/few-step.json").read_text())

    return run


@pytest.fixture
def student(write_dit):
    """A two-time network with the weights of its teacher, that is with a gap that means nothing."""
    path = write_dit(end_time=True)
    snapshot = load_snapshot(path)
    weights = snapshot.model.state_dict()
    for name in ("weight", "bias"):
        weights[f"r_embedder.mlp.2.{name}"].zero_()
    save_snapshot(path, weights, config=snapshot.config, normalizer=snapshot.normalizer, meta=snapshot.meta)
    return path


def test_a_student_that_learnt_nothing_is_its_teacher_step_for_step(compare, student, write_dit, tmp_path):
    # The teacher with the student's other weights.
    snapshot = load_snapshot(student)
    weights = {name: value for name, value in snapshot.model.state_dict().items() if "r_embedder" not in name}
    teacher = tmp_path / "teacher.safetensors"
    plain = load_snapshot(write_dit()).config
    save_snapshot(teacher, weights, config=plain, normalizer=snapshot.normalizer, meta=snapshot.meta)
    result = compare(student, f"--teacher {teacher}")
    by_way = {(row["who"], row["steps"]): row["distance"] for row in result["rows"]}
    assert set(by_way) == {(who, steps) for who in ("student", "teacher") for steps in (1, 2, 4, 50)}
    assert by_way["student", 1] == pytest.approx(by_way["teacher", 1], rel=1e-4)
    assert by_way["student", 50] == pytest.approx(by_way["teacher", 50], rel=1e-4)
    assert 0 <= result["distance_of_other_stored_tokens"] < min(by_way.values())
    assert all(row["images_per_second"] > 0 for row in result["rows"])
    with Image.open(tmp_path / "out/few-step.png") as sheet:
        assert sheet.width > 4 * 16
        assert sheet.height > 6 * 16


def test_what_does_not_belong_together_is_refused(compare, dit, write_dit):
    with pytest.raises(UsageError, match="no few-step model"):
        compare(dit)
    with pytest.raises(IdentityMismatchError, match="normalised alike"):
        compare(write_dit(end_time=True, variance=0.7))
    with pytest.raises(UsageError, match="found none at nothing"):
        compare("nothing")
