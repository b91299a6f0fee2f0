"""Comparing sets of images by their features: Fréchet distance, MIND, Inception Score, precision and recall.

Every function is pure and follows the ADM evaluation, whose numbers published tables report.

Source: github:openai/guided-diffusion evaluations/evaluator.py.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from eval.metrics.moments import Gaussian
from shards import UsageError

INCEPTION_SCORE_SPLIT = 5000
"""Images a part of the Inception Score. Source: evaluator.py, compute_inception_score(split_size=5000)."""
NEIGHBOURHOOD = 3
"""Neighbour that sets a manifold's radius. Source: evaluator.py, ManifoldEstimator(nhood_sizes=(3,))."""


MIND_DIRECTIONS, MIND_SEED = 1000, 2020
"""Source: github:toshas/torch-fidelity at 5e211a9, metric_mind (not in its release 0.4.0)."""

VALIDATION_DISTANCES = {
    "inception": 1.68,
    "convnext": 56.87,
    "dinov2": 14.19,
    "mae": 0.04,
    "siglip": 0.60,
    "clip": 5.60,
}
"""Fréchet distance of ImageNet's validation images to its training images at 256 pixels, by representation.

Source: github:Jiawei-Yang/FD-loss eval_all_fds.py at 5c03b81.
"""


def frechet_ratio(distance: float, representation: str) -> float:
    """FDr: a Fréchet distance to ImageNet's training images as a multiple of what real unseen images have.

    Args:
        distance: Fréchet distance of generated images to the training images.
        representation: One of `VALIDATION_DISTANCES`.

    Source: arXiv 2605.18324 and github:Jiawei-Yang/FD-loss at 5c03b81; FDr6 is the mean of all six.
    """
    return distance / VALIDATION_DISTANCES[representation]


def mind(
    generated: Tensor, reference: Tensor, *, directions: int = MIND_DIRECTIONS, seed: int = MIND_SEED
) -> float:
    """Return the sliced Wasserstein distance: 3 D · mean over directions u and ranks of (sort(X u) − sort(Y u))².

    Of the larger set a random part as large as the smaller one is taken.

    Args:
        generated: Features [n, D] on the device to compute on.
        reference: Features [m, D] on the same device.
        directions: Random unit vectors to project on.
        seed: Of the part and the directions.

    Raises:
        UsageError: The features have different widths, or there are none.

    Source: arXiv 2605.06797; github:toshas/torch-fidelity at 5e211a9, metric_mind.
    """
    if generated.shape[1] != reference.shape[1] or not min(len(generated), len(reference)):
        raise UsageError(
            f"MIND compares features of one width, got {list(generated.shape)} and {list(reference.shape)}; use the "
            "same feature network and at least one image of each kind"
        )
    generator = torch.Generator().manual_seed(seed)
    count = min(len(generated), len(reference))
    sets = [_part(features, count, generator) for features in (generated, reference)]
    width = generated.shape[1]
    u = torch.randn(directions, width, generator=generator)
    u = (u / u.norm(dim=1, keepdim=True)).to(generated.device, torch.float64)
    total = 0.0
    for some in u.split(50):
        x, y = ((features.double() @ some.T).sort(dim=0).values for features in sets)
        total += float((x - y).square().mean(dim=0).sum())
    return 3 * width * total / directions


def _part(features: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return `count` features, chosen at random where there are more."""
    if len(features) == count:
        return features
    return features[torch.randperm(len(features), generator=generator)[:count].to(features.device)]


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """‖μa − μb‖² + tr(Σa + Σb − 2 (Σa Σb)^½).

    The trace of the square root is the sum of the roots of the eigenvalues of Σa^½ Σb Σa^½, which is
    symmetric: stable where a covariance has no full rank, as with fewer images than features. Eigenvalues
    that rounding made negative count as zero; the published evaluations take the real part of the root,
    which is the same.

    Source: Heusel et al., arXiv 1706.08500, equation 6.
    """
    if a.mean.shape != b.mean.shape:
        raise UsageError(
            f"a Fréchet distance needs features of one width, got {a.mean.shape[0]} and {b.mean.shape[0]}; "
            "use statistics of the same feature network"
        )
    product = np.linalg.eigvalsh(a.root @ b.covariance @ a.root)
    trace_of_root = np.sqrt(np.clip(product, 0.0, None)).sum()
    delta = a.mean - b.mean
    return float(delta @ delta + np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * trace_of_root)


def inception_score(logits: NDArray[np.floating], split_size: int = INCEPTION_SCORE_SPLIT) -> float:
    """Return the mean over consecutive parts of exp(mean KL(p(y|x) ‖ p(y))).

    Args:
        logits: Class logits without the bias, float [n, classes], in the order of the images.
        split_size: Images a part; the last part may be smaller.

    Source: Salimans et al., arXiv 1606.03498; parts as in evaluator.py, compute_inception_score.
    """
    parts = []
    for start in range(0, len(logits), split_size):
        log_p = torch.from_numpy(logits[start : start + split_size].astype(np.float64)).log_softmax(dim=1)
        p = log_p.exp()
        divergence = (p * (log_p - p.mean(dim=0).log())).sum(dim=1).mean()
        parts.append(float(divergence.exp()))
    return float(np.mean(parts))


def precision_recall(
    real: Tensor, generated: Tensor, *, neighbourhood: int = NEIGHBOURHOOD, rows: int = 1024
) -> tuple[float, float]:
    """Return the share of generated images inside the real manifold, and of real images inside the generated one.

    A manifold is the union of the balls around its features that reach to their third neighbour, a point
    not being its own neighbour. Distances are float64; the published evaluator takes float16 distances
    where they are finite, which moves the third decimal.

    Args:
        real: Features [n, D] on the device to compute on.
        generated: Features [m, D] on the same device.
        neighbourhood: Which neighbour sets the radius.
        rows: Rows of the distance matrix held at a time.

    Returns:
        Precision and recall, each in [0, 1].

    Raises:
        UsageError: A set has no more images than `neighbourhood`.

    Source: Kynkäänniemi et al., arXiv 1904.06991, equations 1 and 2.
    """
    smaller = min(len(real), len(generated))
    if smaller <= neighbourhood:
        raise UsageError(
            f"precision and recall need more than {neighbourhood} images of each kind, got {smaller}; "
            "give more images"
        )
    real, generated = real.double(), generated.double()
    real_radii = _radii(real, neighbourhood, rows)
    generated_radii = _radii(generated, neighbourhood, rows)
    precision = _share_inside(generated, real, real_radii, rows)
    recall = _share_inside(real, generated, generated_radii, rows)
    return precision, recall


def _radii(points: Tensor, neighbourhood: int, rows: int) -> Tensor:
    # A point's distance to itself is the smallest, hence one place further.
    blocks = [
        torch.cdist(block, points).kthvalue(neighbourhood + 1, dim=1).values
        for block in torch.split(points, rows)
    ]
    return torch.cat(blocks)


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor, rows: int) -> float:
    inside = [(torch.cdist(block, centres) <= radii).any(dim=1) for block in torch.split(points, rows)]
    return float(torch.cat(inside).double().mean())
