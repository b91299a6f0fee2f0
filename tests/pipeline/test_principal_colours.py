import numpy as np
import pytest

from pipeline.operations.principal_colours import principal_colours


def test_like_tokens_get_like_colours_and_unlike_tokens_do_not():
    generator = np.random.default_rng(0)
    kinds = generator.standard_normal((4, 16)) * 5  # four kinds: three components tell them apart
    which = generator.integers(0, 4, size=(4, 6))
    tokens = kinds[which] + generator.standard_normal((4, 6, 16)) * 1e-3
    colours = principal_colours(tokens, (2, 3), 6)[:, ::3, ::2].reshape(24, 3).astype(int)
    apart = np.abs(colours[:, None] - colours[None]).max(-1)
    same = which.reshape(-1, 1) == which.reshape(1, -1)
    assert apart[same].max() < 10 < 60 < apart[~same].min()


def test_a_token_covers_its_part_of_the_picture():
    tokens = np.random.default_rng(1).standard_normal((1, 4, 8))
    picture = principal_colours(tokens, (2, 2), 8)[0]
    assert picture.shape == (8, 8, 3)
    assert picture.dtype == np.uint8
    for row in (0, 4):
        for column in (0, 4):
            block = picture[row : row + 4, column : column + 4].reshape(-1, 3)
            assert (block == block[0]).all()


def test_a_grid_that_does_not_hold_the_tokens_is_refused():
    with pytest.raises(ValueError, match="2 x 2 for 6 tokens"):
        principal_colours(np.zeros((1, 6, 8)), (2, 2), 8)
