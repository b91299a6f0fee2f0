"""Ray Core actors: one a GPU anywhere in a cluster, or on this machine alone; the extra `[ray]`."""

import dataclasses
import logging
from dataclasses import dataclass
from typing import Any

from pipeline.encode.job import WorkerSpec, run_worker
from pipeline.encode.progress import Event, Progress
from pipeline.encode.worker import WorkerGivesUpError
from pipeline.settings.config import EncodeConfig
from shards import UsageError, UserError

_RESTARTS = 3


@dataclass
class _Slot:
    """A place for one actor, filled again if the actor dies."""

    spec: WorkerSpec
    starts: int = 0


def run_ray(config: EncodeConfig, progress: Progress) -> None:
    """Encode with Ray actors until no shard is left that one of them could do.

    Tokens never pass through Ray's object store: an actor writes its shards itself and sends only its news.

    Args:
        config: Settings of the run; the source and the store must be reachable under the same names everywhere.
        progress: Takes the actors' news.

    Raises:
        UsageError: If Ray is not installed, or not to be reached.
        UserError: The first error that stopped an actor, or that all of them died too often.
    """
    try:
        import ray
        from ray.util.queue import Queue
    except ImportError as error:
        raise UsageError(
            "--engine ray needs Ray, which is not installed; pip install 'rae-latents[ray]'"
        ) from error
    try:
        ray.init(
            address=config.work.ray_address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except ConnectionError as error:
        raise UsageError(f"--ray-address {config.work.ray_address} cannot be reached: {error}") from error
    try:
        gpus = int(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
        count = config.work.ray_actors or gpus or 1
        news = Queue()
        _follow(ray, [_Slot(spec) for spec in _specs(config, count, on_gpus=gpus > 0)], news, progress)
    finally:
        ray.shutdown()


def _specs(config: EncodeConfig, count: int, *, on_gpus: bool) -> list[WorkerSpec]:
    device = "cuda:0" if on_gpus else "cpu"  # Ray shows each actor its own GPU alone
    return [
        WorkerSpec(
            config=config,
            device=device,
            rank=rank,
            world_size=count,
            name=f"actor {rank} ({device.partition(':')[0]})",
        )
        for rank in range(count)
    ]


def _follow(ray: Any, slots: list[_Slot], news: Any, progress: Progress) -> None:
    """Keep every slot filled until its actor has nothing left to do."""
    actor_class = ray.remote(_Actor)
    running: dict[Any, tuple[_Slot, Any]] = {}

    def start(slot: _Slot) -> None:
        slot.starts += 1
        # CPU actors reserve no cores: asking for more than there are would wait for ever without a word.
        actor = actor_class.options(
            num_cpus=0, num_gpus=1 if slot.spec.device.startswith("cuda") else 0
        ).remote()
        running[actor.run.remote(slot.spec, news)] = slot, actor

    for slot in slots:
        start(slot)
    finished = 0
    while running:
        done, _ = ray.wait(list(running), timeout=0.5)
        _show(news, progress)
        for reference in done:
            slot, _ = running.pop(reference)
            progress.finished(slot.spec.name)
            try:
                error = ray.get(reference)
            except ray.exceptions.RayActorError:
                progress.warn(f"{slot.spec.name} died; the others take over its shard")
                if slot.starts <= _RESTARTS:
                    start(slot)
                continue
            if isinstance(error, WorkerGivesUpError):
                progress.warn(str(error))
            elif error is not None:
                raise error
            else:
                finished += 1
    _show(news, progress)
    if not finished:
        raise UserError(
            "all actors died; see the messages above, then run the same command again to continue"
        )


def _show(news: Any, progress: Progress) -> None:
    for event in news.get_nowait_batch(news.qsize()):
        progress(event)
    progress.name_stalled()


class _Actor:
    """One worker, in a process that Ray starts."""

    def run(self, spec: WorkerSpec, news: Any) -> UserError | None:
        """Encode until nothing is left; gives the error that stopped it, if one did."""

        def report(event: Event) -> None:
            news.put(event)

        try:
            run_worker(dataclasses.replace(spec, processes=_actors_on_this_node(spec)), report)
        except UserError as error:
            return error
        return None


def _actors_on_this_node(spec: WorkerSpec) -> int:
    """Return how many actors share the cores of the machine this is called on; where there are no GPUs, on average."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if spec.device.startswith("cuda"):
        gpus = next(int(node["Resources"].get("GPU", 1)) for node in nodes if node["NodeID"] == own)
        return max(1, min(gpus, spec.world_size))
    return -(-spec.world_size // len(nodes))
