"""A SLURM array: prints or submits its script; inside it, each task is one of many equal workers."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence

from pipeline.engines.static import World
from pipeline.settings.config import WorkConfig
from shards import UsageError, UserError


def inside_array() -> bool:
    """Return whether this process is a task of an array."""
    return "SLURM_ARRAY_TASK_ID" in os.environ


def world_in_array() -> World:
    """Return the number of this task, counted from the array's first, and how many tasks the array has."""
    first = int(os.environ.get("SLURM_ARRAY_TASK_MIN", "0"))
    rank = int(os.environ["SLURM_ARRAY_TASK_ID"]) - first
    return World(rank, int(os.environ["SLURM_ARRAY_TASK_COUNT"]), None)


def array_script(work: WorkConfig, arguments: Sequence[str]) -> str:
    """Return the script of an array in which every task runs this same command.

    Args:
        work: How many tasks, and further options for sbatch.
        arguments: Arguments of `pipeline`, this command's own.
    """
    options = [f"#SBATCH {option}" for option in shlex.split(work.slurm_args)]
    lines = [
        "#!/bin/bash",
        "#SBATCH --job-name=pipeline-encode",
        f"#SBATCH --array=0-{work.slurm_tasks - 1}",
        "#SBATCH --requeue",
        *options,
        "# Each task takes its share of the shards, then helps the others, which finish what a dead task had.",
        shlex.join([sys.executable, "-m", "pipeline", *arguments]),
    ]
    return "\n".join(lines) + "\n"


def submit(script: str) -> str:
    """Hand a script to sbatch; gives what sbatch says.

    Raises:
        UsageError: If there is no sbatch here.
        UserError: If sbatch refuses.
    """
    if shutil.which("sbatch") is None:
        raise UsageError(
            "--slurm-submit needs the command sbatch, which is not there; leave it out to print the script"
        )
    result = subprocess.run(["sbatch"], input=script, text=True, capture_output=True, check=False)
    if result.returncode:
        raise UserError(f"sbatch refused the array: {result.stderr.strip()}; correct --slurm-args")
    return result.stdout.strip()
