"""Small photographs on disk, and the settings that encode them in a moment."""

import numpy as np
import pytest
from PIL import Image

from pipeline.cli import main


def photograph(seed, size=(72, 60)):
    """A smooth random picture, uint8 [H, W, 3]; no two seeds give the same."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC))


@pytest.fixture(scope="session")
def draw():
    """Makes a picture from a seed and a size (width, height)."""
    return photograph


@pytest.fixture
def folder(tmp_path):
    """An image folder with 3 classes of 7 photographs."""
    root = tmp_path / "images"
    for number in range(21):
        path = root / f"class {number % 3}" / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(number)).save(path)
    return root


@pytest.fixture
def pipeline(capsys):
    """Runs the command in this process; gives its exit code, standard output and standard error."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
