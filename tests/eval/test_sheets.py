"""Pixels become pictures by the published rule; sheets put every picture in its place."""

import numpy as np
import torch
from PIL import Image

from eval.images.sheets import grid, save_png, side_by_side, to_uint8


def test_levels_are_cut_not_rounded_unless_asked():
    pixels = torch.tensor([-0.3, 0.0, 0.999 / 255, 127.6 / 255, 1.0, 1.7]).view(1, 1, 2, 3).expand(1, 3, 2, 3)
    assert to_uint8(pixels)[0, ..., 0].flatten().tolist() == [0, 0, 0, 127, 255, 255]
    assert to_uint8(pixels, rounding=True)[0, ..., 0].flatten().tolist() == [0, 0, 1, 128, 255, 255]


def test_channels_come_last():
    pixels = torch.zeros(2, 3, 4, 5)
    pixels[:, 1] = 1
    image = to_uint8(pixels)
    assert image.shape == (2, 4, 5, 3)
    assert image[0, 0, 0].tolist() == [0, 255, 0]


def test_a_sheet_holds_each_picture_once_in_reading_order(tmp_path):
    images = np.arange(5, dtype=np.uint8).repeat(8 * 8 * 3).reshape(5, 8, 8, 3) * 40
    sheet = np.asarray(grid(images, columns=2))
    assert sheet.shape == (3 * 10 + 2, 2 * 10 + 2, 3)
    corners = [tuple(sheet[2 + 10 * row, 2 + 10 * column]) for row in range(3) for column in range(2)]
    assert [corner[0] for corner in corners] == [0, 40, 80, 120, 160, 255]


def test_row_names_are_drawn_in_a_margin_of_their_own():
    images = np.full((4, 16, 16, 3), 255, np.uint8)
    plain, named = (np.asarray(grid(images, 2, names)) for names in ((), ("cat", "rocket")))
    margin = named.shape[1] - plain.shape[1]
    assert margin > 10
    assert (named[2:18, :margin] < 128).any()
    assert (named[20:36, :margin] < 128).any()
    np.testing.assert_array_equal(named[:, margin:], plain)


def test_pairs_stand_side_by_side():
    left, right = np.zeros((2, 4, 5, 3), np.uint8), np.ones((2, 4, 5, 3), np.uint8)
    pair = side_by_side(left, right)
    assert pair.shape == (2, 4, 10, 3)
    assert pair[0, 0, :, 0].tolist() == [0] * 5 + [1] * 5


def test_a_saved_picture_reads_back_the_same(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (6, 7, 3), dtype=np.uint8)
    save_png(image, tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), image)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
