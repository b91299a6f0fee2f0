"""Conditions as tokens of the sequence: time, guidance scale, class, text, or frames with an action.

Module names are those of the published weights. No condition token has a position.

Source: RAEv2 (arXiv 2605.18324) and the state dicts of github:nanovisionx/RAEv2 at 8a0d238; "in-context conditioning":
arXiv 2212.09748 section 3.2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from train.models.config import InContextDiTConfig
from train.models.embeddings import TimeEmbedding
from train.models.layers import NORM_EPS


class Frames(NamedTuple):
    """What a next frame is predicted from; all entries zero: no condition."""

    latents: Tensor
    """float [B, K, D, h, w]: the K frames before it."""
    action: Tensor
    """float [B, 3]: the movement between (dx, dy, change of yaw), normalised."""
    offset: Tensor
    """float [B]: how far ahead the frame lies."""


Condition = Tensor | Frames | None
"""Classes int64 [B]; embedded text float [B, M, context_width]; frames; or no condition."""


def learnable_tokens(number: int, width: int) -> nn.Parameter:
    """Return tokens [number, width] drawn from N(0, 1 / width). Source: as the module."""
    return nn.Parameter(torch.randn(number, width) * width**-0.5)


class ScalarTokens(TimeEmbedding):
    """Tokens of a scalar (a time or a guidance scale): its embedding, to which each adds its own learned part."""

    def __init__(self, number: int, width: int) -> None:
        super().__init__(width)
        self.learnable_tokens = learnable_tokens(number, width)

    def tokens(self, embedded: Tensor) -> Tensor:
        """Return embeddings [B, width], which calling the module gives, → tokens [B, number, width]."""
        return embedded[:, None] + self.learnable_tokens


class LabelTokens(nn.Module):
    """Tokens of a class: its row of a table, to which each adds its own learned part; the last row is no class."""

    def __init__(self, num_classes: int, number: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)
        self.learnable_tokens = learnable_tokens(number, width)

    def forward(self, y: Tensor) -> Tensor:
        """Return classes int64 [B] in [0, num_classes] → [B, number, width]."""
        rows: Tensor = self.embedding_table(y)
        return rows[:, None] + self.learnable_tokens


class TextTokens(nn.Module):
    """Tokens of a text: a text encoder's, normalised and projected."""

    def __init__(self, context_width: int, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(context_width, eps=NORM_EPS)
        self.proj = nn.Linear(context_width, width)

    def forward(self, context: Tensor) -> Tensor:
        """[B, M, context_width] → [B, M, width]."""
        tokens: Tensor = self.proj(self.norm(context))
        return tokens


class FrameTokens(nn.Module):
    """Tokens of frames, frame by frame and row by row, then of the action, then one of the offset."""

    def __init__(self, config: InContextDiTConfig) -> None:
        super().__init__()
        width, patch_size = config.width, config.patch_size
        self.context_patch_embed = nn.Conv2d(config.token_width, width, patch_size, stride=patch_size)
        self.action_proj = nn.Linear(3, width)
        self.action_tokens = learnable_tokens(config.num_action_tokens, width)
        self.time_emb = ScalarTokens(1, width)

    def forward(self, frames: Frames) -> Tensor:
        """K frames → [B, K·N + num_action_tokens + 1, width]."""
        patches = self.context_patch_embed(frames.latents.flatten(0, 1)).flatten(2).transpose(1, 2)
        action = self.action_proj(frames.action)[:, None] + self.action_tokens
        offset = self.time_emb.tokens(self.time_emb(frames.offset.flatten()))
        return torch.cat(
            [patches.unflatten(0, frames.latents.shape[:2]).flatten(1, 2), action, offset], dim=1
        )


def condition_tokens(config: InContextDiTConfig) -> nn.Module | None:
    """Build the module that makes tokens of a network's condition; None if it has none."""
    if config.condition == "label":
        return LabelTokens(config.num_classes, config.num_condition_tokens, config.width)
    if config.condition == "text":
        assert config.context_width is not None
        return TextTokens(config.context_width, config.width)
    return FrameTokens(config) if config.condition == "frames" else None
