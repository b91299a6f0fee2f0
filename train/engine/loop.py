"""The training loop of both trainers: take a batch, learn from it, tell, save, until the end or a signal.

The loop knows neither network nor loss; a `Task` brings them. What it promises:

- the global batch of step s is samples [s·B, (s+1)·B) of one endless stream, whatever the number of processes;
- the update is the gradient of the mean over that global batch, also when processes' shares differ;
- nothing on the way waits for the device: what a step measured is read while the next one runs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from shards import UserError, read_document
from train.distributed import Team, full_tensor, gradients_stay_local
from train.engine.checkpoint import (
    STATE,
    newest_of_all,
    open_part,
    prune,
    read_part,
    read_state,
    remedy,
    require_intact_for_all,
    save_checkpoint,
)
from train.engine.ema import WeightAverages
from train.engine.feed import Feed, MicroBatch
from train.engine.lr import learning_rate
from train.engine.optimizer import make_optimizer
from train.engine.signals import StopRequest
from train.engine.state import restore_parts, state_parts
from train.engine.summary import expected_hours
from train.engine.task import Task, sum_and_count
from train.engine.totals import Seen, StepTotals, Window, WindowState, stack_metrics
from train.report.tracking import Journal
from train.settings.config import Settings

_SETTING_OF = {"encoder": "store", "recipe": "store"}
"""Which setting a fact of a checkpoint comes from, where it is not called alike."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint holds of a run besides tensors."""

    facts: dict[str, str]
    """Identities of the store that is trained on, and of what else is learnt from, such as a teacher."""
    bad_steps: int
    """Steps whose loss or gradient was not finite."""
    window: WindowState
    """Metrics since the last line."""


class Trainer:
    """A run: the task, its optimizer and averages, how far it has come, and where it is kept."""

    def __init__(
        self, task: Task, settings: Settings, team: Team, *, steps_per_epoch: int, facts: dict[str, str]
    ) -> None:
        """Prepare a run; `resume` then continues one that was begun.

        Args:
            task: network and loss.
            settings: resolved settings; `out` is the run's directory.
            team: the processes.
            steps_per_epoch: steps of an epoch of the learning-rate schedule.
            facts: identities the checkpoint must share with the store.
        """
        assert settings.out is not None
        self.task, self.settings, self.team, self.out = task, settings, team, settings.out
        self.steps_per_epoch, self.facts = steps_per_epoch, facts
        self.step = 0
        self.bad_steps = 0
        self._saved_step: int | None = None
        self.window = Window(("loss", *task.metric_names))
        self.wrapped = team.wrap(task.model)
        self.averages = WeightAverages(task.model, settings.ema_rates)
        self.optimizer = make_optimizer(task.model, settings.optimizer)
        self._logged_hours = False
        self._trained = [p for p in task.model.parameters() if p.requires_grad]

    @property
    def samples_seen(self) -> int:
        """Samples learnt from so far."""
        return self.step * self.settings.global_batch_size

    def resume(self) -> None:
        """Continue from the newest checkpoint, if there is one.

        Raises:
            UserError: the checkpoint is damaged or belongs to another store, or the processes find different ones.
        """
        newest = newest_of_all(self.out / "checkpoints", self.team)
        if newest is None:
            return
        found = read_state(newest)
        require_intact_for_all(newest, found, self.team)
        state = read_document(json.dumps(found.state), RunState, name=newest / STATE, remedy=remedy(newest))
        self._require_same_facts(newest, state.facts)
        restore_parts(partial(open_part, newest), self.task.model, self.averages, self.optimizer)
        self.task.load_extra_state({name: read_part(newest, name) for name in self.task.extra_state()})
        self.step = self._saved_step = found.step
        self.bad_steps = state.bad_steps
        self.window.load(state.window)

    def _require_same_facts(self, checkpoint: Path, before: dict[str, str]) -> None:
        changed = {
            _SETTING_OF.get(name, name)
            for name in before.keys() | self.facts.keys()
            if before.get(name) != self.facts.get(name)
        }
        for setting in sorted(changed - set(self.settings.allow_change)):
            raise UserError(
                f"{checkpoint} was trained on another {setting} ({before}, now {self.facts}); "
                f"give the {setting} it was begun with, or insist with --allow-change {setting}"
            )

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
                journal.publish()
        self.record(pending, journal)
        self.snapshot("latest")
        self.checkpoint()
        if self.step == settings.max_steps and not self.due(settings.log_every):
            self.report(feed, journal)
        journal.publish()

    def train_step(self, feed: Iterator[MicroBatch], stop: StopRequest) -> StepTotals:
        """One optimizer step: the gradient of the global batch, clip, update, average."""
        task = self.task
        # The gradient of the mean over the global batch, whatever this process's share: processes are averaged.
        scale = self.team.world_size / self.settings.global_batch_size
        batches: Iterable[MicroBatch] = one_step(feed)
        held: list[MicroBatch] = []
        if task.needs_whole_step:
            batches = held = [batch.copied() for batch in batches]
            task.before_step(held, scale, self.autocast)
        names = self.window.names
        totals = torch.zeros(len(names), 2, device=self.team.device)
        seen: list[Seen] = []
        for batch in batches:
            with gradients_stay_local(self.wrapped, local=not batch.last_of_step):
                losses = task.backward(self.wrapped, batch, scale, self.autocast)
            own = losses.per_sample.detach()
            logged = own if losses.logged is None else losses.logged
            totals += stack_metrics(names, {"loss": sum_and_count(logged), **losses.metrics}, totals)
            seen.append(Seen(rows=batch.rows, positions=batch.positions, losses=own))
        # Filled on the device: a tensor made of a Python number is copied there, and the host waits for the copy.
        told = totals.new_full((1,), float(stop.signal is not None))
        summed = self.team.sum(torch.cat([told, totals.flatten()]))
        totals = summed[1:].view_as(totals)
        norm, bad = self.update(totals[0, 0])
        if task.needs_whole_step and (further := task.after_update(held, scale, self.autocast)):
            totals += self.team.sum(stack_metrics(names, further, totals))
        return StepTotals(
            self.step, stop=summed[0], bad=bad, norm=norm, names=names, totals=totals, seen=seen
        )

    def autocast(self) -> AbstractContextManager[object]:
        """The arithmetic the network is computed in."""
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
        settings = self.settings.optimizer
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.steps_per_epoch, settings)
        clip = math.inf if settings.clip_norm is None else settings.clip_norm
        norm = full_tensor(nn.utils.clip_grad_norm_(self._trained, clip))
        bad = (~(torch.isfinite(norm) & torch.isfinite(loss))).float()
        # Understood by the fused kernel, which torch.amp.GradScaler tells the same way.
        self.optimizer.found_inf = bad  # type: ignore[attr-defined]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.averages.update()
        return norm, bad

    def due(self, every: int | None) -> bool:
        """Whether something done `every` steps is to be done now."""
        return every is not None and self.step % every == 0

    def record(self, measured: StepTotals | None, journal: Journal) -> bool:
        """Take in what a step measured; returns whether all processes agreed to stop.

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

    def checkpoint(self) -> None:
        """Write the state to resume, then remove old ones; nothing if this step's is there already."""
        if self._saved_step == self.step:
            return
        parts = state_parts(self.task.model, self.averages, self.optimizer) | self.task.extra_state()
        state = RunState(facts=self.facts, bad_steps=self.bad_steps, window=self.window.state())
        folder = self.out / "checkpoints"
        save_checkpoint(folder, self.step, parts, asdict(state), write=self.team.is_main_process)
        if self.team.is_main_process:
            prune(folder, self.settings.keep_checkpoints)
        self._saved_step = self.step
        self.team.wait()

    def snapshot(self, name: str) -> None:
        """Write weights to use: the average of each rate, the first under the plain name."""
        for rate in self.averages.rates:
            weights = self.task.model.state_dict() | self.averages.weights(rate)
            suffix = "" if rate == self.averages.rates[0] else f"-ema{rate:g}"
            path = self.out / "snapshots" / f"{name}{suffix}.safetensors"
            self.task.save_snapshot(
                path, weights, step=self.step, ema_rate=rate, write=self.team.is_main_process
            )

    def render_samples(self, journal: Journal) -> None:
        """Draw a picture with the averaged weights; sharded weights need every process for it."""
        path = self.out / "samples" / f"step-{self.step:08d}.png"
        if self.team.is_main_process or self.team.sharded:
            with self.averages.applied(self.averages.rates[0]):
                self.task.render_samples(path)
        journal.show(self.step, path)

    def evaluate(self, journal: Journal) -> None:
        """Measure the averaged weights on images that are not trained on."""
        with self.averages.applied(self.averages.rates[0]):
            scores = self.task.evaluate()
        journal.record_scores(self.step, scores)


def one_step(feed: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """The micro-batches of one optimizer step."""
    for batch in feed:
        yield batch
        if batch.last_of_step:
            return
