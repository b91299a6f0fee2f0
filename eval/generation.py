"""Sample images from a snapshot and evaluate them.

accelerate launch eval/generation.py SNAPSHOT --decoder SNAPSHOT --num-samples 50000 --seed 0 --out DIR
"""

from __future__ import annotations

from collections.abc import Sequence

from eval.command import parse, run
from eval.generate.plan import plan_of
from eval.settings import GenerationSettings


def main(arguments: Sequence[str]) -> int:
    """Generate; returns the exit code."""
    plan = plan_of(parse(arguments, GenerationSettings, "eval/generation.py"))
    from eval.generate.run import generate

    generate(plan)
    return 0


if __name__ == "__main__":
    run(main)
