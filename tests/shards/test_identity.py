import dataclasses

import pytest

from shards.errors import IdentityMismatchError
from shards.metadata.identity import EncoderIdentity, Recipe

ENCODER = EncoderIdentity(
    name="vit",
    weights="pretrained",
    weights_digest="ab" * 32,
    preprocessing={"mean": [0.5, 0.5, 0.5]},
    input_size=8,
    grid=(2, 2),
    width=4,
    prefix_tokens=1,
    final_norm="layernorm-no-affine",
)
RECIPE = Recipe(
    encoder=ENCODER,
    source_digest="cd" * 16,
    num_images=9,
    num_shards=2,
    seed=0,
    views=("center",),
    image_size=8,
)


def test_the_same_weights_by_name_or_from_a_file_are_one_encoder():
    from_file = dataclasses.replace(ENCODER, weights="model.safetensors")
    assert from_file.id == ENCODER.id
    assert from_file.diff(ENCODER) == []
    assert dataclasses.replace(RECIPE, encoder=from_file).id == RECIPE.id


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "other"),
        ("weights_digest", "ee" * 32),
        ("preprocessing", {"mean": [0.4, 0.5, 0.5]}),
        ("input_size", 16),
        ("grid", (4, 1)),
        ("width", 5),
        ("prefix_tokens", 0),
        ("final_norm", "none"),
    ],
)
def test_whatever_decides_about_tokens_is_in_both_identities_and_named(field, value):
    other = dataclasses.replace(ENCODER, **{field: value})
    recipe = dataclasses.replace(RECIPE, encoder=other)
    assert other.id != ENCODER.id
    assert recipe.id != RECIPE.id
    assert len(RECIPE.diff(recipe)) == 1
    assert RECIPE.diff(recipe)[0].startswith(f"encoder.{field}")
    with pytest.raises(IdentityMismatchError, match=f"the snapshot belongs to another encoder: {field}"):
        ENCODER.require_same(other, what="the snapshot")


@pytest.mark.parametrize(
    ("field", "value"),
    [("seed", 1), ("num_shards", 3), ("views", ("center", "flip")), ("dtype", "float32"), ("image_size", 0)],
)
def test_whatever_decides_about_bytes_is_in_the_recipe_and_named(field, value):
    other = dataclasses.replace(RECIPE, **{field: value})
    assert other.id != RECIPE.id
    assert [line.split(" ")[0] for line in RECIPE.diff(other)] == [field]


def test_identities_survive_json():
    assert EncoderIdentity.from_dict(ENCODER.to_dict()) == ENCODER
    assert Recipe.from_dict(RECIPE.to_dict()) == RECIPE
