"""What a run will cost, printed before it begins."""

from __future__ import annotations

from shards import Store
from train.engine.stores import epoch_steps
from train.models.config import GeneratorConfig, ModelConfig
from train.models.cost import forward_flops, num_parameters
from train.settings.config import DiTSettings, Settings
from train.settings.few_step import forward_passes
from train.settings.networks import widest_layer

BYTES_A_NUMBER = 4


def state_nbytes(config: ModelConfig, settings: Settings) -> int:
    """Return the bytes of a run's weights, gradients, two moments and averages, over all processes that share them."""
    return (4 + len(settings.ema_rates)) * BYTES_A_NUMBER * num_parameters(config)


def start_summary(
    config: ModelConfig, settings: Settings, store: Store, *, world_size: int, step: int
) -> list[str]:
    """Return lines that say what is trained, on what, and what it takes.

    Args:
        config: the network.
        settings: resolved settings.
        store: the store.
        world_size: number of processes.
        step: steps already taken.
    """
    parameters = num_parameters(config)
    forward = forward_flops(config)
    rows, batch = len(store.valid_rows) - settings.held_out, settings.global_batch_size
    # Backward costs twice the forward pass; recomputing activations costs a third one.
    plain = 4 if settings.activation_checkpointing else 3
    passes = forward_passes(settings) if isinstance(settings, DiTSettings) else plain
    states = state_nbytes(config, settings)
    share = 1 / world_size if settings.sharding == "fsdp" else 1.0
    lines = [
        f"{config.kind} of {parameters / 1e6:,.1f} M parameters; {forward / 1e9:,.2f} GFLOP an image forward, "
        f"{passes * forward * batch / 1e12:,.3f} TFLOP a step",
        f"store {store}: {rows:,} images"
        + (f" and {settings.held_out:,} held out" if settings.held_out else "")
        + f", {store.grid[0]}×{store.grid[1]} tokens of {store.width}, "
        f"views {', '.join(settings.views or ())}; encoder {store.recipe.encoder.name}"
        + (" with RANDOM weights" if store.recipe.encoder.random_weights else ""),
        f"batches of {batch} over {world_size} process{'es' if world_size > 1 else ''}: "
        f"{epoch_steps(settings, store, rows):,} steps an epoch; steps {step:,} to {settings.max_steps:,} are "
        f"{(settings.max_steps - step) * batch / rows:,.1f} epochs",
        f"weights, gradients, moments and averages take {states * share / 1e9:,.2f} GB a process, besides activations; "
        f"{settings.precision}{', compiled' if settings.compile else ''}",
    ]
    if isinstance(config, GeneratorConfig) and widest_layer(config) < config.token_width:
        lines.append(
            f"warning: the layer that predicts the velocity is {widest_layer(config)} wide and tokens are "
            f"{config.token_width} wide; such a network cannot learn to fit them (arXiv 2510.11690 section 4)"
        )
    return lines


def expected_hours(steps: int, step_seconds: float) -> str:
    """Return how long steps will take, as a line of the log."""
    return f"{steps:,} steps at {step_seconds:.3f} s are {steps * step_seconds / 3600:,.2f} hours"
