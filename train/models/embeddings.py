"""What tells a transformer where it is: position tables, rotary encoding, time, label, patches.

On a grid the two position encodings disagree on purpose, as the published weights do: in the sine and cosine table
the first half of the channels encodes the column, in rotary encoding the first half encodes the row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from shards import Positions, UsageError

THETA = 10000.0
"""Base of the geometric series of wavelengths. Source: arXiv 1706.03762 section 3.5; arXiv 2104.09864."""


def sincos_table(width: int, grid: tuple[int, int], spacing: float = 1.0) -> Tensor:
    """Return the fixed sine and cosine code of each position of a grid.

    Channels are [sin x | cos x | sin y | cos y] with x the column and y the row, a quarter of the width
    each; frequency i of a quarter is `THETA ** (-i / (width / 4))`. Computed in float64, as the published
    tables are.

    Source: github:bytetriper/RAE src/stage2/models/model_utils.py get_2d_sincos_pos_embed at a4d18c4.

    Args:
        width: channels, a multiple of 4.
        grid: rows and columns (h, w).
        spacing: distance between neighbours; 1 in everything published by RAE.

    Returns:
        float32 [1, h·w, width], places row by row.
    """
    quarter = width // 4
    frequencies = THETA ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = (torch.arange(n, dtype=torch.float64) * spacing for n in grid)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    angles = [place.reshape(-1, 1) * frequencies for place in (x, y)]
    table = torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)
    return table.float()[None]


def sequence_table(width: int, length: int) -> Tensor:
    """Return the fixed sine and cosine code of each position of a sequence.

    Channels are [sin p | cos p] with p the place, half of the width each; frequency i of a half is
    `THETA ** (-i / (width / 2))`. Computed in float64. `sincos_table` on a grid of one row is something else.

    Source: arXiv 1706.03762 section 3.5; github:noctrog/flatdino models/dit.py at cdd398f.

    Args:
        width: channels, a multiple of 2.
        length: places K.

    Returns:
        float32 [1, K, width].
    """
    half = width // 2
    frequencies = THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()[None]


def position_table(width: int, grid: tuple[int, int], positions: Positions) -> Tensor:
    """Return the fixed code of each position of a latent, float32 [1, h·w, width]."""
    return sequence_table(width, grid[1]) if positions == "sequence" else sincos_table(width, grid)


class RotaryEncoding(nn.Module):
    """Rotary position encoding of queries and keys.

    On a grid the first half of a head's channels turns with the row, the second with the column; in a sequence all turn
    with the place. Channels (2k, 2k+1) are turned as one pair. Positions are whole numbers on every grid: nothing is
    rescaled at 512 pixels.

    Source: arXiv 2104.09864; github:bytetriper/RAE src/stage2/models/model_utils.py
    VisionRotaryEmbeddingFast at a4d18c4, whose tables are stored in the published weights; for sequences
    github:noctrog/flatdino models/dit.py at cdd398f.
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(
        self, head_width: int, grid: tuple[int, int], positions: Positions = "grid", num_others: int = 0
    ) -> None:
        """Build the tables.

        Args:
            head_width: channels of an attention head, a multiple of 4; in a sequence of 2.
            grid: rows and columns.
            positions: how positions are encoded.
            num_others: tokens behind the grid's that have no position and are not turned.
        """
        super().__init__()
        axis_width = head_width if positions == "sequence" else head_width // 2
        exponents = torch.arange(0, axis_width, 2, dtype=torch.float32) / axis_width
        frequencies = 1.0 / THETA**exponents
        rows, columns = (torch.outer(torch.arange(n, dtype=torch.float32), frequencies) for n in grid)
        places = (*grid, frequencies.numel())
        along_rows, along_columns = rows[:, None].expand(places), columns[None].expand(places)
        turned = [along_columns] if positions == "sequence" else [along_rows, along_columns]
        angles = torch.cat(turned, dim=-1).flatten(0, 1).repeat_interleave(2, dim=-1)
        angles = torch.cat([angles, angles.new_zeros(num_others, head_width)])
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())

    def forward(self, x: Tensor) -> Tensor:
        """Turn each pair of channels: (a, b) → (a·cos − b·sin, a·sin + b·cos).

        Args:
            x: [B, N, ..., head_width] queries and keys; N runs over the grid row by row, then over the others.

        Returns:
            The turned vectors in float32 or wider.
        """
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(*x.shape[:-1], -1, 2)
        places = (-1, *[1] * (x.ndim - 3), x.shape[-1] // 2)
        tables = (table[: x.shape[1], ::2] for table in (self.freqs_cos, self.freqs_sin))
        cos, sin = (table.to(wide.dtype).view(places) for table in tables)
        if torch.compiler.is_compiling():
            # The compiler makes one pass of this, forward and backward. Of a stack of both numbers of a pair it would
            # write a float32 array in between.
            sign = 2 * torch.arange(2, device=x.device) - 1
            turned: Tensor = wide * cos[..., None] + wide.flip(-1) * (sin[..., None] * sign)
            return turned.flatten(-2)
        # A pair as one complex number: one pass over memory instead of seven.
        return torch.view_as_real(torch.view_as_complex(wide) * torch.complex(cos, sin)).flatten(-2)


class TimeEmbedding(nn.Module):
    """Random Fourier features of the time, then a two-layer MLP.

    t goes in as it is, in [0, 1]. The frequencies are drawn once and stored with the weights; the published
    training nonetheless trains them, which is the trainer's choice (`requires_grad`).

    Source: github:bytetriper/RAE src/stage2/models/model_utils.py GaussianFourierEmbedding at a4d18c4.
    """

    NUM_FREQUENCIES = 256

    def __init__(self, width: int) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(self.NUM_FREQUENCIES), requires_grad=False)
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.NUM_FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width)
        )
        for linear in (self.mlp[0], self.mlp[2]):
            assert isinstance(linear, nn.Linear)
            nn.init.normal_(linear.weight, std=0.02)

    def forward(self, t: Tensor) -> Tensor:
        """Embed times.

        Args:
            t: float [B] in [0, 1].

        Returns:
            [B, width].
        """
        # Angles reach tens of turns: bfloat16 would lose the phase, so they never leave float32.
        wide = torch.promote_types(self.W.dtype, torch.float32)
        angles = 2 * math.pi * t.to(wide)[:, None] * self.W.to(wide)
        features = torch.cat([angles.sin(), angles.cos()], dim=-1)
        embedded: Tensor = self.mlp(features.to(self.W.dtype))
        return embedded


def end_time_embedding(width: int) -> TimeEmbedding:
    """Return the embedding of a jump's length t − r, whose last layer is zero.

    So a network that is given one computes what it computed before, whatever r, until it is trained.
    """
    embedding = TimeEmbedding(width)
    last = embedding.mlp[2]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return embedding


def initialise_as_published(embedding: TimeEmbedding) -> None:
    """Give an end-time embedding the values MF-RAE starts from: PyTorch's defaults, so nothing is zero.

    Source: DiTwDDTHead_MF.initialize_weights in github:sony/mf-rae src/stage2/models/DDT.py at fffc544, which leaves
    r_embedder out.
    """
    nn.init.normal_(embedding.W)
    for module in embedding.mlp:
        if isinstance(module, nn.Linear):
            module.reset_parameters()


def embed_times(start: TimeEmbedding, length: TimeEmbedding | None, t: Tensor, r: Tensor | None) -> Tensor:
    """Embed the time t and, in a network with an end time, the length t − r of the jump from t to r.

    Times are not clamped: difference quotients ask for t a little above 1, and for r a little above t.

    Source: DiTwDDTHead_MF.forward in github:sony/mf-rae src/stage2/models/DDT.py at fffc544; there an absent r means 0.

    Args:
        start: embeds t.
        length: embeds t − r; None in a network without end time.
        t: float [B].
        r: float [B]; None means r = t, the instantaneous velocity.

    Returns:
        [B, width].

    Raises:
        UsageError: r is given to a network without end time.
    """
    if length is None:
        if r is not None:
            raise UsageError("an end time r needs a network with end_time; this one knows t alone")
        return start(t)  # type: ignore[no-any-return]
    return start(t) + length(torch.zeros_like(t) if r is None else t - r)  # type: ignore[no-any-return]


class LabelEmbedding(nn.Module):
    """A learned vector a class, and one more, the last, for no class."""

    def __init__(self, num_classes: int, width: int, *, null_label: bool) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + int(null_label), width)
        nn.init.normal_(self.embedding_table.weight, std=0.02)

    def forward(self, y: Tensor) -> Tensor:
        """Embed labels int [B] in [0, num_classes] as [B, width]."""
        embedded: Tensor = self.embedding_table(y)
        return embedded


class PatchEmbedding(nn.Module):
    """Cut a latent into square patches and project each linearly to one token.

    Attributes:
        keeps_type: give tokens in the type the projection is computed in, bfloat16 under autocast, rather than in the
            weights' type; the residual stream that they start has that type.
    """

    def __init__(self, channels: int, width: int, patch_size: int) -> None:
        super().__init__()
        self.keeps_type = False
        self.proj = nn.Conv2d(channels, width, kernel_size=patch_size, stride=patch_size)
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))
        assert self.proj.bias is not None
        nn.init.zeros_(self.proj.bias)

    def forward(self, latents: Tensor) -> Tensor:
        """Embed latents [B, D, h, w] as tokens [B, N, width], patches row by row."""
        tokens: Tensor = self.proj(latents)
        tokens = tokens.flatten(2).transpose(1, 2)
        # They start the residual stream, which otherwise stays in float32 under autocast.
        return tokens if self.keeps_type else tokens.to(self.proj.weight.dtype)


def unpatchify(tokens: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Put patches back beside each other.

    Source: github:bytetriper/RAE src/stage2/models/lightningDiT.py unpatchify at a4d18c4 and
    src/stage1/decoders/decoder.py unpatchify, which share the order.

    Args:
        tokens: [B, N, p·p·C], each patch laid out (row in patch, column in patch, channel).
        grid: rows and columns of patches.
        patch_size: side p of a patch.

    Returns:
        [B, C, rows·p, columns·p].
    """
    rows, columns = grid
    patches = tokens.reshape(len(tokens), rows, columns, patch_size, patch_size, -1)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
