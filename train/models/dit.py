"""Plain latent diffusion transformer in LightningDiT's form: the baseline DiT-DH is measured against.

Source: arXiv 2212.09748; arXiv 2501.01423; github:bytetriper/RAE src/stage2/models/lightningDiT.py at
a4d18c4.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from train.models.compilation import compile_blocks
from train.models.config import DiTConfig
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


class DiT(nn.Module):
    """Velocity of a noisy latent, given time and class.

    Attributes:
        config: the network's shape.
        recompute_activations: recompute blocks in the backward pass instead of keeping what they computed.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute_activations = False
        channels = config.token_width * (2 if config.predict_sigma else 1)

        self.x_embedder = PatchEmbedding(config.token_width, config.width, config.patch_size)
        self.t_embedder = TimeEmbedding(config.width)
        self.r_embedder = end_time_embedding(config.width) if config.end_time else None
        self.y_embedder = LabelEmbedding(config.num_classes, config.width, null_label=config.null_label)
        # A parameter, as in the published weights, whose training trains it too; frozen until the trainer
        # says so.
        table = position_table(config.width, config.token_grid, config.positions)
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        head_width = config.width // config.num_heads
        self.feat_rope = (
            RotaryEncoding(head_width, config.token_grid, config.positions) if config.rope else None
        )
        self.blocks = nn.ModuleList(
            Block(config, config.width, config.num_heads) for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(config.width, config.patch_size**2 * channels, rms=config.rms_norm)
        self._init_linears()

    def _init_linears(self) -> None:
        """Xavier weights and zero biases; DiT-DH keeps PyTorch's own.

        Source: LightningDiT.initialize_weights.
        """
        for block in self.blocks:
            assert isinstance(block, Block)
            for module in (*block.attn.modules(), *block.mlp.modules()):
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
        for module in self.t_embedder.mlp:
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def compile(self, **options: Any) -> None:
        """Compile block by block, in place of `nn.Module.compile`."""
        compile_blocks([*self.blocks, self.final_layer], **options)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor, r: Tensor | None = None) -> Tensor:
        """Predict the velocity, noise minus data; with an end time r its average between r and t.

        The end time enters a plain DiT as it enters DiT-DH; there are no published weights of such a one.

        Args:
            x_t: noisy latents float [B, D, h, w].
            t: time float [B] in [0, 1]; 0 is data, 1 is noise.
            y: class int64 [B] in [0, num_classes]; num_classes is no class.
            r: end of the jump from t, float [B], of a network with `end_time`; None: r = t.

        Returns:
            Velocity [B, D, h, w].
        """
        c = (embed_times(self.t_embedder, self.r_embedder, t, r) + self.y_embedder(y))[:, None]
        x = self.x_embedder(x_t) + self.pos_embed
        x = run_blocks(self.blocks, x, c, self.feat_rope, recompute=self.recompute_activations)
        velocity = unpatchify(self.final_layer(x, c), self.config.token_grid, self.config.patch_size)
        return velocity[:, : self.config.token_width]
