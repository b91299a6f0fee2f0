"""How well a compressor in training gives back tokens that it does not learn from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shards import Store, collapsed_share
from train.distributed import Team
from train.models.dequantize import Dequantizer, stored_tensor
from train.models.flat import FlatVAE
from train.tasks.flat_loss import huber_distance

BATCH_SIZE = 64
"""Images a process computes at a time."""


@dataclass(frozen=True, kw_only=True)
class HeldOutTokens:
    """Fixed rows of a store, the work shared by all processes."""

    store: Store
    model: FlatVAE
    """The network, as it is when it is asked."""
    rows: NDArray[np.int64]
    """[n] rows, at least 2."""
    team: Team
    """The processes; each must ask for the scores."""

    @torch.no_grad()
    def scores(self) -> dict[str, float]:
        """Measure mean latents, without noise: `held_out_huber`, `held_out_mse` of the tokens, and `collapsed_latents`.

        The last is the share of a latent's numbers that hardly vary over the images, as published: below 1e-3 of the
        median variance.
        """
        view = "center" if "center" in self.store.views else self.store.views[0]
        reader = self.store.reader(view, "tokens")
        dequantizer = Dequantizer.of(self.store).to(self.team.device)
        config = self.model.config
        numbers = config.num_latents * config.latent_width
        # Sums of huber, squared error, and of each number of the latents and its square.
        sums = torch.zeros(2 + 2 * numbers, dtype=torch.float64, device=self.team.device)
        own = self.rows[self.team.rank :: self.team.world_size]
        for first in range(0, len(own), BATCH_SIZE):
            rows = own[first : first + BATCH_SIZE]
            stored = np.empty((len(rows), *reader.row_shape), reader.dtype)
            reader.read(rows, stored)
            tokens = dequantizer(stored_tensor(stored, reader.logical_dtype).to(self.team.device))
            sums += self._sums(tokens)
        huber, mse, *moments = (self.team.sum(sums) / len(self.rows)).tolist()
        mean, square = np.array(moments[:numbers]), np.array(moments[numbers:])
        return {
            "held_out_huber": huber,
            "held_out_mse": mse,
            "collapsed_latents": collapsed_share(square - mean**2),
        }

    def _sums(self, tokens: Tensor) -> Tensor:
        latents = self.model.encode(tokens)
        made = self.model.decode(latents)
        errors = [huber_distance(made, tokens), (made - tokens).square().flatten(1).mean(dim=1)]
        wide = latents.double().flatten(1)
        totals = torch.stack([values.sum() for values in errors]).double()
        return torch.cat([totals, wide.sum(dim=0), wide.square().sum(dim=0)])
