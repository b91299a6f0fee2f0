"""The objectives of `train/dit.py`, by the name that `--objective` takes.

An objective is a `Task`: it computes the loss of a micro-batch. To add one, write its class in a module of this folder,
add a row here, and add its name to `train.settings.config.Objective`.
"""

from __future__ import annotations

from collections.abc import Callable

from train.engine.task import Task
from train.settings.config import Objective
from train.tasks.mean_flow import MeanFlowTask
from train.tasks.mid_training import MidTrainingTask
from train.tasks.parts import DiTParts
from train.tasks.velocity import VelocityTask

OBJECTIVES: dict[Objective, Callable[[DiTParts], Task]] = {
    "velocity": VelocityTask,
    "mid-training": MidTrainingTask,
    "mean-flow": MeanFlowTask,
}
