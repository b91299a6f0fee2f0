"""train/decoder.py with a discriminator small enough for a CPU: the frozen DINO is cut down to two narrow blocks."""

from __future__ import annotations

from train.decoder import main
from train.models.discriminator import DINO_SIZES, DinoConfig
from train.settings.commandline import run

TINY_DINO = DinoConfig(patch_size=56, width=16, depth=2, num_heads=2, key_depths=(0, 1))

if __name__ == "__main__":
    DINO_SIZES["S_8"] = TINY_DINO
    run(main)
