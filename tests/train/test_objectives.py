"""Every objective trains the network that its snapshots are sampled by."""

import pytest

from train.settings.config import JUMPING
from train.tasks.objectives import OBJECTIVES
from train.weights.snapshot import load_snapshot

LATEST = "snapshots/latest.safetensors"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_only_an_objective_that_learns_jumps_has_an_end_time(objective, tmp_path, train_here):
    start = ""
    if objective in JUMPING:
        assert train_here("dit", tmp_path / "teacher", "--max-steps 1") == 0
        start = f"--teacher {tmp_path / 'teacher' / LATEST} --mid-training.points 3 --mid-training.pairs 2"
    assert train_here("dit", tmp_path / "run", f"--objective {objective} {start} --max-steps 1") == 0
    weights = load_snapshot(tmp_path / "run" / LATEST).model.state_dict()
    assert any(name.startswith("r_embedder.") for name in weights) == (objective in JUMPING)


def test_what_jumps_must_be_among_the_objectives():
    assert set(OBJECTIVES) > JUMPING
