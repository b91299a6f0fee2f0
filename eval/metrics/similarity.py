"""How close reconstructions are to their originals, image by image: PSNR, SSIM and LPIPS.

Images come as uint8, so a figure here is about the images a user gets, rounding included.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from train.engine.arithmetic import whole_float32
from train.models.perceptual import Perceptual

PSNR_CEILING = 100.0
"""Decibels given to identical images. Source: github:bytetriper/RAE at a4d18c4, src/eval/ref_iqa.py."""

_WINDOW = 11
_SIGMA = 1.5
_K1, _K2 = 0.01, 0.03


def _paired(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    assert a.dtype == b.dtype == torch.uint8, f"uint8 images expected, got {a.dtype} and {b.dtype}"
    assert a.shape == b.shape, f"paired images expected, got {a.shape} and {b.shape}"
    return a.double() / 255.0, b.double() / 255.0


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Return peak signal-to-noise ratio of each pair, in dB, at most 100.

    Args:
        a: uint8 [B, 3, H, W].
        b: uint8 [B, 3, H, W].

    Returns:
        float64 [B]; the published figure is its mean, not the ratio of the mean error.
    """
    x, y = _paired(a, b)
    error = (x - y).square().flatten(1).mean(dim=1)
    return (-10.0 * error.log10()).clamp(max=PSNR_CEILING)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Return structural similarity of each pair, with a Gaussian window of 11 pixels and a standard deviation of 1.5.

    Averaged over colours and positions; the image is mirrored at its border.

    Args:
        a: uint8 [B, 3, H, W], H and W at least 6.
        b: uint8 [B, 3, H, W].

    Returns:
        float64 [B], at most 1.

    Source: Wang et al., "Image Quality Assessment: From Error Visibility to Structural Similarity" (2004),
    equation 13 with K1 = 0.01, K2 = 0.03 and a data range of 1.
    """
    x, y = _paired(a, b)
    mean_x, mean_y = _blur(x), _blur(y)
    variance_x = _blur(x * x) - mean_x.square()
    variance_y = _blur(y * y) - mean_y.square()
    covariance = _blur(x * y) - mean_x * mean_y
    c1, c2 = _K1**2, _K2**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x.square() + mean_y.square() + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (luminance * structure).flatten(1).mean(dim=1)


@torch.inference_mode()
def lpips(network: Perceptual, a: Tensor, b: Tensor) -> Tensor:
    """Return each pair's perceptual distance, in float32 without TensorFloat-32 whatever the caller's arithmetic is.

    Args:
        network: LPIPS on a device.
        a: uint8 [B, 3, H, W] on the same device.
        b: uint8 [B, 3, H, W] on the same device.

    Returns:
        float64 [B]; 0 for equal images.

    Source: Zhang et al., arXiv 1801.03924, equation 1.
    """
    with whole_float32(a.device):
        distances: Tensor = network(a.float() / 127.5 - 1, b.float() / 127.5 - 1)
    return distances.double()


def _blur(x: Tensor) -> Tensor:
    offsets = torch.arange(_WINDOW, dtype=x.dtype, device=x.device) - (_WINDOW - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * _SIGMA**2))
    weights = weights / weights.sum()
    planes = F.pad(x, [_WINDOW // 2] * 4, mode="reflect").flatten(0, 1)[:, None]
    planes = F.conv2d(planes, weights.view(1, 1, 1, -1))
    planes = F.conv2d(planes, weights.view(1, 1, -1, 1))
    return planes.view(*x.shape[:2], *planes.shape[-2:])
