"""Frozen feature networks of the image metrics: the published Inception and DINOv2.

A network maps uint8 images to named feature vectors, computed in float32 without TensorFloat-32 whatever the caller's
arithmetic is, so that samples and reference are seen alike. Its weights come from a file, from their public
source, or from a seed (for tests); their digest goes into every result, so that statistics of different
weights are never compared.
"""

from __future__ import annotations

import io
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from eval.networks.frozen import randomise, seed_of, state_in_file, weights_digest
from eval.settings import NetworkName
from shards import UserError
from train.engine.arithmetic import whole_float32
from train.models.config import IMAGENET_MEAN, IMAGENET_STD
from train.weights.published import load_exactly

FeatureName = Literal["pool", "spatial", "logits", "cls", "embedding"]

SPATIAL_CHANNELS = 7
"""Channels of `mixed_6/conv` in sFID. Source: github:openai/guided-diffusion evaluations/evaluator.py."""

DINOV2_MODEL = "vit_large_patch14_dinov2.lvd142m"
"""Backbone of FD-DINOv2. Source: Stein et al., arXiv 2306.04675, section 3."""


class FeatureNetwork(Protocol):
    """What the metrics need of a feature network."""

    @property
    def name(self) -> str:
        """Name in results and in saved statistics."""
        ...

    @property
    def digest(self) -> str:
        """SHA-256 of the weights."""
        ...

    @property
    def main(self) -> FeatureName:
        """The feature by which single images are compared."""
        ...

    def features(self, images: Tensor) -> dict[FeatureName, Tensor]:
        """Return the features of uint8 images [B, 3, H, W]: float32 [B, width] each."""
        ...


class Representation(NamedTuple):
    """A network of FDr6 and how an image is shown to it."""

    model: str
    """Name of a timm model, with its weights' tag."""
    size: int
    """Side that images are resized to, in pixels."""
    pooling: Literal["class token", "mean", "attention"]
    """What becomes one vector an image: the class token, the mean over positions, or the model's attention pool."""


REPRESENTATIONS: dict[NetworkName, Representation] = {
    "convnext": Representation("convnextv2_base.fcmae_ft_in22k_in1k", 224, "mean"),
    "dinov2-256": Representation(DINOV2_MODEL, 256, "class token"),
    "mae": Representation("vit_large_patch16_224.mae", 224, "class token"),
    "siglip": Representation("vit_so400m_patch16_siglip_256.v2_webli", 224, "attention"),
    "clip": Representation("vit_large_patch14_clip_224.openai", 256, "class token"),
}
"""The representations of FDr6 beside Inception's. Source: github:Jiawei-Yang/FD-loss at 5c03b81."""


class InceptionFeatures:
    """The Inception-v3 of 2015 that the published FID, sFID and Inception Score are defined on.

    `pool` [2048] gives FID, precision and recall; `spatial` [2023], the first seven channels of the fourth
    17 × 17 block in (row, column, channel) order, gives sFID; `logits` [1008], without the bias, give the
    Inception Score.

    Args:
        weights: `public` (torch-fidelity's release of the TensorFlow weights), a file of them, or
            `random:SEED`.
        device: Where to compute.

    Raises:
        UserError: torch-fidelity is not installed, or the file holds other weights.
    """

    name = "inception-v3-compat"
    main: FeatureName = "pool"

    def __init__(self, weights: str, device: torch.device) -> None:
        network = _inception_without_weights()
        seed = seed_of(weights)
        if seed is not None:
            randomise(network, seed)
        else:
            load_exactly(network, _inception_state(weights), weights)
        self.digest = weights_digest(network)
        self.network = network.to(device).eval().requires_grad_(requires_grad=False)
        self._spatial: list[Tensor] = []
        # TensorFlow's mixed_6 is Mixed_6d here, and mixed_6/conv its 1 × 1 branch after the ReLU.
        self.network.Mixed_6d.branch1x1.register_forward_hook(
            lambda _module, _inputs, output: self._spatial.append(output)
        )

    @torch.inference_mode()
    def features(self, images: Tensor) -> dict[FeatureName, Tensor]:
        """Return the features of uint8 images [B, 3, H, W]: `pool`, `spatial` and `logits`, float32."""
        self._spatial.clear()  # of a batch that did not fit
        with whole_float32(images.device):
            pool, logits = self.network(images)
        spatial = self._spatial.pop()[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1)
        return {"pool": pool, "spatial": spatial.flatten(1), "logits": logits}


class DinoFeatures:
    """DINOv2's class token, for FD-DINOv2: a second opinion that follows people's judgement more closely.

    Images are resized to 224 by bicubic interpolation with antialiasing and normalised as for ImageNet.

    Args:
        weights: `public` (timm's copy), a state dict file, or `random:SEED`.
        device: Where to compute.
        model: Name of a timm vision transformer.

    Raises:
        UserError: The file holds other weights.

    Source: Stein et al., arXiv 2306.04675; github:layer6ai-labs/dgm-eval dgm_eval/models/dinov2.py.
    """

    main: FeatureName = "cls"
    _INPUT_SIZE = 224

    def __init__(self, weights: str, device: torch.device, model: str = DINOV2_MODEL) -> None:
        self.name = model
        network = _timm_model(model, weights, img_size=self._INPUT_SIZE)
        self.digest = weights_digest(network)
        self.network = network.to(device).eval().requires_grad_(requires_grad=False)
        self._mean = torch.tensor(IMAGENET_MEAN, device=device).view(3, 1, 1)
        self._std = torch.tensor(IMAGENET_STD, device=device).view(3, 1, 1)

    @torch.inference_mode()
    def features(self, images: Tensor) -> dict[FeatureName, Tensor]:
        """Return the features of uint8 images [B, 3, H, W]: `cls`, float32."""
        size = (self._INPUT_SIZE, self._INPUT_SIZE)
        with whole_float32(images.device):
            resized = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True)
            # The published code resizes 8-bit images, so the result is rounded to whole levels.
            pixels = resized.round().clamp(0, 255) / 255
            return {"cls": self.network((pixels - self._mean) / self._std)}


class TimmFeatures:
    """One vector an image of a timm model: `embedding`.

    Images are resized by bicubic interpolation with antialiasing and normalised with the model's own statistics, in
    whole float32; FD-loss computes in bfloat16.

    Args:
        representation: The model, the side of its images and what becomes the vector.
        weights: `public` (timm's copy), a state dict file, or `random:SEED`.
        device: Where to compute.

    Raises:
        UserError: The weights cannot be had, or the file holds other ones.

    Source: github:Jiawei-Yang/FD-loss at 5c03b81.
    """

    main: FeatureName = "embedding"

    def __init__(self, representation: Representation, weights: str, device: torch.device) -> None:
        self._representation = representation
        self.name = f"{representation.model}, {representation.size} pixels"
        # A convolutional network takes any size.
        size = {} if representation.pooling == "mean" else {"img_size": representation.size}
        network = _timm_model(representation.model, weights, **size)
        self.digest = weights_digest(network)
        self.network = network.to(device).eval().requires_grad_(requires_grad=False)
        mean, std = (network.pretrained_cfg[name] for name in ("mean", "std"))
        self._mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self._std = torch.tensor(std, device=device).view(3, 1, 1)

    @torch.inference_mode()
    def features(self, images: Tensor) -> dict[FeatureName, Tensor]:
        """Return the features of uint8 images [B, 3, H, W]: `embedding`, float32."""
        size = (self._representation.size,) * 2
        with whole_float32(images.device):
            pixels = F.interpolate(images.float() / 255, size=size, mode="bicubic", antialias=True)
            out = self.network.forward_features((pixels - self._mean) / self._std)
            if self._representation.pooling == "attention":
                out = self.network.forward_head(out, pre_logits=True)
            elif self._representation.pooling == "mean":
                out = out.mean(dim=(2, 3))
            else:
                out = out[:, 0]
        return {"embedding": out.float()}


def _timm_model(model: str, weights: str, **options: Any) -> Any:
    import timm

    seed = seed_of(weights)
    try:
        network = timm.create_model(model, pretrained=weights == "public", num_classes=0, **options)
    except OSError as error:
        raise UserError(f"weights of {model} could not be fetched ({error}); give them as a file") from error
    if seed is not None:
        randomise(network, seed)
    elif weights != "public":
        load_exactly(network, state_in_file(weights), weights)
    return network


def _inception_without_weights() -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError as error:
        raise UserError(
            "FID needs torch-fidelity, which is not installed; run `pip install -e '.[metrics]'`"
        ) from error

    class Inception(FeatureExtractorInceptionV3):  # type: ignore[misc]
        """The extractor, with weights that are loaded after construction and never unpickled."""

        def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            # The base constructor must load something: it is given an empty file, which changes nothing.
            return super().load_state_dict(state_dict, *args, **kwargs) if state_dict else None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return Inception(
        "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=nothing
    )


def _inception_state(weights: str) -> dict[str, Tensor]:
    if weights != "public":
        return state_in_file(weights)
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    # The name of the file ends in the start of its SHA-256, which is checked.
    try:
        return torch.hub.load_state_dict_from_url(
            URL_INCEPTION_V3, map_location="cpu", check_hash=True, weights_only=True
        )
    except OSError as error:
        raise UserError(
            f"the Inception weights could not be fetched ({error}); give them as a file: {URL_INCEPTION_V3}"
        ) from error
