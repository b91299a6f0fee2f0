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
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from train.models.build import build_model
from train.models.config import ViTDecoderConfig
from train.weights.infer import config_from_reference

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
def decoder() -> Callable[[Recording], nn.Module]:
    """The ViT decoder of a recording, with its weights, ready to be used."""

    def build(case: Recording) -> nn.Module:
        values = case.meta["config"]
        patch_size = values["patch_size"]
        num_patches = values.get("num_patches") or (values["image_size"] // patch_size) ** 2
        return build_decoder(
            values,
            case.state_dict("sd."),
            token_width=values["hidden_size"],
            num_patches=num_patches,
            patch_size=patch_size,
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
            pixel_mean=tuple(case.meta["pixel_mean"]),
            pixel_std=tuple(case.meta["pixel_std"]),
        )

    return build


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
