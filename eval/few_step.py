"""Compare a few-step model with the teacher it was distilled from, from the same noise.

python eval/few_step.py SNAPSHOT --teacher SNAPSHOT --decoder SNAPSHOT --store STORE --out DIR
"""

from __future__ import annotations

from collections.abc import Sequence

from eval.command import parse, run
from eval.settings import FewStepSettings, require_decoder
from shards import UsageError, require_output_folder


def main(arguments: Sequence[str]) -> int:
    """Compare; returns the exit code."""
    settings = parse(arguments, FewStepSettings, "eval/few_step.py")
    for path in (settings.snapshot, settings.teacher):
        if not path.is_file():
            raise UsageError(
                f"a snapshot is a file like RUN/snapshots/latest.safetensors, found none at {path}"
            )
    require_decoder(settings.decoder)
    require_output_folder(settings.out)
    from eval.generate.step_comparison import compare_steps

    compare_steps(settings)
    return 0


if __name__ == "__main__":
    run(main)
