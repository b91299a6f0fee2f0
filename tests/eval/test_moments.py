"""Streamed feature moments are those of one pass over everything."""

import numpy as np
import pytest

from eval.metrics.moments import FeatureMoments
from shards.errors import UsageError


def _features(count, width=7, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, width)) * rng.uniform(0.1, 9, width) + 40).astype(np.float32)


def test_blocks_of_any_sizes_give_the_moments_of_all_at_once():
    features = _features(50)
    moments = FeatureMoments(7)
    for block in np.split(features, [1, 4, 4, 30]):
        moments.update(block)
    gaussian = moments.gaussian()
    whole = features.astype(np.float64)
    np.testing.assert_allclose(gaussian.mean, whole.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(gaussian.covariance, np.cov(whole, rowvar=False), rtol=1e-12, atol=1e-13)
    assert gaussian.count == 50


@pytest.mark.parametrize("shares", [(50,), (20, 30), (17, 0, 33)])
def test_merged_processes_give_the_moments_of_one_process(shares):
    features = _features(50)
    merged = FeatureMoments(7)
    start = 0
    for share in shares:
        merged.merge(FeatureMoments.of(features[start : start + share]) if share else FeatureMoments(7))
        start += share
    whole = FeatureMoments.of(features)
    np.testing.assert_allclose(
        merged.gaussian().covariance, whole.gaussian().covariance, rtol=1e-12, atol=1e-13
    )
    np.testing.assert_allclose(merged.gaussian().mean, whole.gaussian().mean, rtol=1e-14)


def test_far_from_zero_the_covariance_keeps_its_digits():
    features = _features(400).astype(np.float64) + 1e7
    moments = FeatureMoments(7)
    for block in np.array_split(features, 9):
        moments.update(block)
    np.testing.assert_allclose(
        moments.gaussian().covariance, np.cov(features, rowvar=False), rtol=1e-6, atol=1e-8
    )


def test_one_image_has_no_covariance():
    with pytest.raises(UsageError, match="at least 2 images, got 1"):
        FeatureMoments.of(_features(1)).gaussian()
