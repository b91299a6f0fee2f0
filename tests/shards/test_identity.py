import dataclasses

import pytest

from shards.errors import IdentityMismatchError, StoreDamagedError
from shards.metadata.identity import CompressorIdentity, EncoderIdentity, Recipe

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


COMPRESSOR = CompressorIdentity(
    source=ENCODER,
    source_dtype="float16",
    source_code=None,
    name="flat-vae",
    config={"num_latents": 2, "encoder": {"width": 8}},
    weights_digest="ef" * 32,
    value="mean",
    precision="float32",
)
LATENTS = dataclasses.replace(ENCODER, name="flat", grid=(1, 2), width=3, compressor=COMPRESSOR)


def test_an_encoder_without_a_compressor_is_written_and_named_as_ever():
    assert "compressor" not in ENCODER.to_dict()
    assert ENCODER.positions == "grid"
    assert EncoderIdentity.from_dict(ENCODER.to_dict()) == ENCODER


def test_latents_say_what_made_them_and_of_what():
    assert EncoderIdentity.from_dict(LATENTS.to_dict()) == LATENTS
    assert LATENTS.positions == "sequence"
    pooled = dataclasses.replace(COMPRESSOR, name="pool")
    assert dataclasses.replace(LATENTS, compressor=pooled).positions == "grid"
    assert RECIPE.from_dict(dataclasses.replace(RECIPE, encoder=LATENTS).to_dict()).encoder == LATENTS
    other = dataclasses.replace(COMPRESSOR, weights_digest="aa" * 32)
    with pytest.raises(IdentityMismatchError, match=r"compressor\.weights_digest is 'efef"):
        LATENTS.require_same(dataclasses.replace(LATENTS, compressor=other), what="the field")
    # Where the source's weights came from decides nothing, here as there.
    renamed = dataclasses.replace(COMPRESSOR, source=dataclasses.replace(ENCODER, weights="file"))
    assert dataclasses.replace(LATENTS, compressor=renamed).id == LATENTS.id
    assert dataclasses.replace(LATENTS, compressor=None).id != LATENTS.id


def test_unknown_keys_of_a_compressor_are_refused():
    values = LATENTS.to_dict()
    values["compressor"]["more"] = 1
    with pytest.raises(StoreDamagedError, match="CompressorIdentity must have exactly the keys"):
        EncoderIdentity.from_dict(values)


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
