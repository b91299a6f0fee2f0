"""A run: what is trained, how far it has come, and the files that keep it."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

from shards import UserError, read_document
from train.distributed import Team
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
from train.engine.optimizer import make_optimizer
from train.engine.state import restore_parts, state_parts
from train.engine.task import Task
from train.engine.totals import Window, WindowState
from train.engine.update import OnePass, SeparatePasses
from train.report.tracking import Journal
from train.settings.config import Settings

_SETTING_OF = {"encoder": "store", "recipe": "store"}
"""Which setting a fact of a checkpoint comes from, where it is not called alike."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint holds of a run besides tensors."""

    facts: dict[str, str]
    """Identities of the store that is trained on, and of what else is trained with, such as a teacher."""
    bad_steps: int
    """Steps whose loss or gradient was not finite."""
    window: WindowState
    """Metrics since the last line."""


class Run:
    """The task, its optimizer and averages, the steps taken, and the directory they are kept in."""

    def __init__(
        self, task: Task, settings: Settings, team: Team, *, steps_per_epoch: int, facts: dict[str, str]
    ) -> None:
        """Begin a run; `resume` then continues it if it was begun before.

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
        way = OnePass if settings.one_pass else SeparatePasses
        self.apply_gradients = way(task.model, self.optimizer, self.averages, settings.optimizer.clip_norm)

    @property
    def samples_seen(self) -> int:
        """Samples trained on so far."""
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

    def checkpoint(self) -> None:
        """Write the state to resume, then remove old ones; nothing if this step's is there already."""
        if self._saved_step == self.step:
            return
        self.team.require_lock()
        parts = state_parts(self.task.model, self.averages, self.optimizer) | self.task.extra_state()
        state = RunState(facts=self.facts, bad_steps=self.bad_steps, window=self.window.state())
        folder = self.out / "checkpoints"
        save_checkpoint(
            folder,
            self.step,
            parts,
            asdict(state),
            write=self.team.is_main_process,
            confirm=self.team.require_lock,  # writing takes long enough to lose it
        )
        if self.team.is_main_process:
            prune(folder, self.settings.keep_checkpoints)
        self._saved_step = self.step
        self.team.wait()

    def snapshot(self, name: str) -> None:
        """Write weights to use: the average of each rate, that of the first rate under the plain name."""
        self.team.require_lock()
        for rate in self.averages.rates:
            weights = self.task.model.state_dict() | self.averages.weights(rate)
            suffix = "" if rate == self.averages.rates[0] else f"-ema{rate:g}"
            path = self.out / "snapshots" / f"{name}{suffix}.safetensors"
            self.task.save_snapshot(
                path, weights, step=self.step, ema_rate=rate, write=self.team.is_main_process
            )

    def render_samples(self, journal: Journal) -> None:
        """Write a sheet of images made with the averaged weights; sharded weights need every process for it."""
        self.team.require_lock()
        path = self.out / "samples" / f"step-{self.step:08d}.png"
        if self.team.is_main_process or self.team.sharded:
            with self.averages.applied(self.averages.rates[0]):
                self.task.render_samples(path)
        journal.log_image(self.step, path)

    def evaluate(self, journal: Journal) -> None:
        """Measure the averaged weights on images that are not trained on."""
        with self.averages.applied(self.averages.rates[0]):
            scores = self.task.evaluate()
        self.team.require_lock()
        journal.record_scores(self.step, scores)
