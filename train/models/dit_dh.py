"""DiT-DH: a deep narrow transformer reads the noisy latent, a wide shallow head predicts the velocity.

The deep part turns a latent into one condition a token, the head modulates its own wide view of the same
latent with it. So the width that diffusing a D-channel latent needs (at least D) is paid in two blocks
instead of in all of them.

Source: arXiv 2510.11690 section 5; github:bytetriper/RAE src/stage2/models/DDT.py at a4d18c4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train.models.compilation import compile_blocks
from train.models.config import DiTDHConfig
from train.models.embeddings import (
    LabelEmbedding,
    PatchEmbedding,
    RotaryEncoding,
    TimeEmbedding,
    embed_times,
    end_time_embedding,
    position_table,
    unpatchify,
)
from train.models.layers import Block, FinalLayer, run_blocks

LEARNED_TABLE_STD = 0.02
"""Standard deviation a learned position table starts with; ours, a ViT's usual one."""


class DiTDH(nn.Module):
    """Velocity of a noisy latent, given time and class.

    Attributes:
        config: the network's shape.
        recompute_activations: recompute blocks in the backward pass instead of keeping what they computed.
    """

    def __init__(self, config: DiTDHConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_activations = False
        patch_values = config.patch_size**2 * config.token_width

        self.s_embedder = PatchEmbedding(config.token_width, config.width, config.patch_size)
        self.x_embedder = PatchEmbedding(config.token_width, config.head_width, config.patch_size)
        self.t_embedder = TimeEmbedding(config.width)
        self.r_embedder = end_time_embedding(config.width) if config.end_time else None
        self.y_embedder = LabelEmbedding(config.num_classes, config.width, null_label=config.null_label)
        self.pos_embed = self._position_table(config)
        self.enc_feat_rope = self._rotary(config, config.width // config.num_heads)
        self.dec_feat_rope = self._rotary(config, config.head_width // config.head_num_heads)
        self.s_projector = (
            nn.Identity() if config.width == config.head_width else nn.Linear(config.width, config.head_width)
        )
        deep = [Block(config, config.width, config.num_heads) for _ in range(config.depth)]
        head = [Block(config, config.head_width, config.head_num_heads) for _ in range(config.head_depth)]
        self.blocks = nn.ModuleList([*deep, *head])
        self.final_layer = FinalLayer(config.head_width, patch_values, rms=config.rms_norm)

    @staticmethod
    def _position_table(config: DiTDHConfig) -> nn.Parameter | None:
        if not config.position_table:
            return None
        # A parameter, as in the published weights, whose training trains it too; unless it is learned it is frozen
        # until the trainer says otherwise.
        table = position_table(config.width, config.token_grid, config.positions)
        if not config.learned_table:
            return nn.Parameter(table, requires_grad=False)
        return nn.Parameter(nn.init.normal_(torch.empty_like(table), std=LEARNED_TABLE_STD))

    @staticmethod
    def _rotary(config: DiTDHConfig, head_width: int) -> RotaryEncoding | None:
        return RotaryEncoding(head_width, config.token_grid, config.positions) if config.rope else None

    def compile(self, **options: Any) -> None:
        """Compile block by block, in place of `nn.Module.compile`."""
        compile_blocks([*self.blocks, self.final_layer], **options)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        """Predict the velocity, noise minus data; with an end time r its average between r and t.

        Args:
            x_t: noisy latents float [B, D, h, w].
            t: time float [B] in [0, 1]; 0 is data, 1 is noise.
            y: class int64 [B] in [0, num_classes]; num_classes is no class.
            r: end of the jump from t, float [B], of a network with `end_time`; None: r = t.

        Returns:
            Velocity [B, D, h, w].
        """
        deep, head = self.blocks[: self.config.depth], self.blocks[self.config.depth :]
        recompute = self.recompute_activations
        time = embed_times(self.t_embedder, self.r_embedder, t, r)
        # SiLU here and again inside every modulation: so the published weights were trained.
        c = F.silu(time + self.y_embedder(y))[:, None]

        s = self.s_embedder(x_t)
        if self.pos_embed is not None:
            s = s + self.pos_embed
        s = run_blocks(deep, s, c, self.enc_feat_rope, recompute=recompute)
        s = self.s_projector(F.silu(time[:, None] + s))

        # The head's view of the latent has no position table: rotary encoding alone places its tokens.
        x = run_blocks(head, self.x_embedder(x_t), s, self.dec_feat_rope, recompute=recompute)
        return unpatchify(self.final_layer(x, s), self.config.token_grid, self.config.patch_size)
