"""A decoder trained against a discriminator as well; the `Task` of `train/decoder.py` with --adversarial.

A step is: the decoder's gradient of reconstruction + weight · λ · adversarial, its update; then the discriminator's
gradient on fresh reconstructions, without noise on the tokens and rounded to 8 bits, and its update.

λ comes from gradients at the last layer that are averaged over all processes and micro-batches, and the
discriminator's gradients are averaged over processes too: the run is the same however the batch is divided.

Source: github:bytetriper/RAE src/train_stage1.py at a4d18c4, which leaves both to each process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from train.distributed import Team
from train.engine.checkpoint import Parts
from train.engine.feed import MicroBatch
from train.engine.lr import learning_rate
from train.engine.optimizer import make_optimizer, optimizer_tensors, restore_optimizer
from train.engine.task import Autocast, Losses, sum_and_count
from train.models.discriminator import DinoFeatures, Discriminator
from train.models.perceptual import Perceptual
from train.models.vit_decoder import ViTDecoder
from train.randomness import uniform
from train.settings.config import DecoderSettings
from train.tasks.augmentation import NUM_COINS, NUM_DRAWS, augment
from train.tasks.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradient_at,
    last_layer_gradients,
    to_8_bit,
    to_symmetric,
)
from train.tasks.reconstruction import ReconstructionTask, target_pixels
from train.weights.snapshot import SnapshotMeta


class PixelGradients(NamedTuple):
    """A micro-batch's reconstructions, both losses, and the losses' gradients at the pixels."""

    pixels: Tensor
    """[b, 3, H, W] with the decoder's graph."""
    reconstruction: Losses
    """The reconstruction loss."""
    reconstruction_gradient: Tensor
    """Gradient of the scaled reconstruction loss, [b, 3, H, W]."""
    adversarial: Tensor
    """float32 [b]: the adversarial loss."""
    adversarial_gradient: Tensor
    """Gradient of the scaled adversarial loss, [b, 3, H, W]."""


class AdversarialTask(ReconstructionTask):
    """A decoder, its reconstruction loss, and a discriminator it learns to deceive."""

    metric_names: ClassVar[tuple[str, ...]] = (
        *ReconstructionTask.metric_names,
        "adversarial",
        "adaptive_weight",
        "discriminator_loss",
        "discriminator_accuracy",
    )
    needs_whole_step: ClassVar[bool] = True

    def __init__(
        self,
        model: ViTDecoder,
        settings: DecoderSettings,
        meta: Callable[[int, float], SnapshotMeta],
        render: Callable[[Path], None] | None,
        *,
        dequantizer: Callable[[Tensor], Tensor],
        perceptual: Perceptual | None,
        held_out: Callable[[], dict[str, float]] | None = None,
        features: DinoFeatures,
        discriminator: Discriminator,
        team: Team,
        steps_per_epoch: int,
    ) -> None:
        """Assemble the task.

        Args:
            model: the decoder, on its device.
            settings: resolved settings.
            meta: origin of a snapshot taken at (step, rate).
            render: writes a sheet of reconstructions of fixed rows by the network, as it is then.
            dequantizer: makes float32 of tokens as they are stored, on the same device.
            perceptual: the perceptual distance, if there is one.
            held_out: measures the network, as it is then, on images it does not learn from.
            features: the frozen network the discriminator looks through.
            discriminator: its trained heads.
            team: the processes.
            steps_per_epoch: steps of an epoch of the schedules.
        """
        super().__init__(
            model, settings, meta, render, dequantizer=dequantizer, perceptual=perceptual, held_out=held_out
        )
        self._features, self._discriminator, self._team = features, discriminator, team
        self._adversary, self._steps_per_epoch = settings.adversary, steps_per_epoch
        self._discriminator_start = round(settings.adversary.discriminator_start_epoch * steps_per_epoch)
        self._adversarial_start = round(settings.adversary.adversarial_start_epoch * steps_per_epoch)
        self._optimizer = make_optimizer(discriminator, settings.adversary.optimizer)
        self._shared_weight: Tensor | None = None

    def before_step(self, batches: Sequence[MicroBatch], scale: float, autocast: Autocast) -> None:
        """Find the λ that a step's micro-batches share, if it has several."""
        self._shared_weight = None
        if batches[0].step < self._adversarial_start or len(batches) == 1:
            return
        totals = [torch.zeros_like(self.model.last_weight) for _ in range(2)]
        for batch in batches:
            found = self._pixel_gradients(self.model, batch, scale, autocast)
            for total, gradient in zip(totals, self._at_last_layer(found), strict=True):
                total += gradient
        self._shared_weight = self._adaptive_weight(totals)

    def backward(self, model: nn.Module, batch: MicroBatch, scale: float, autocast: Autocast) -> Losses:
        """Compute gradients of the reconstruction loss and, from its epoch on, the balanced adversarial loss."""
        if batch.step < self._adversarial_start:
            return super().backward(model, batch, scale, autocast)
        found = self._pixel_gradients(model, batch, scale, autocast)
        adaptive = self._shared_weight
        if adaptive is None:
            adaptive = self._adaptive_weight(self._at_last_layer(found))
        weight = self._adversary.weight * adaptive
        torch.autograd.backward(
            found.pixels, found.reconstruction_gradient + weight * found.adversarial_gradient
        )
        metrics = {
            **found.reconstruction.metrics,
            "adversarial": sum_and_count(found.adversarial),
            "adaptive_weight": sum_and_count(adaptive.expand(len(batch))),
        }
        return Losses(found.reconstruction.per_sample.detach() + weight * found.adversarial, metrics)

    def after_update(
        self, batches: Sequence[MicroBatch], scale: float, autocast: Autocast
    ) -> dict[str, Tensor]:
        """Train the discriminator on reconstructions by the updated decoder."""
        step = batches[0].step
        if step < self._discriminator_start:
            return {}
        totals = torch.zeros(2, 2, device=self._team.device)
        # One step of the spectral norms' power iteration an update, however many micro-batches there are.
        self._discriminator.train()
        for batch in batches:
            loss, accuracy = self._discriminate(batch, scale, autocast)
            self._discriminator.eval()
            totals += torch.stack([sum_and_count(loss), sum_and_count(accuracy)])
        self._update_discriminator(step - self._discriminator_start)
        return dict(zip(("discriminator_loss", "discriminator_accuracy"), totals, strict=True))

    def extra_state(self) -> Parts:
        """Return the discriminator with its spectral-norm vectors, and its optimizer."""
        return {
            "discriminator": self._discriminator.state_dict(),
            "discriminator_optimizer": optimizer_tensors(self._discriminator, self._optimizer),
        }

    def load_extra_state(self, parts: Parts) -> None:
        """Put both back."""
        self._discriminator.load_state_dict(parts["discriminator"])
        restore_optimizer(self._discriminator, self._optimizer, parts["discriminator_optimizer"])

    def _pixel_gradients(
        self, model: nn.Module, batch: MicroBatch, scale: float, autocast: Autocast
    ) -> PixelGradients:
        """Decode, then compute each loss and its gradient at the pixels.

        The backward pass of one loss, down to the pixels, ends before the other loss is computed, so that only one's
        activations are in memory; λ and the decoder's gradient follow from the gradients at the pixels. The reference
        differentiates both losses at the last layer, which runs each backward pass twice and holds both.
        """
        with autocast():
            pixels = self.decode(model, batch)
            decoded = pixels.detach().requires_grad_()
            reconstruction = self.compare(decoded, batch)
        reconstruction_gradient = gradient_at(decoded, reconstruction.per_sample, scale=scale)
        # The heads stay as they are: their power iteration belongs to their own updates, as do their gradients.
        self._discriminator.eval().requires_grad_(requires_grad=False)
        with autocast():
            adversarial = generator_loss(self._discriminator(self._features(to_symmetric(decoded))))
        adversarial_gradient = gradient_at(decoded, adversarial, scale=scale)
        self._discriminator.requires_grad_(requires_grad=True)
        return PixelGradients(
            pixels, reconstruction, reconstruction_gradient, adversarial.detach(), adversarial_gradient
        )

    def _at_last_layer(self, found: PixelGradients) -> list[Tensor]:
        return last_layer_gradients(
            found.pixels, self.model.last_weight, found.reconstruction_gradient, found.adversarial_gradient
        )

    def _adaptive_weight(self, gradients: Sequence[Tensor]) -> Tensor:
        """Return the λ of the gradients' mean over processes, and so the same on each."""
        return adaptive_weight(*(self._mean(gradient) for gradient in gradients))

    def _discriminate(self, batch: MicroBatch, scale: float, autocast: Autocast) -> tuple[Tensor, Tensor]:
        """Add the discriminator's gradients of a micro-batch; its losses [b] and shares of right verdicts [b]."""
        with autocast():
            with torch.no_grad():
                decoded = self.model(self.tokens(batch)).float()
            real = self._augmented(to_symmetric(target_pixels(batch)), batch, "real")
            fake = self._augmented(to_8_bit(to_symmetric(decoded)), batch, "fake")
            with torch.no_grad():
                maps = self._features(torch.cat([real, fake]))
            real_logits, fake_logits = self._discriminator(maps).chunk(2)
        loss = discriminator_loss(real_logits, fake_logits, self._adversary.loss)
        (loss.sum() * scale).backward()  # type: ignore[no-untyped-call]  # torch's own
        right = torch.cat([real_logits > 0, fake_logits < 0], dim=1).float().mean(dim=1)
        return loss.detach(), right

    def _augmented(self, images: Tensor, batch: MicroBatch, which: str) -> Tensor:
        seed = self._settings.seed
        # On the host, where the coins decide which kernels run.
        coins = uniform(seed, f"{which} augmentation coins", torch.tensor([batch.step]), (NUM_COINS,))[0]
        draws = uniform(seed, f"{which} augmentation", batch.positions, (NUM_DRAWS,)).T
        return augment(images, coins, draws, probability=self._adversary.augmentation)

    def _update_discriminator(self, update: int) -> None:
        gradients = [p.grad for p in self._discriminator.parameters() if p.grad is not None]
        flat = self._mean(torch.nn.utils.parameters_to_vector(gradients))
        torch.nn.utils.vector_to_parameters(flat, gradients)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(update, self._steps_per_epoch, self._adversary.optimizer)
        self._optimizer.found_inf = (~torch.isfinite(flat.sum())).float()  # type: ignore[attr-defined]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def _mean(self, gradient: Tensor) -> Tensor:
        """Return the mean over processes, in place."""
        return self._team.sum(gradient).div_(self._team.world_size)
