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
from train.engine.state import make_optimizer, optimizer_tensors, restore_optimizer
from train.engine.stored_tokens import StoredTokens
from train.engine.task import Autocast, Losses, sum_and_count
from train.models.discriminator import DinoFeatures, Discriminator
from train.models.perceptual import Perceptual
from train.models.vit_decoder import ViTDecoder
from train.settings.config import DecoderSettings
from train.tasks.diffaug import NUM_COINS, NUM_DRAWS, augment
from train.tasks.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradient_at,
    last_layer_gradients,
    to_8_bit,
    to_symmetric,
)
from train.tasks.randomness import uniform
from train.tasks.reconstruction_task import ReconstructionTask, target_pixels
from train.weights.snapshot import SnapshotMeta


class Judged(NamedTuple):
    """A micro-batch's reconstructions, and where both losses pull them."""

    pixels: Tensor
    """[b, 3, H, W] with the decoder's graph."""
    reconstruction: Losses
    """The reconstruction loss."""
    pull: Tensor
    """Gradient of the scaled reconstruction loss, [b, 3, H, W]."""
    adversarial: Tensor
    """float32 [b]: the adversarial loss."""
    push: Tensor
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
    looks_twice: ClassVar[bool] = True

    def __init__(
        self,
        model: ViTDecoder,
        settings: DecoderSettings,
        meta: Callable[[int, float], SnapshotMeta],
        sampler: Callable[[Path], None] | None,
        *,
        stored: StoredTokens,
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
            sampler: draws reconstructions of fixed rows by the network, as it is then.
            stored: makes numbers of tokens as they are stored, on the same device.
            perceptual: the perceptual distance, if there is one.
            held_out: measures the network, as it is then, on images it does not learn from.
            features: the frozen network the discriminator looks through.
            discriminator: its trained heads.
            team: the processes.
            steps_per_epoch: steps of an epoch of the schedules.
        """
        super().__init__(
            model, settings, meta, sampler, stored=stored, perceptual=perceptual, held_out=held_out
        )
        self._features, self._discriminator, self._team = features, discriminator, team
        self._adversary, self._steps_per_epoch = settings.adversary, steps_per_epoch
        self._learns_from = round(settings.adversary.learns_from_epoch * steps_per_epoch)
        self._plays_from = round(settings.adversary.plays_from_epoch * steps_per_epoch)
        self._optimizer = make_optimizer(discriminator, settings.adversary.optimizer)
        self._shared_weight: Tensor | None = None

    def before_step(self, batches: Sequence[MicroBatch], scale: float, autocast: Autocast) -> None:
        """Where the step has several micro-batches, find the λ they share."""
        self._shared_weight = None
        if batches[0].step < self._plays_from or len(batches) == 1:
            return
        totals = [torch.zeros_like(self.model.last_weight) for _ in range(2)]
        for batch in batches:
            judged = self._judge(self.model, batch, scale, autocast)
            for total, gradient in zip(totals, self._at_last_layer(judged), strict=True):
                total += gradient
        self._shared_weight = self._balance(totals)

    def backward(self, model: nn.Module, batch: MicroBatch, scale: float, autocast: Autocast) -> Losses:
        """Gradients of the reconstruction, and from its epoch on of the adversarial loss balanced with it."""
        if batch.step < self._plays_from:
            losses = super().backward(model, batch, scale, autocast)
            return Losses(losses.per_sample, self._with_adversary(losses.metrics))
        judged = self._judge(model, batch, scale, autocast)
        strength = self._shared_weight
        if strength is None:
            strength = self._balance(self._at_last_layer(judged))
        weight = self._adversary.weight * strength
        torch.autograd.backward(judged.pixels, judged.pull + weight * judged.push)
        metrics = self._with_adversary(judged.reconstruction.metrics)
        metrics[-4] = sum_and_count(judged.adversarial)
        metrics[-3] = sum_and_count(strength.expand(len(batch)))
        return Losses(judged.reconstruction.per_sample.detach() + weight * judged.adversarial, metrics)

    def after_update(self, batches: Sequence[MicroBatch], scale: float, autocast: Autocast) -> Tensor | None:
        """Train the discriminator on what the updated decoder draws."""
        step = batches[0].step
        if step < self._learns_from:
            return None
        found = torch.zeros(len(self.metric_names), 2, device=self._team.device)
        # One step of the spectral norms' power iteration an update, however many micro-batches there are.
        self._discriminator.train()
        for batch in batches:
            loss, accuracy = self._discriminate(batch, scale, autocast)
            self._discriminator.eval()
            found[-2] += sum_and_count(loss)
            found[-1] += sum_and_count(accuracy)
        self._update_discriminator(step - self._learns_from)
        return self._team.sum(found)

    def further_state(self) -> Parts:
        """The discriminator with its spectral-norm vectors, and its optimizer."""
        return {
            "discriminator": self._discriminator.state_dict(),
            "discriminator_optimizer": optimizer_tensors(self._discriminator, self._optimizer),
        }

    def load_further_state(self, parts: Parts) -> None:
        """Put both back."""
        self._discriminator.load_state_dict(parts["discriminator"])
        restore_optimizer(self._discriminator, self._optimizer, parts["discriminator_optimizer"])

    def _judge(self, model: nn.Module, batch: MicroBatch, scale: float, autocast: Autocast) -> Judged:
        """Draw, then ask the reconstruction loss and the discriminator in turn where they pull the pixels.

        Each loss is gone back through, to the pixels, before the next begins, so that the activations of only one are
        held; λ and the decoder's gradient follow from the pulls. Asking for the gradients at the last layer directly,
        as the reference does, goes back through both twice and holds both.
        """
        with autocast():
            pixels = self.draw(model, batch)
            drawn = pixels.detach().requires_grad_()
            reconstruction = self.compare(drawn, batch)
        pull = gradient_at(drawn, reconstruction.per_sample, scale=scale)
        # The heads stay as they are: their power iteration belongs to their own updates, as do their gradients.
        self._discriminator.eval().requires_grad_(requires_grad=False)
        with autocast():
            adversarial = generator_loss(self._discriminator(self._features(to_symmetric(drawn))))
        push = gradient_at(drawn, adversarial, scale=scale)
        self._discriminator.requires_grad_(requires_grad=True)
        return Judged(pixels, reconstruction, pull, adversarial.detach(), push)

    def _at_last_layer(self, judged: Judged) -> list[Tensor]:
        return last_layer_gradients(judged.pixels, self.model.last_weight, judged.pull, judged.push)

    def _balance(self, gradients: Sequence[Tensor]) -> Tensor:
        """λ of the gradients' mean over processes, and so the same on each."""
        return adaptive_weight(*(self._mean(gradient) for gradient in gradients))

    def _discriminate(self, batch: MicroBatch, scale: float, autocast: Autocast) -> tuple[Tensor, Tensor]:
        """Add the discriminator's gradients of a micro-batch; its losses [b] and shares of right verdicts [b]."""
        with autocast():
            with torch.no_grad():
                drawn = self.model(self.tokens(batch)).float()
            real = self._augmented(to_symmetric(target_pixels(batch)), batch, "real")
            fake = self._augmented(to_8_bit(to_symmetric(drawn)), batch, "fake")
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
        """The mean over processes, in place."""
        return self._team.sum(gradient).div_(self._team.world_size)

    def _with_adversary(self, metrics: Tensor) -> Tensor:
        """The reconstruction's metrics with empty places for the adversary's."""
        return torch.cat([metrics, metrics.new_zeros(4, 2)])
