"""The processes of a run and what they do together: the one place that knows Accelerate and torch.distributed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from shards import FolderLock, UsageError, UserError
from train.settings.config import Precision


def _require_whole_environment() -> None:
    """Refuse a launcher's variables that PyTorch or Accelerate would answer with a traceback, or wait for ever.

    Raises:
        UsageError: naming the variables that are missing, or ask for what there is not.
    """
    for engine in ("DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true":
            raise UsageError(
                f"ACCELERATE_USE_{engine} is set, and only DDP and FSDP are supported; unset it, or choose another "
                "distributed type in `accelerate config`"
            )
    stated = os.environ.get("WORLD_SIZE", "1")
    if not stated.isdecimal() or int(stated) < 1:
        raise UsageError(
            f"WORLD_SIZE must be a number from 1, got {stated!r}; unset it, or start with torchrun"
        )
    missing = [
        name for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ
    ]
    if int(stated) > 1 and missing:
        raise UsageError(
            f"by WORLD_SIZE a launcher started {stated} processes, but {', '.join(missing)} are not set; start with "
            "torchrun or accelerate launch, or unset WORLD_SIZE"
        )


def resolve_precision(asked: Precision | None) -> Precision:
    """Return the arithmetic of the run: what was asked for, else what the launcher was told, else the device's default.

    Raises:
        UsageError: the launcher was told another one than the trainer, or one we do not have.
    """
    told = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if told not in ("no", "bf16"):
        raise UsageError(f"`accelerate launch --mixed_precision {told}` is not supported: choose bf16 or no")
    if told == "bf16":
        if asked not in (None, "bf16"):
            raise UsageError(f"--precision {asked} contradicts `accelerate launch --mixed_precision bf16`")
        return "bf16"
    return asked or ("bf16" if torch.cuda.is_available() else "fp32")


class Team:
    """The processes that train together; one alone is a team too.

    Attributes:
        rank: number of this process.
        world_size: number of processes.
        local_world_size: number of them on this machine.
        device: where this process computes.
    """

    def __init__(
        self, *, sharding: Literal["ddp", "fsdp"] = "ddp", tracker: str = "none", out: Path | None = None
    ) -> None:
        """Join the processes the launcher started.

        Args:
            sharding: how several processes hold the weights.
            tracker: "tensorboard", "wandb" or "none".
            out: where a tracker may write.

        Raises:
            UsageError: the launcher started more processes than have found each other, or FSDP was asked for without
                CUDA, where Accelerate would quietly train with DDP.
        """
        self._lock: FolderLock | None = None
        cuda = torch.cuda.is_available()
        self.sharded = sharding == "fsdp" or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if self.sharded and not cuda:
            raise UsageError("FSDP needs CUDA devices and this machine has none; leave --sharding at ddp")
        _require_whole_environment()
        self.accelerator = Accelerator(
            cpu=not cuda,
            mixed_precision="no",  # autocast is entered where the loss is computed
            log_with=None if tracker == "none" else tracker,
            project_config=None if out is None else ProjectConfiguration(project_dir=str(out)),
            kwargs_handlers=[
                DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
            ],
        )
        self.rank: int = self.accelerator.process_index
        self.world_size: int = self.accelerator.num_processes
        # Torchrun and Accelerate say it; who starts processes otherwise is taken to have one machine.
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))
        # Among several CPU processes Accelerate calls its device cpu:0, a name that safetensors refuses.
        self.device: torch.device = self.accelerator.device if cuda else torch.device("cpu")
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        if launched != self.world_size:
            raise UsageError(
                f"the launcher started {launched} processes but this one is in a team of {self.world_size}; "
                "on CPUs start several with torchrun --nproc_per_node N train/dit.py"
            )

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model as it is called in training: alone, in DDP, or sharded in place by FSDP2."""
        if self.sharded:
            return shard_blocks(model)
        if self.world_size == 1:
            return model
        with warnings.catch_warnings():
            # torch 2.15 renames the setting; Accelerate passes on the old name only.
            warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
            wrapped: nn.Module = self.accelerator.prepare_model(model, device_placement=False)
        return wrapped

    def sum(self, values: Tensor) -> Tensor:
        """Sum over all processes, in place, without waiting for the device."""
        if self.world_size > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value: Any) -> list[Any]:
        """Gather one object of every process, by rank, on every process."""
        if self.world_size == 1:
            return [value]
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    @contextmanager
    def locked(self, folder: Path) -> Iterator[None]:
        """Within this context no other command writes into a folder, which is made if it is not there.

        The main process holds the lock; every process must enter.

        Raises:
            UserError: another command writes there.
        """
        with ExitStack() as held:
            refused: str | None = None
            if self.is_main_process:
                folder.mkdir(parents=True, exist_ok=True)
                try:
                    self._lock = held.enter_context(FolderLock(folder))
                except UserError as error:
                    refused = str(error)
            self._refuse_together(refused)
            held.callback(setattr, self, "_lock", None)
            yield

    def require_lock(self) -> None:
        """Refuse to publish if another command has taken over the folder of `locked`.

        Every process must call this.

        Raises:
            UserError: the main process stood still for so long that another host took its lock for a dead one's.
        """
        refused: str | None = None
        if self._lock is not None:
            try:
                self._lock.require_held()
            except UserError as error:
                refused = str(error)
        self._refuse_together(refused)

    def _refuse_together(self, refused: str | None) -> None:
        """Raise `UserError` on every process if the main process was refused something."""
        refused = self.gather(refused)[0]
        if refused is not None:
            raise UserError(refused)

    def wait(self) -> None:
        """Wait until every process has come here."""
        if self.world_size > 1:
            dist.barrier()

    def finish(self) -> None:
        """Close the trackers and let go of what was trained; the processes stay connected, for a next team."""
        self.accelerator.free_memory()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def close(self) -> None:
        """Close the trackers and the connections of this process."""
        self.finish()
        disconnect()


def disconnect() -> None:
    """Close the connections of this process; there is no team after it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def shard_blocks(model: nn.Module) -> nn.Module:
    """Return shard a model over all processes with FSDP2: every transformer block for itself, then the rest."""
    for child in model.modules():
        if isinstance(child, nn.ModuleList):
            for block in child:
                fully_shard(block)
    fully_shard(model)
    return model


def gradients_stay_local(model: nn.Module, *, local: bool) -> AbstractContextManager[None]:
    """Return a context for a backward pass; if `local`, gradients are summed here and not yet over the processes."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(not local)
    elif isinstance(model, DistributedDataParallel) and local:
        return model.no_sync()
    return nullcontext()


def full_tensor(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded; every process must call this, in the same order."""
    whole: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole


def local_part(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be sharded, sharing its memory."""
    part: Tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return part


@torch.no_grad()
def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor into one that may be sharded."""
    if isinstance(target, DTensor):
        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)
