"""The learning rate in force at a step: hold or warm up, decay, stay."""

from __future__ import annotations

import math
from collections.abc import Callable

from train.settings.config import OptimizerSettings


def learning_rate(step: int, steps_per_epoch: int, settings: OptimizerSettings) -> float:
    """Return learning rate of optimizer step `step` (the first is 0).

    With W = `hold_epochs` and E = `decay_end_epoch` in steps: `lr` (or, warming up, lr · (step + 1) / W)
    before W, then linear or half a cosine from `lr` to `final_lr` at E, then `final_lr`. "warmup-stable-decay" rises
    linearly from `start_lr` at step 0 to `lr` at W, holds it until S = `decay_start_epoch` and falls linearly.

    Args:
        step: optimizer steps taken before this one.
        steps_per_epoch: floor(rows / global batch), at least 1.
        settings: the schedule.

    Source: github:bytetriper/RAE src/utils/optim_utils.py at a4d18c4 (which calls the held phase warm-up);
    epochs cut to whole steps: github:nanovisionx/RAEv2 src/utils/optim_utils.py at 8a0d238;
    "warmup-stable-decay": github:noctrog/flatdino train.py at cdd398f.
    """
    if settings.schedule == "warmup-stable-decay":
        return _warmup_stable_decay(step, steps_per_epoch, settings)
    whole: Callable[[float], int] = round if settings.round_epochs else int
    hold = whole(settings.hold_epochs * steps_per_epoch)
    if step < hold:
        return settings.lr * (step + 1) / hold if settings.warm_up else settings.lr
    if settings.schedule == "constant":
        return settings.lr
    end = whole(settings.decay_end_epoch * steps_per_epoch)
    done = min(1.0, (step - hold) / max(1, end - hold))
    remaining = 1.0 - done if settings.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
    return settings.final_lr + (settings.lr - settings.final_lr) * remaining


def _warmup_stable_decay(step: int, steps_per_epoch: int, settings: OptimizerSettings) -> float:
    epochs = (settings.hold_epochs, settings.decay_start_epoch, settings.decay_end_epoch)
    warm, start, end = (round(epoch * steps_per_epoch) for epoch in epochs)
    if step < warm:
        return settings.start_lr + (settings.lr - settings.start_lr) * step / warm
    done = min(1.0, max(0, step - start) / max(1, end - start))
    return settings.lr + (settings.final_lr - settings.lr) * done


def steps_per_epoch(num_rows: int, global_batch_size: int) -> int:
    """Return the number of steps in an epoch of a schedule: floor(rows / batch), at least 1.

    Source: github:bytetriper/RAE src/train.py at a4d18c4 drops an epoch's tail; 1,281,167 images at 1024 are
    1251 steps.
    """
    return max(1, num_rows // global_batch_size)
