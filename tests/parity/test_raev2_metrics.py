"""Distances between sets of features are what the public code that RAEv2 names computes."""

from __future__ import annotations

import pytest
import torch

from eval.metrics.moments import FeatureMoments
from eval.metrics.set_distances import (
    VALIDATION_DISTANCES,
    frechet_distance,
    frechet_ratio,
    mind,
)

METRICS = pytest.mark.recorded("raev2_metrics*", having="mind")


@METRICS
def test_distances_of_features_equal_the_recorded_ones(case):
    generated, reference = case.tensors["features_generated"], case.tensors["features_reference"]
    gaussians = (FeatureMoments.of(features.numpy()).gaussian() for features in (generated, reference))
    assert frechet_distance(*gaussians) == pytest.approx(case.meta["frechet_distance"], rel=1e-5)
    found = mind(
        generated, reference, directions=case.meta["mind_num_projections"], seed=case.meta["mind_rng_seed"]
    )
    assert found == pytest.approx(case.meta["mind"], rel=1e-5)
    assert found == pytest.approx(case.meta["mind_by_hand"], rel=1e-5)


@METRICS
def test_ratios_and_their_mean_equal_the_recorded_ones(case):
    recorded = case.meta["fdr"]
    assert recorded["validation_fd"] == VALIDATION_DISTANCES
    found = {name: frechet_ratio(value, name) for name, value in recorded["example_raw_fd"].items()}
    assert found == pytest.approx(recorded["fdr_of_each"])
    assert sum(found.values()) / len(found) == pytest.approx(recorded["fdr6"])


def test_mind_of_sets_of_different_sizes_takes_a_part_of_the_larger():
    features = torch.randn(40, 6, generator=torch.Generator().manual_seed(0))
    assert mind(features, features, directions=20) == 0
    same = mind(features, features[:30], directions=20)
    far = mind(features + 3, features[:30], directions=20)
    assert 0 < same < 0.2 * far
