"""The training loop: the life of a step, from top to bottom.

1. `Trainer.train` takes steps until `--max-steps` or a signal, and does what is due between them: a line of metrics, a
   snapshot, a sheet of images, a measurement, a checkpoint.
2. `train_step`: the micro-batches of a step; their gradients (`forward_backward`); metrics summed over all processes;
   the update; what the task trains besides.
3. `update`: learning rate, clipping, the optimizer, the averages; a step that is not finite changes nothing.
4. `record`: the numbers of a step, read on the host while the next step runs.

Network and loss are the `Task`'s; state and files are the `Run`'s. The loop promises:

- the global batch of step s is samples [s·B, (s+1)·B) of one endless stream, whatever the number of processes;
- the update is the gradient of the mean over that global batch, also when processes' shares differ;
- the host never waits for the device within a step.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from shards import UserError
from train.distributed import gradients_stay_local
from train.engine.feed import Feed, MicroBatch
from train.engine.lr import learning_rate
from train.engine.run import Run
from train.engine.signals import StopRequest
from train.engine.summary import expected_hours
from train.engine.task import sum_and_count
from train.engine.totals import MicroBatchLosses, StepTotals, stack_metrics
from train.report.tracking import Journal


class Trainer(Run):
    """Takes a run's steps."""

    _logged_hours = False

    def train(self, feed: Feed, journal: Journal, stop: StopRequest) -> None:
        """Train until `max_steps` or until any process is told to stop; end with a checkpoint and a snapshot.

        Raises:
            UserError: too many steps had a loss or gradient that is not finite.
        """
        settings = self.settings
        self.window.start(feed.data_wait)
        batches = iter(feed)
        pending: StepTotals | None = None
        stopping = False
        while self.step < settings.max_steps and not stopping:
            measured = self.train_step(batches, stop)
            self.step += 1
            journal.advance()
            # Read what the step before measured: this one keeps the device busy meanwhile.
            stopping = self.record(pending, journal)
            pending = measured
            if self.due(settings.log_every) or self.due(settings.checkpoint_every):
                stopping |= self.record(pending, journal)
                pending = None
            if self.due(settings.log_every):
                self.report(feed, journal)
                self.window.clear()
            if self.due(settings.snapshot_every):
                self.snapshot("latest")
            if self.due(settings.milestone_every):
                self.snapshot(f"step-{self.step:08d}")
            if self.due(settings.sample_every):
                self.render_samples(journal)
            if self.due(self.task.evaluate_every):
                self.evaluate(journal)
            if self.due(settings.checkpoint_every):
                self.checkpoint()
                journal.write_page()
        self.record(pending, journal)
        self.snapshot("latest")
        self.checkpoint()
        if self.step == settings.max_steps and not self.due(settings.log_every):
            self.report(feed, journal)
        journal.write_page()

    def train_step(self, feed: Iterator[MicroBatch], stop: StopRequest) -> StepTotals:
        """Take one optimizer step: the gradient of the global batch, clip, update, average."""
        task, names = self.task, self.window.names
        # The gradient of the mean over the global batch, whatever this process's share: processes are averaged.
        scale = self.team.world_size / self.settings.global_batch_size
        batches: Iterable[MicroBatch] = micro_batches_of_step(feed)
        kept: list[MicroBatch] = []
        if task.needs_whole_step:
            batches = kept = [batch.copied() for batch in batches]
            task.before_step(kept, scale, self.autocast)
        totals, losses = self.forward_backward(batches, scale)
        # Filled on the device: a tensor made of a Python number is copied there, and the host waits for the copy.
        told = totals.new_full((1,), float(stop.signal is not None))
        summed = self.team.sum(torch.cat([told, totals.flatten()]))
        totals = summed[1:].view_as(totals)
        norm, bad = self.update(totals[0, 0])
        if task.needs_whole_step and (further := task.after_update(kept, scale, self.autocast)):
            totals += self.team.sum(stack_metrics(names, further, totals))
        return StepTotals(
            self.step, stop=summed[0], bad=bad, norm=norm, names=names, totals=totals, losses=losses
        )

    def forward_backward(
        self, batches: Iterable[MicroBatch], scale: float
    ) -> tuple[Tensor, list[MicroBatchLosses]]:
        """Add up the gradients of a step's micro-batches.

        Args:
            batches: this process's micro-batches.
            scale: what the sum of a process's losses is multiplied with.

        Returns:
            Sums and weights of the metrics, float32 [K, 2] in the order of the window's names, and the losses of each
            micro-batch's samples.
        """
        names = self.window.names
        totals = torch.zeros(len(names), 2, device=self.team.device)
        found: list[MicroBatchLosses] = []
        for batch in batches:
            with gradients_stay_local(self.wrapped, local=not batch.last_of_step):
                losses = self.task.backward(self.wrapped, batch, scale, self.autocast)
            own = losses.per_sample.detach()
            logged = own if losses.logged is None else losses.logged
            totals += stack_metrics(names, {"loss": sum_and_count(logged), **losses.metrics}, totals)
            found.append(MicroBatchLosses(rows=batch.rows, positions=batch.positions, losses=own))
        return totals, found

    def autocast(self) -> AbstractContextManager[object]:
        """Return the arithmetic the network is computed in."""
        return torch.autocast(
            self.team.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"
        )

    def update(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """Step the optimizer and the averages; on the device, a step that is not finite is skipped.

        Args:
            loss: float32 []: the global batch's summed loss.

        Returns:
            The gradient's norm before clipping, and 1 if the step was skipped, else 0.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps_per_epoch, self.settings.optimizer)
        norm, bad = self.apply_gradients(loss)
        self.optimizer.zero_grad(set_to_none=True)
        return norm, bad

    def due(self, every: int | None) -> bool:
        """Return whether something done `every` steps is to be done now."""
        return every is not None and self.step % every == 0

    def record(self, measured: StepTotals | None, journal: Journal) -> bool:
        """Add what a step measured to the window; returns whether any process was told to stop.

        Raises:
            UserError: too many steps had a loss or gradient that is not finite.
        """
        if measured is None:
            return False
        result = measured.read()
        self.window.tick()
        if not result.skipped:
            self.window.add(result.gradient_norm, result.metrics)
            return result.stop
        self.bad_steps += 1
        rows, positions = measured.suspects()
        for text in self.team.gather(f"rows {rows[:8]}: {self.task.describe(positions[:8])}"):
            journal.log(f"step {measured.step}: loss or gradient not finite, update skipped; {text}")
        if self.bad_steps > self.settings.max_bad_steps:
            raise UserError(
                f"{self.bad_steps} steps had a loss or gradient that is not finite, more than --max-bad-steps "
                f"{self.settings.max_bad_steps}; continue with a smaller --optimizer.lr, --precision fp32 or "
                "--model.qk-norm (with --allow-change), or raise the limit"
            )
        return result.stop

    def report(self, feed: Feed, journal: Journal) -> None:
        """Write a line of metrics, the mean over the window."""
        self.team.require_lock()
        metrics = {
            **self.window.means(),
            "samples_seen": self.samples_seen,
            "learning_rate": self.optimizer.param_groups[0]["lr"],
            "bad_steps": self.bad_steps,
            **self.window.rates(feed.data_wait, self.settings.global_batch_size),
        }
        self.window.start(feed.data_wait)
        journal.record(self.step, metrics)
        if not self._logged_hours:
            self._logged_hours = True
            journal.log(expected_hours(self.settings.max_steps - self.step, metrics["step_seconds"]))


def micro_batches_of_step(feed: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """Yield the micro-batches of the next optimizer step."""
    for batch in feed:
        yield batch
        if batch.last_of_step:
            return
