"""Running an engine over the shards of a store that are still to come, and finishing the store."""

import sys
from collections.abc import Sequence

from pipeline.console import log
from pipeline.encode.claims import Failures
from pipeline.encode.devices import named_devices
from pipeline.encode.finish import finish_once, list_fields
from pipeline.encode.progress import Progress
from pipeline.encode.targets import companion_paths, pending_in_any
from pipeline.encoders.latents import RowEncoder
from pipeline.engines import slurm
from pipeline.engines.local import run_local
from pipeline.engines.ray import run_ray
from pipeline.engines.static import World, require_single_process, world_from_environment
from pipeline.settings.config import EncodeConfig, WorkConfig
from pipeline.sources.crop_sources import holds_crops
from shards import StoreWriter, as_location, is_store, open_store


def find_world(work: WorkConfig, arguments: Sequence[str]) -> World | None:
    """Return rank and number of equal workers; None if only the script of a SLURM array was made.

    Args:
        work: The engine that was asked for.
        arguments: The command's own arguments, for engines that run it elsewhere.
    """
    if work.engine == "local":
        require_single_process()
    elif work.engine == "static":
        return world_from_environment()
    elif work.engine == "slurm":
        if slurm.inside_array():
            return slurm.world_in_array()
        script = slurm.array_script(work, arguments)
        if work.slurm_submit:
            log(slurm.submit(script))
        else:
            sys.stdout.write(script)
        return None
    return World(0, 1, None)


def run(config: EncodeConfig, writer: StoreWriter, encoder: RowEncoder | None, world: World) -> None:
    """Encode the shards that are left, beside any other workers, and finish the store.

    Args:
        config: Settings; the engines hand them to their workers.
        writer: The store, begun.
        encoder: The encoder on the CPU, if it has been built already.
        world: Which of how many equal workers this process is.

    Raises:
        UserError: If it cannot be done, or is not done completely.
    """
    writers = [writer, *(StoreWriter.open(path) for path in companion_paths(config).values())]
    if pending_in_any(writers):
        if world.rank == 0:
            Failures(writer.path, config.work.max_attempts).clear()
            _log_state(config, writers)
        _encode_pending(config, writers, encoder, world)
    for companion in writers[1:]:
        finish_once(config, companion)
    finish_once(config, writer)
    if len(writers) > 1:
        list_fields(writer.path)


def _log_state(config: EncodeConfig, writers: Sequence[StoreWriter]) -> None:
    writer, pending = writers[0], pending_in_any(writers)
    views = dict.fromkeys(view for view, _ in pending)
    unfinished = {shard for _, shard in pending}
    if len(pending) < len(views) * writer.plan.num_shards:
        finished = writer.plan.num_shards - len(unfinished)
        log(f"continuing {writer.path}: {finished} of {writer.plan.num_shards} shards are there")
    source = config.source_path()
    if config.compressor is not None:
        log(f"reading the tokens that {source} holds")
    elif is_store(source):
        stored = holds_crops(open_store(as_location(source)), writer.recipe, views)
        log(
            f"reading the crops that {source} holds"
            if stored
            else f"reading the image files that {source} was made from: it does not hold what {', '.join(views)} show"
        )


def _encode_pending(
    config: EncodeConfig, writers: Sequence[StoreWriter], encoder: RowEncoder | None, world: World
) -> None:
    devices = [str(device) for device in named_devices(config.work.devices)]
    if world.local_rank is not None:
        devices = [devices[world.local_rank % len(devices)]]
    with Progress(
        config.log_dir(),
        num_rows=writers[0].plan.num_images,
        rows_done=lambda: _rows_done(writers),
        quiet=world.rank > 0,
    ) as progress:
        if config.work.engine == "ray":
            run_ray(config, progress)
        else:
            run_local(
                config,
                devices,
                encoder,
                progress,
                machine=world.rank,
                machines=world.size,
                processes=len(devices) * world.local_size,
            )


def _rows_done(writers: Sequence[StoreWriter]) -> int:
    """Return the number of images in shards that are finished in every view of every store."""
    plan = writers[0].plan
    unfinished = {shard for _, shard in pending_in_any(writers)}
    return plan.num_images - sum(plan.shard_size(shard) for shard in unfinished)
