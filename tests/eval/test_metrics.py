"""The set metrics against closed forms, independent formulas and recorded reference numbers."""

import json
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from scipy import linalg

from eval.metrics.moments import FeatureMoments, Gaussian
from eval.metrics.scoring import MEANS, METRICS
from eval.metrics.set_distances import frechet_distance, inception_score, precision_recall
from eval.settings import SetMetric
from shards.errors import UsageError


def test_every_metric_that_a_setting_names_has_a_row():
    assert set(get_args(SetMetric)) <= METRICS.keys() | MEANS.keys()


def _gaussian(features):
    return FeatureMoments.of(features).gaussian()


def test_frechet_distance_is_the_recorded_one(rae_fixtures):
    found = [
        path
        for path in rae_fixtures.glob("*.json")
        if json.loads(path.read_text()).get("fixture") == "image_metrics"
    ]
    assert found
    for path in found:
        arrays, facts = load_file(path.with_suffix(".safetensors")), json.loads(path.read_text())
        distance = frechet_distance(_gaussian(arrays["feat_x"]), _gaussian(arrays["feat_y"]))
        assert distance == pytest.approx(facts["frechet"], rel=1e-10)


def test_frechet_distance_of_commuting_covariances_has_a_closed_form():
    rng = np.random.default_rng(1)
    basis = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    first, second = rng.uniform(0, 4, 6), rng.uniform(0, 4, 6)
    mean = rng.standard_normal(6)
    a = Gaussian(mean=mean, covariance=basis * first @ basis.T, count=None)
    b = Gaussian(mean=np.zeros(6), covariance=basis * second @ basis.T, count=None)
    expected = mean @ mean + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_agrees_with_the_matrix_root_of_the_published_evaluator():
    rng = np.random.default_rng(2)
    a, b = (_gaussian(rng.standard_normal((200, 12)) @ rng.standard_normal((12, 12))) for _ in range(2))
    root = linalg.sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_survives_fewer_images_than_features():
    rng = np.random.default_rng(3)
    a, b = (_gaussian(rng.standard_normal((5, 40))) for _ in range(2))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-7)


def test_frechet_distance_refuses_features_of_two_networks():
    rng = np.random.default_rng(4)
    with pytest.raises(UsageError, match="one width, got 3 and 4"):
        frechet_distance(_gaussian(rng.standard_normal((9, 3))), _gaussian(rng.standard_normal((9, 4))))


def test_inception_score_is_the_number_of_classes_when_each_image_is_sure_of_its_own():
    logits = np.eye(8).repeat(5, axis=0) * 200
    assert inception_score(logits) == pytest.approx(8)


def test_inception_score_is_one_when_images_say_nothing():
    assert inception_score(np.tile(np.random.default_rng(5).standard_normal(8), (20, 1))) == pytest.approx(1)


def test_inception_score_averages_consecutive_parts_and_keeps_the_short_last_one():
    logits = np.random.default_rng(6).standard_normal((25, 8)) * 3
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    parts = []
    for part in (p[:10], p[10:20], p[20:]):
        divergence = (part * (np.log(part) - np.log(part.mean(axis=0, keepdims=True)))).sum(axis=1)
        parts.append(np.exp(divergence.mean()))
    assert inception_score(logits, split_size=10) == pytest.approx(np.mean(parts), rel=1e-12)


def _brute_force(real, generated, k):
    def inside(points, centres):
        radii = [sorted(np.linalg.norm(c - d) for d in centres)[k] for c in centres]
        return np.mean(
            [any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii, strict=True)) for p in points]
        )

    return inside(generated, real), inside(real, generated)


def test_precision_and_recall_are_those_of_a_plain_double_loop():
    rng = np.random.default_rng(7)
    real, generated = rng.standard_normal((31, 2)), rng.standard_normal((23, 2)) * 0.5 + 0.9
    found = precision_recall(torch.from_numpy(real), torch.from_numpy(generated), rows=8)
    assert found == pytest.approx(_brute_force(real, generated, 3))
    assert 0 < found[0] < 1
    assert 0 < found[1] < 1


def test_a_generator_that_copies_one_mode_is_precise_but_recalls_only_that_mode():
    rng = np.random.default_rng(8)
    modes = np.array([[0.0, 0.0], [100.0, 0.0]])
    real = np.concatenate([mode + rng.standard_normal((40, 2)) for mode in modes])
    generated = modes[0] + 0.1 * rng.standard_normal((40, 2))
    precision, recall = precision_recall(torch.from_numpy(real), torch.from_numpy(generated))
    assert precision == 1
    assert recall < 0.5


def test_a_manifold_of_three_images_is_refused():
    with pytest.raises(UsageError, match="more than 3 images of each kind, got 3"):
        precision_recall(torch.zeros(3, 2), torch.zeros(9, 2))
