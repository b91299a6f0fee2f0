"""Workers that somebody else starts: torchrun, `accelerate launch -m pipeline`, indexed jobs, SLURM arrays.

Each process knows its number and how many there are; it begins with the shards of its share and then helps the others.
"""

import os
from dataclasses import dataclass

from shards import UsageError


@dataclass(frozen=True)
class World:
    """Which of how many equal processes this is.

    Attributes:
        rank: Its number.
        size: How many there are.
        local_rank: Its number among those on the same machine, which picks its device; None takes all devices.
        local_size: How many are on the same machine and share its cores.
    """

    rank: int
    size: int
    local_rank: int | None
    local_size: int = 1


def world_from_environment() -> World:
    """RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, as torchrun sets them.

    With neither RANK nor WORLD_SIZE, as `accelerate launch` leaves a single process, this is the only one.

    Raises:
        UsageError: If one of RANK and WORLD_SIZE is missing or they make no sense.
    """
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return World(0, 1, None)
    rank, world_size = _number("RANK"), _number("WORLD_SIZE")
    local_rank = _number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else None
    local_world_size = _number("LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in os.environ else 1
    return _checked(World(rank, world_size, local_rank, max(local_world_size, 1)))


def require_single_process() -> None:
    """Refuse to be one of several processes without knowing it.

    Raises:
        UsageError: If torchrun or the like has started more than this one.
    """
    world_size = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and world_size != "1":
        raise UsageError(
            f"--engine local is for one command a machine, got RANK and WORLD_SIZE={world_size} in the environment; "
            "add --engine static to share the work"
        )


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdigit():
        raise UsageError(
            f"--engine static needs {name} as a whole number in the environment, got {text!r}; "
            "start it with torchrun or set RANK and WORLD_SIZE"
        )
    return int(text)


def _checked(world: World) -> World:
    if not 0 <= world.rank < world.size:
        raise UsageError(f"RANK must be less than WORLD_SIZE, got {world.rank} of {world.size}")
    return world
