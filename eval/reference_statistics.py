"""Compute the statistics of reference images once, for every later comparison.

accelerate launch eval/reference_statistics.py IMAGES --out FILE.npz
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from eval.command import parse, run
from eval.settings import ReferenceSettings, require_reference, weights_by_name
from shards import UsageError, require_output_folder


def main(arguments: Sequence[str]) -> int:
    """Compute and write; returns the exit code."""
    settings = parse(arguments, ReferenceSettings, "eval/reference_statistics.py")
    require_reference(settings.images)
    if settings.out.suffix != ".npz":
        raise UsageError(f"--out must end in .npz, by which statistics are known; got {settings.out}")
    if settings.out.is_dir():
        raise UsageError(f"--out must be a file, {settings.out} is a folder; name a file in it")
    require_output_folder(settings.out.parent)
    weights = {"inception": settings.feature_weights, **weights_by_name(settings.network_weights)}
    from eval.metrics.reference import save_reference
    from eval.metrics.scoring import NETWORKS
    from train.distributed import Team
    from train.engine.signals import die_with_launcher

    die_with_launcher()
    team = Team()
    try:
        networks = {
            name: partial(NETWORKS[name], weights.get(name, "public"), team.device)
            for name in settings.networks
        }
        size = (settings.image_size, settings.image_size)
        save_reference(settings.images, size, networks, team, settings.out)
    finally:
        team.close()
    return 0


if __name__ == "__main__":
    run(main)
