"""Real photographs from two wheels, cut by a seed into an ordinary image folder, one class a photograph."""

from __future__ import annotations

import json
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from shards import UsageError

# Class name -> wheel, file, and the central share of the photograph's shorter side that the class shows: textures are
# seen from nearer. The wheels' own README files name the photographers and the (free) licences.
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png", 1.0),
    "brick": ("skimage", "data/brick.png", 0.45),
    "cameraman": ("skimage", "data/camera.png", 1.0),
    "cat": ("skimage", "data/chelsea.png", 1.0),
    "coffee": ("skimage", "data/coffee.png", 1.0),
    "coins": ("skimage", "data/coins.png", 0.7),
    "flower": ("sklearn", "datasets/images/flower.jpg", 1.0),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg", 0.4),
    "grass": ("skimage", "data/grass.png", 0.4),
    "moon": ("skimage", "data/moon.png", 1.0),
    "motorcycle": ("skimage", "data/motorcycle_left.png", 1.0),
    "pagoda": ("sklearn", "datasets/images/china.jpg", 1.0),
    "retina": ("skimage", "data/retina.jpg", 1.0),
    "rocket": ("skimage", "data/rocket.jpg", 1.0),
}

SAVED_SIDE = 160  # pixels: above the demo's 128, so that the encoder's own centre crop still has work to do
SMALLEST_CROP = 0.88  # of the square's side: most of the image, so that a class has a layout to learn
MIRRORED = 0.15  # share of crops that are mirrored


def open_photograph(name: str) -> Image.Image:
    """Open one of `PHOTOGRAPHS` as an RGB square: the part of it that its class shows.

    Raises:
        UsageError: If the wheel that carries it is not installed.
    """
    wheel, file, share = PHOTOGRAPHS[name]
    spec = find_spec(wheel)
    if spec is None or spec.origin is None:
        raise UsageError(
            f"the demo's photographs come from the package {wheel}, which is missing; run `pip install -e '.[demo]'`"
        )
    photograph = Image.open(Path(spec.origin).parent / file).convert("RGB")
    side = int(share * min(photograph.size))
    left, top = (photograph.width - side) // 2, (photograph.height - side) // 2
    return photograph.crop((left, top, left + side, top + side))


def square_crop(photograph: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Cut most of a square photograph, moved, scaled and sometimes mirrored, to `SAVED_SIDE` pixels."""
    crop = photograph.width * generator.uniform(SMALLEST_CROP, 1.0)
    left, top = generator.uniform(0, photograph.width - crop, size=2)
    box = (left, top, left + crop, top + crop)
    image = photograph.resize((SAVED_SIDE, SAVED_SIDE), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < MIRRORED else image


def write_photographs(folder: Path, *, per_class: int = 144, seed: int = 0) -> int:
    """Write the image folder `folder/<class>/<number>.png`; a folder that is already complete is left alone.

    Args:
        folder: Where to write. Built beside it and renamed at the end, so that a kill leaves no half folder.
        per_class: Crops of each photograph.
        seed: Of all crops.

    Returns:
        The number of images in the folder.
    """
    wanted = {"per_class": per_class, "seed": seed, "side": SAVED_SIDE, "classes": sorted(PHOTOGRAPHS)}
    settings = folder.parent / f"{folder.name}.json"
    count = per_class * len(PHOTOGRAPHS)
    if settings.exists() and folder.is_dir() and json.loads(settings.read_text()) == wanted:
        return count

    settings.unlink(missing_ok=True)
    partial = folder.parent / f"{folder.name}.partial"
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    with tqdm(total=count, desc="cut photographs", unit="crop") as progress:
        for index, name in enumerate(sorted(PHOTOGRAPHS)):
            photograph = open_photograph(name)
            generator = np.random.default_rng([seed, index])
            (partial / name).mkdir(parents=True)
            for number in range(per_class):
                square_crop(photograph, generator).save(
                    partial / name / f"{number:04d}.png", compress_level=1
                )
                progress.update()
    os.replace(partial, folder)  # noqa: PTH105 - a folder over nothing, in one step
    settings.write_text(json.dumps(wanted))
    return count
