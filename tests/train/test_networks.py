"""A network's configuration follows from its settings and the store, or is refused."""

from __future__ import annotations

import dataclasses

import pytest

from shards.errors import UsageError
from shards.reading.store import open_store
from train.models.config import DiTConfig, DiTDHConfig
from train.settings.networks import LEAST_HEAD_WIDTH, LEAST_WIDTH, decoder_config, dit_config, widest_layer
from train.settings.presets import decoder_settings, dit_settings


@pytest.fixture
def store(store_path):
    return open_store(store_path)


def test_the_tiny_presets_take_everything_from_the_store(store):
    wide = dit_config(dit_settings("dit-dh-tiny").model, store)
    assert isinstance(wide, DiTDHConfig)
    assert (wide.token_width, wide.grid, wide.num_classes, wide.head_width) == (
        8,
        (4, 4),
        3,
        LEAST_HEAD_WIDTH,
    )
    plain = dit_config(dit_settings("dit-tiny").model, store)
    assert isinstance(plain, DiTConfig)
    assert widest_layer(plain) == LEAST_WIDTH
    decoder = decoder_config(decoder_settings("decoder-tiny").model, store)
    assert (decoder.patch_size, decoder.image_size, decoder.pixel_mean) == (8, (32, 32), (0.5, 0.5, 0.5))


def test_auto_widths_grow_with_the_tokens(tmp_path, make_store):
    store = open_store(make_store(tmp_path / "store", num_images=3, width=300))
    assert dit_config(dit_settings("dit-dh-tiny").model, store).head_width == 304
    assert widest_layer(dit_config(dit_settings("dit-tiny").model, store)) == 304


def test_a_preset_for_another_grid_is_refused_with_the_way_out(store):
    with pytest.raises(UsageError, match=r"--model\.grid None"):
        dit_config(dit_settings("dit-dh-s-256").model, store)
    model = dataclasses.replace(dit_settings("dit-dh-s-256").model, grid=None)
    assert dit_config(model, store).grid == (4, 4)


def test_a_decoder_whose_patches_do_not_make_the_image_is_refused(store):
    with pytest.raises(UsageError, match="64×64 pixels, but the store's images have 32×32"):
        decoder_config(decoder_settings("decoder-b").model, store)
