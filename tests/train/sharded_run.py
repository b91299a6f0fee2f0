"""train/dit.py with its weights sharded over CPU processes, which the command itself refuses.

Accelerate would quietly train with DDP there; what is tested is our own wrapping, averaging and saving.
"""

from __future__ import annotations

import sys

from train.distributed import Team
from train.dit import main
from train.engine import launch
from train.settings.commandline import run


class ShardedTeam(Team):
    """A team that shards, whatever the device."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.sharded = True


if __name__ == "__main__":
    launch.Team = ShardedTeam
    run(main)
    sys.exit()
