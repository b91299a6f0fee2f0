"""Recorded reference numbers as test cases.

A test marked `@pytest.mark.recorded("dit_dh*")` that asks for `case` runs once for each recording in the folder
`$RAE_FIXTURES` (default: the repository's copy) whose `fixture` field matches one of the patterns, also for
recordings nobody has seen yet: what to build is read from each recording's own .json. `having="cfg."` takes only
those with a tensor or field whose name begins so.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from reference_configs import config_from_reference
from safetensors.torch import load_file
from torch import Tensor, nn

from train.models.build import build_model
from train.models.config import DiTConfig, DiTDHConfig, ViTDecoderConfig
from train.models.flat_config import FlatConfig, FlatHalfConfig

OWN_FOLDER = Path(__file__).parents[1] / "fixtures" / "rae"
FOLDER = Path(os.environ.get("RAE_FIXTURES", OWN_FOLDER))


@dataclass(frozen=True)
class Recording:
    """One recording: `meta` is its .json, `tensors` its .safetensors."""

    name: str
    meta: dict[str, Any]
    folder: Path = FOLDER

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.folder / f"{self.name}.safetensors")

    def state_dict(self, prefix: str) -> dict[str, Tensor]:
        """The tensors under a prefix such as "sd.", without it."""
        return {
            key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)
        }

    @property
    def tolerance(self) -> float:
        """Relative to max(1, max|expected|); activations near the norms' eps amplify rounding."""
        return 1e-4 if "tiny_activations" in self.name else 1e-5


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "recorded(*patterns, having=prefix): run for every recording that matches"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("recorded")
    if marker is None or "case" not in metafunc.fixturenames:
        return
    having = marker.kwargs.get("having", "")
    cases = [
        case
        for case in (
            Recording(path.stem, json.loads(path.read_text())) for path in sorted(FOLDER.glob("*.json"))
        )
        if any(fnmatch(case.meta.get("fixture", case.name), pattern) for pattern in marker.args)
        and any(name.startswith(having) for name in (*case.meta, *case.meta.get("tensors", ())))
    ]
    metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture(scope="session")
def recording() -> Callable[[str], Recording]:
    """A recording that others refer to by name: from `$RAE_FIXTURES`, else the repository's."""

    def find(name: str) -> Recording:
        folder = FOLDER if (FOLDER / f"{name}.json").exists() else OWN_FOLDER
        return Recording(name, json.loads((folder / f"{name}.json").read_text()), folder)

    return find


@pytest.fixture(scope="session")
def transformer() -> Callable[..., nn.Module]:
    """The DiT or DiT-DH of a recording, with its weights, ready to be used."""

    def build(case: Recording, prefix: str = "sd.", config: str = "config") -> nn.Module:
        target = case.meta.get("class", "") if prefix != "sd_teacher." else ""
        model = build_model(config_from_reference(case.meta[config], target))
        model.load_state_dict(case.state_dict(prefix), strict=True)
        return model.eval()

    return build


def build_decoder(
    values: dict[str, Any], weights: dict[str, Tensor], *, token_width: int, num_patches: int, **more: Any
) -> nn.Module:
    """A ViT decoder of the reference's settings."""
    side = math.isqrt(num_patches)
    config = ViTDecoderConfig(
        token_width=token_width,
        grid=(side, side),
        width=values["decoder_hidden_size"],
        depth=values["decoder_num_hidden_layers"],
        num_heads=values["decoder_num_attention_heads"],
        mlp_width=values["decoder_intermediate_size"],
        **more,
    )
    model = build_model(config)
    model.load_state_dict(weights, strict=True)
    return model.eval()


@pytest.fixture(scope="session")
def decoder() -> Callable[..., nn.Module]:
    """The ViT decoder of a recording, with its weights, ready to be used."""

    def build(case: Recording, **more: Any) -> nn.Module:
        values = case.meta["config"]
        patch_size = values["patch_size"]
        num_patches = values.get("num_patches") or (values["image_size"] // patch_size) ** 2
        return build_decoder(
            values,
            case.state_dict("sd."),
            token_width=values["hidden_size"],
            num_patches=num_patches,
            patch_size=patch_size,
            **more,
        )

    return build


@pytest.fixture(scope="session")
def rae_decoder() -> Callable[[Recording], nn.Module]:
    """The decoder of a recorded whole autoencoder."""

    def build(case: Recording) -> nn.Module:
        return build_decoder(
            case.meta["config"]["decoder"],
            case.state_dict("sd.decoder."),
            token_width=case.tensors["latent_var"].shape[0],
            num_patches=case.meta["num_patches"],
            patch_size=case.meta["config"]["decoder_patch_size"],
            # RAEv2's decoders put out the image itself.
            pixel_mean=tuple(case.meta.get("pixel_mean", (0.0, 0.0, 0.0))),
            pixel_std=tuple(case.meta.get("pixel_std", (1.0, 1.0, 1.0))),
        )

    return build


class FlatLayout:
    """FlatDINO's parameter tree under our names: kernels are [in, out], gate and up are two matrices."""

    NAMES = (
        ("att_norm.norm", "norm1"),
        ("mlp_norm.norm", "norm2"),
        ("attention.qkv_proj", "attn.qkv"),
        ("attention.o_proj", "attn.proj"),
        ("attention.q_norm.norm", "attn.q_norm"),
        ("attention.k_norm.norm", "attn.k_norm"),
        ("norm_final.norm", "norm_final"),
        ("norm.norm", "norm"),
        (".layers.", "."),
        ("reg_tokens", "queries"),
        ("embedding_table.embedding", "embedding_table.weight"),
        ("encoder_blocks.", "blocks."),
    )

    def name(self, theirs: str, *, depth: int, swiglu: bool = True) -> tuple[str, int | None]:
        """Our name of a parameter, and which half of it where ours holds two of theirs."""
        ours, half = theirs, None
        if match := re.match(r"decoder_blocks\.(\d+)\.", ours):
            ours = f"blocks.{depth + int(match[1])}." + ours[match.end() :]
        for old, new in self.NAMES:
            ours = ours.replace(old, new)
        mlp = {"gate_proj": "w12", "up_proj": "w12", "down_proj": "w3"}
        for part, new in (mlp if swiglu else {"up_proj": "fc1", "down_proj": "fc2"}).items():
            if f"mlp.{part}" in ours:
                half = {"gate_proj": 0, "up_proj": 1}.get(part) if swiglu else None
                ours = ours.replace(f"mlp.{part}", f"mlp.{new}")
        ours = re.sub(r"^([sx]_embedder)\.", r"\1.proj.", ours)
        return re.sub(r"\.(kernel|scale)$", ".weight", ours), half

    def is_swiglu(self, key: str, tree: Mapping[str, object]) -> bool:
        """Whether the MLP a key belongs to has a gate."""
        before = key.split("mlp.")[0]
        return f"{before}mlp.gate_proj.kernel" in tree

    def state(self, tree: dict[str, Tensor], *, depth: int = 0) -> dict[str, Tensor]:
        """A whole tree as a state dict of ours."""
        halves: dict[str, dict[int | None, Tensor]] = {}
        for key, value in tree.items():
            if key in ("latent_mean", "latent_std"):
                continue  # kept beside the weights; a normaliser's in ours
            ours, half = self.name(key, depth=depth, swiglu=self.is_swiglu(key, tree))
            shaped = value.T if key.endswith("kernel") else value
            if ours.endswith("_embedder.proj.weight"):
                shaped = shaped[:, :, None, None]
            if ours == "pos_embed" and shaped.ndim == 2:
                shaped = shaped[None]
            halves.setdefault(ours, {})[half] = shaped
        return {
            name: parts[None] if None in parts else torch.cat([parts[0], parts[1]])
            for name, parts in halves.items()
        }

    def part(
        self, key: str, tensors: Mapping[str, Tensor], *, tree: Mapping[str, object], depth: int = 0
    ) -> Tensor:
        """Of our tensors, a gradient or a weight, that which one of their keys names, in our layout."""
        ours, half = self.name(key, depth=depth, swiglu=self.is_swiglu(key, tree))
        return tensors[ours] if half is None else tensors[ours].chunk(2)[half]

    def compressor(self, values: dict[str, Any]) -> FlatConfig:
        """Configuration of a recorded compressor."""

        def half(name: str) -> FlatHalfConfig:
            theirs = values[name]
            return FlatHalfConfig(
                width=theirs["embed_dim"],
                depth=theirs["num_layers"],
                num_heads=theirs["num_heads"],
                mlp_width=theirs["mlp_hidden_dim"],
                swiglu=theirs["mlp_type"] == "swiglu",
                disposable_queries=values[f"{name}_disposable_registers"],
            )

        return FlatConfig(
            num_tokens=values["num_tokens"],
            token_width=values["token_width"],
            num_latents=values["num_latents"],
            latent_width=values["latent_width"],
            encoder=half("encoder"),
            decoder=half("decoder"),
            tanh=values["tanh"],
            inner_layer=values["intermediate_layer"] is not None,
        )

    def generator(self, values: dict[str, Any]) -> DiTConfig | DiTDHConfig:
        """Configuration of a recorded generator."""
        common: dict[str, Any] = {
            "token_width": values["in_channels"],
            "num_classes": values["num_classes"],
            "shift": not values["wo_shift"],
            "rope": values["use_rope"],
            "positions": "sequence",
            "norm_affine": True,
        }
        if "transformer" not in values:
            return DiTDHConfig(
                grid=(1, values["input_size"]),
                width=values["encoder_dim"],
                depth=values["encoder_depth"],
                num_heads=values["encoder_heads"],
                head_width=values["decoder_dim"],
                head_depth=values["decoder_depth"],
                head_num_heads=values["decoder_heads"],
                # Theirs is the hidden width itself over the width, ours two thirds of it.
                mlp_ratio=values["mlp_ratio"] * (1.5 if values["use_swiglu"] else 1),
                qk_norm=values["use_qknorm"],
                swiglu=values["use_swiglu"],
                rms_norm=values["use_rmsnorm"],
                position_table=values["use_pos_embed"],
                learned_table=True,
                **common,
            )
        theirs = values["transformer"]
        return DiTConfig(
            grid=(1, values["num_patches"]),
            width=theirs["embed_dim"],
            depth=theirs["num_layers"],
            num_heads=theirs["num_heads"],
            mlp_width=theirs["mlp_hidden_dim"],
            qk_norm=theirs["qk_norm"],
            swiglu=theirs["mlp_type"] == "swiglu",
            rms_norm=theirs["norm_type"] == "rms",
            predict_sigma=values["learn_sigma"],
            **common,
        )


@pytest.fixture(scope="session")
def flat_layout() -> FlatLayout:
    return FlatLayout()


@pytest.fixture
def assert_matches() -> Callable[..., None]:
    """Assert max|actual − expected| ≤ tolerance · max(1, max|expected|)."""

    def check(actual: Tensor, expected: Tensor | float, tolerance: float = 1e-5, what: str = "") -> None:
        expected = torch.as_tensor(expected, dtype=actual.dtype)
        assert actual.shape == expected.shape, (
            f"{what}: shape {tuple(actual.shape)} != {tuple(expected.shape)}"
        )
        error = (actual - expected).abs().max().item()
        scale = max(1.0, expected.abs().max().item())
        assert error <= tolerance * scale, (
            f"{what}: off by {error:.3g}, at most {tolerance * scale:.3g} allowed"
        )

    return check


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
