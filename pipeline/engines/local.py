"""Workers on this machine: one process a device, or the running process if there is only one device."""

import multiprocessing
import queue
import signal
import time
from multiprocessing.process import BaseProcess
from typing import Any

from pipeline.encode.job import WorkerSpec, run_worker
from pipeline.encode.progress import Event, Progress, WorkerGaveUp
from pipeline.encode.worker import WorkerGivesUpError
from pipeline.encoders.latents import RowEncoder
from pipeline.settings.config import EncodeConfig
from shards import UserError

_STOP_SECONDS = 20.0
_LOOK_SECONDS = 0.5


def run_local(
    config: EncodeConfig,
    devices: list[str],
    encoder: RowEncoder | None,
    progress: Progress,
    *,
    machine: int = 0,
    machines: int = 1,
    processes: int | None = None,
) -> None:
    """Encode with one worker a device until no shard is left that a worker could do.

    Args:
        config: Settings of the run.
        devices: Devices by name; one twice is two workers.
        encoder: The encoder on the CPU, if it has been built; the running process uses it if it is the only worker.
        progress: Takes the workers' news.
        machine: Number of this command among those that work on the store with as many devices each.
        machines: How many of them there are.
        processes: Workers that share the cores of this machine. Default: one a device.

    Raises:
        UserError: The first error that stopped a worker, or that all of them died.
    """
    specs = [
        WorkerSpec(
            config=config,
            device=device,
            rank=rank,
            world_size=machines * len(devices),
            processes=processes or len(devices),
            name=f"worker {rank} ({device})",
        )
        for rank, device in enumerate(devices, start=machine * len(devices))
    ]
    if len(specs) == 1:
        run_worker(specs[0], progress, encoder)
    else:
        _run_processes(specs, progress)


def _run_processes(specs: list[WorkerSpec], progress: Progress) -> None:
    context = multiprocessing.get_context("spawn")
    news: Any = context.Queue()
    processes: dict[str, BaseProcess] = {}
    for spec in specs:
        processes[spec.name] = context.Process(target=_work, args=(spec, news), name=spec.name)
        processes[spec.name].start()
    try:
        follow(processes, news, progress)
    finally:
        for process in processes.values():
            if process.is_alive():
                process.terminate()
        for process in processes.values():
            process.join(_STOP_SECONDS)
            if process.is_alive():
                process.kill()


def follow(
    processes: dict[str, BaseProcess], news: Any, progress: Progress, *, look_seconds: float = _LOOK_SECONDS
) -> None:
    """Show the workers' news until all of them have ended.

    Args:
        processes: The workers by name.
        news: Queue of their events.
        progress: Takes the events.
        look_seconds: Pause between two looks whether one of them has ended.

    Raises:
        UserError: The first error that stopped a worker, or that all of them died.
    """
    alive = dict(processes)
    finished = 0
    looked = time.monotonic()
    while True:
        event = _next(news, look_seconds)
        if isinstance(event, UserError):
            raise event
        if event is not None:
            progress(event)
        elif not alive:
            break
        if event is None or time.monotonic() - looked > look_seconds:  # busy workers leave no pause
            looked = time.monotonic()
            progress.name_stalled()
            finished += _reap(alive, progress)
    if not finished:
        raise UserError(
            "all workers died; see the messages above, then run the same command again to continue"
        )


def _next(news: Any, timeout: float) -> Any:
    """Return the next piece of news, or None if there is none for a while."""
    try:
        return news.get(timeout=timeout)
    except queue.Empty:
        return None


def _reap(alive: dict[str, BaseProcess], progress: Progress) -> int:
    """Remove the workers that have ended, name those that have died, and count the others."""
    finished = 0
    for name, process in list(alive.items()):
        if process.exitcode is None:
            continue
        del alive[name]
        progress.finished(name)
        if process.exitcode == 0:
            finished += 1
        else:
            progress.warn(f"{name} died (exit code {process.exitcode}); the others take over its shard")
    return finished


def _work(spec: WorkerSpec, news: Any) -> None:
    """Run in a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which ends its workers
    signal.signal(signal.SIGTERM, _leave)

    def report(event: Event) -> None:
        news.put(event)

    try:
        run_worker(spec, report)
    except WorkerGivesUpError as error:
        news.put(WorkerGaveUp(spec.name, str(error)))
        raise SystemExit(UserError.exit_code) from None
    except UserError as error:
        news.put(error)
    except KeyboardInterrupt:
        raise SystemExit(0) from None


def _leave(signum: int, frame: object) -> None:
    raise KeyboardInterrupt
