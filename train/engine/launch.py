"""From settings to a finished run: what the trainers do around their own network and loss."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from shards import Store, UsageError, replace_atomically, require_output_folder
from train.distributed import Team, disconnect, resolve_precision
from train.engine.arithmetic import allow_tf32
from train.engine.checkpoint import newest_of_all, read_state
from train.engine.feed import Feed
from train.engine.held_out import split_rows
from train.engine.loop import Trainer
from train.engine.resident import hold_tokens
from train.engine.signals import StopRequest, die_with_launcher
from train.engine.stores import additions_left_out, epoch_steps, open_training_store
from train.engine.summary import start_summary, state_nbytes
from train.engine.task import Task
from train.models.compilation import compile_function
from train.randomness import compile_draws
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
    runs: Sequence[_Settings],
    build: Callable[[_Settings, Store, Team], Task],
    *,
    default_views: Callable[[tuple[str, ...]], tuple[str, ...]],
) -> int:
    """Begin or continue runs, one after another.

    Args:
        runs: settings of each, as given on the command line.
        build: makes the task; the same on every process, whose random state is the settings' seed.
        default_views: which of a store's views the task is trained on if none are named.

    Returns:
        Exit code: 0 when all runs have reached `max_steps`, 128 + signal when one was told to stop.

    Raises:
        UserError: settings, store or checkpoint do not allow it.
    """
    die_with_launcher()
    logging.basicConfig(format="%(message)s")
    logging.getLogger("train").setLevel(logging.INFO)
    code = 0
    with StopRequest() as stop:
        try:
            for number, settings in enumerate(runs):
                if (
                    number
                ):  # torch keeps few programs of a network, and has no more use for those of the last run
                    torch.compiler.reset()
                title = f"run {number + 1} of {len(runs)}: {settings.out}" if len(runs) > 1 else None
                code = launch_one(settings, build, default_views, stop, title=title)
                if code:
                    break
        finally:
            disconnect()
    return code


def launch_one(
    settings: _Settings,
    build: Callable[[_Settings, Store, Team], Task],
    default_views: Callable[[tuple[str, ...]], tuple[str, ...]],
    stop: StopRequest,
    *,
    title: str | None,
) -> int:
    """Begin or continue a run of one or more, whose title is logged; see `launch`."""
    assert settings.out is not None
    require_output_folder(settings.out)
    store = open_training_store(settings)
    settings = resolve(settings, store, default_views)
    assert settings.out is not None
    tracker = resolve_tracker(settings.tracker)
    team = Team(sharding=settings.sharding, tracker=tracker, out=settings.out)
    try:
        with team.locked(settings.out):
            if title is not None and team.is_main_process:
                logger.info("%s", title)
            return run(settings, build, store, team, tracker, stop)
    finally:
        team.finish()


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
    settings = as_begun(settings, settings.out)
    assert settings.out is not None
    if finished(settings.out, settings.max_steps, team):
        if team.is_main_process:
            logger.info(
                "%s has already reached step %d; train on with a larger --max-steps",
                settings.out,
                settings.max_steps,
            )
        return 0
    left_out = additions_left_out(settings, store)
    if left_out is not None and team.is_main_process:
        logger.info("%s", left_out)
    allow_tf32(allowed=settings.precision != "fp32")
    compile_draws(compile_function if settings.compile else None)
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
    remember(settings, settings.out, team)
    resident = None
    if "tokens" in task.fields:
        resident = hold_tokens(
            store,
            settings.views or (),
            rows,
            team,
            asked=settings.resident,
            network_nbytes=state_nbytes(task.config, settings),
            num_samples=(settings.max_steps - trainer.step) * settings.global_batch_size,
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
    facts = start_summary(task.config, settings, store, world_size=team.world_size, step=trainer.step)
    if resident is not None:
        facts.append(f"{resident.nbytes / 1e9:,.2f} GB of tokens are held on {team.device}")
    journal = Journal(
        team,
        settings.out,
        step=trainer.step,
        max_steps=settings.max_steps,
        settings=flat_values(settings),
        tracker=tracker,
        facts=facts,
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
        line = f"--views {' '.join(missing)}: the store {store} has {', '.join(store.views)} only"
        if set(missing) <= set(store.views_since):
            line = f"{line}, as the run knows it; to take the view that was added since, add --allow-change store views"
        raise UsageError(line)
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


def as_begun(settings: _Settings, out: Path) -> _Settings:
    """Return the settings with what was noted of their origin when the run was begun, if it was.

    Raises:
        UsageError: the run was begun with other fixed settings; the message names what differs.
    """
    path = out / "config.json"
    if not path.is_file():
        return settings
    before = load_settings(path)
    require_same_run(before, settings)
    return dataclasses.replace(settings, varies=before.varies, varies_in=before.varies_in)


def remember(settings: Settings, out: Path, team: Team) -> None:
    """Write RUN/config.json; every process must call this, and has read the one before."""
    team.wait()
    if team.is_main_process:
        replace_atomically(out / "config.json", to_json(settings).encode())
    team.wait()


def finished(out: Path, max_steps: int, team: Team) -> bool:
    """Return whether the newest checkpoint has come to `max_steps`; every process must call this.

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
