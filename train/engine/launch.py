"""From settings to a finished run: what the trainers do around their own network and loss."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from shards import Store, UsageError, replace_atomically, require_output_folder
from train.distributed import Team, resolve_precision
from train.engine.arithmetic import allow_tf32
from train.engine.checkpoint import newest_of_all, read_state
from train.engine.feed import Feed
from train.engine.held_out import split_rows
from train.engine.loop import Trainer
from train.engine.resident import hold_tokens
from train.engine.signals import StopRequest, die_with_launcher
from train.engine.stores import epoch_steps, open_training_store
from train.engine.summary import start_summary, state_nbytes
from train.engine.task import Task
from train.report.tracking import Journal, resolve_tracker
from train.settings.config import (
    CompressorSettings,
    DecoderSettings,
    DiTSettings,
    FlowSettings,
    OptimizerSettings,
    Settings,
)
from train.settings.saved_settings import flat_values, load_settings, require_same_run, to_json
from train.weights.snapshot import SnapshotMeta

logger = logging.getLogger(__name__)

_Settings = TypeVar("_Settings", DiTSettings, DecoderSettings, CompressorSettings)


def launch(
    settings: _Settings,
    build: Callable[[_Settings, Store, Team], Task],
    *,
    default_views: Callable[[tuple[str, ...]], tuple[str, ...]],
) -> int:
    """Begin or continue a run.

    Args:
        settings: as given on the command line.
        build: makes the task; the same on every process, whose random state is the settings' seed.
        default_views: which of a store's views the task is trained on if none are named.

    Returns:
        Exit code: 0 when the run has reached `max_steps`, 128 + signal when it was told to stop.

    Raises:
        UserError: settings, store or checkpoint do not allow it.
    """
    die_with_launcher()
    assert settings.out is not None
    require_output_folder(settings.out)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("train").setLevel(logging.INFO)
    store = open_training_store(settings)
    settings = resolve(settings, store, default_views)
    assert settings.out is not None
    tracker = resolve_tracker(settings.tracker)
    with StopRequest() as stop:
        team = Team(sharding=settings.sharding, tracker=tracker, out=settings.out)
        try:
            with team.locked(settings.out):
                return run(settings, build, store, team, tracker, stop)
        finally:
            team.close()


def run(
    settings: _Settings,
    build: Callable[[_Settings, Store, Team], Task],
    store: Store,
    team: Team,
    tracker: str,
    stop: StopRequest,
) -> int:
    """Begin or continue a run whose directory this command has locked; returns the exit code, as `launch` does.

    Args:
        settings: resolved settings.
        build: makes the task.
        store: the store.
        team: the processes.
        tracker: "tensorboard", "wandb" or "none".
        stop: tells when to stop.
    """
    assert settings.out is not None
    remember(settings, settings.out, team)
    if finished(settings.out, settings.max_steps, team):
        if team.is_main_process:
            logger.info(
                "%s has already reached step %d; train on with a larger --max-steps",
                settings.out,
                settings.max_steps,
            )
        return 0
    if store.images_since and team.is_main_process:
        logger.info(
            "%s was extended by %d images since this run began; it goes on with the %d it began with. "
            "To take the new ones too, add --allow-change store",
            store,
            store.images_since,
            len(store.valid_rows),
        )
    allow_tf32(allowed=settings.precision != "fp32")
    torch.manual_seed(settings.seed)
    rows, _ = split_rows(store.valid_rows, settings.held_out, seed=settings.seed)
    task = build(settings, store, team)
    trainer = Trainer(
        task,
        settings,
        team,
        steps_per_epoch=epoch_steps(settings, store, len(rows)),
        facts={"encoder": store.recipe.encoder.id, "recipe": store.id, **task.facts},
    )
    trainer.resume()
    resident = None
    if "tokens" in task.fields:
        resident = hold_tokens(
            store,
            settings.views or (),
            rows,
            team.device,
            asked=settings.resident,
            network_nbytes=state_nbytes(task.config, settings),
        )
    feed = Feed(
        store,
        team,
        fields=task.fields,
        views=settings.views or (),
        rows=rows,
        seed=settings.seed,
        global_batch_size=settings.global_batch_size,
        micro_batch_size=settings.micro_batch_size,
        start_sample=trainer.samples_seen,
        threads=settings.threads,
        resident=resident,
    )
    journal = Journal(
        team,
        settings.out,
        step=trainer.step,
        max_steps=settings.max_steps,
        settings=flat_values(settings),
        tracker=tracker,
        facts=start_summary(task.config, settings, store, world_size=team.world_size, step=trainer.step),
    )
    try:
        trainer.train(feed, journal, stop)
    finally:
        feed.close()
        journal.close()
    if trainer.step == settings.max_steps:
        return 0
    if team.is_main_process:
        logger.info(
            "stopped at step %d with a checkpoint; run the same command again to continue", trainer.step
        )
    return 128 + int(stop.signal or 15)


def resolve(
    settings: _Settings, store: Store, default_views: Callable[[tuple[str, ...]], tuple[str, ...]]
) -> _Settings:
    """Return settings with every open choice decided.

    Raises:
        UsageError: a view is not in the store, or the launcher was given another precision.
    """
    views = settings.views or default_views(store.views)
    missing = [view for view in views if view not in store.views]
    if missing:
        raise UsageError(f"--views {' '.join(missing)}: the store {store} has {', '.join(store.views)} only")
    on_cuda = torch.cuda.is_available()
    return dataclasses.replace(
        settings,
        views=views,
        precision=resolve_precision(settings.precision),
        compile=on_cuda if settings.compile is None else settings.compile,
        optimizer=_resolve_optimizer(settings.optimizer, on_cuda=on_cuda),
    )


def _resolve_optimizer(optimizer: OptimizerSettings, *, on_cuda: bool) -> OptimizerSettings:
    if optimizer.kind != "muon" or optimizer.half is not None:
        return optimizer
    return dataclasses.replace(optimizer, half=on_cuda)


def remember(settings: Settings, out: Path, team: Team) -> None:
    """Write RUN/config.json; a run that was begun is continued only with the same fixed settings.

    Raises:
        UsageError: naming what differs.
    """
    path = out / "config.json"
    if path.is_file():
        require_same_run(load_settings(path), settings)
    team.wait()
    if team.is_main_process:
        out.mkdir(parents=True, exist_ok=True)
        replace_atomically(path, to_json(settings).encode())
    team.wait()


def begun(out: Path, team: Team) -> bool:
    """Whether a run has a checkpoint to continue from; every process must call this.

    Raises:
        UserError: the processes find different ones.
    """
    return newest_of_all(out / "checkpoints", team) is not None


def finished(out: Path, max_steps: int, team: Team) -> bool:
    """Whether the newest checkpoint has come to `max_steps`; every process must call this.

    Raises:
        UserError: the processes find different ones, or it is damaged.
    """
    newest = newest_of_all(out / "checkpoints", team)
    return newest is not None and read_state(newest).step >= max_steps


def snapshot_meta(settings: Settings, store: Store) -> Callable[[int, float], SnapshotMeta]:
    """Return a function that makes the origin of a snapshot taken at (step, rate)."""

    def meta(step: int, ema_rate: float) -> SnapshotMeta:
        return SnapshotMeta(
            encoder=store.recipe.encoder.to_dict(),
            class_names=tuple(store.class_names),
            num_classes=max(1, store.num_classes),
            grid=store.grid,
            width=store.width,
            step=step,
            samples_seen=step * settings.global_batch_size,
            ema_rate=ema_rate,
            dtype=store.recipe.dtype,
            code=store.recipe.code,
            **(_flow_facts(settings.flow) if isinstance(settings, DiTSettings) else {}),
        )

    return meta


def _flow_facts(flow: FlowSettings) -> dict[str, Any]:
    """Return what sampling must share with training."""
    return {
        "shift_base": flow.shift_base,
        "prediction": flow.prediction,
        "time_floor": flow.time_floor,
    }
