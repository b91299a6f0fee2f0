"""`python -m pipeline.demo photographs FOLDER` and `python -m pipeline.demo page …`: the demo's own two ends."""

from __future__ import annotations

import sys
from pathlib import Path

import tyro

from shards import UserError


def photographs(folder: tyro.conf.Positional[Path], *, per_class: int = 144, seed: int = 0) -> None:
    """Cut photographs into an image folder, one class a photograph.

    Args:
        folder: Where to write.
        per_class: Crops of each photograph.
        seed: Of all crops.
    """
    from pipeline.demo.photographs import write_photographs

    count = write_photographs(folder, per_class=per_class, seed=seed)
    sys.stdout.write(f"{count} crops of real photographs in {folder}\n")


def page(
    *,
    store: Path,
    decoder: Path,
    dit: Path,
    reconstruction: Path,
    generation: Path,
    out: Path,
    few_step: Path | None = None,
    compact: Path | None = None,
) -> None:
    """Write the page that shows what the demo's commands made.

    Args:
        store: The encoded store.
        decoder: The decoder's run.
        dit: The diffusion transformer's run.
        reconstruction: What eval/reconstruction.py wrote.
        generation: What eval/generation.py wrote.
        out: Where the page goes.
        few_step: What eval/few_step.py wrote, if it was run.
        compact: Folder of what `make demo-compact` made: compressor, dit, reconstruction and generation.
    """
    from pipeline.demo.page import DemoFolders, write_page

    folders = DemoFolders(
        store=store,
        decoder=decoder,
        dit=dit,
        reconstruction=reconstruction,
        generation=generation,
        few_step=few_step,
        compact=compact,
    )
    sys.stdout.write(f"look at {write_page(folders, out).resolve()}\n")


def main() -> int:
    """Run one end of the demo and return the exit code."""
    try:
        tyro.extras.subcommand_cli_from_dict({"photographs": photographs, "page": page})
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
