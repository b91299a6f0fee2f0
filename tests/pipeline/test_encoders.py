"""Encoders by name: what they leave out, where weights come from, and that a row depends on its own image only."""

import dataclasses
import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from pipeline.encoders.encoder import create_encoder, token_shape
from pipeline.encoders.families import IMAGENET_MEAN, family_of
from pipeline.encoders.recipes import RECIPES
from pipeline.encoders.weights import digest, resize_positions, to_timm_layout
from pipeline.settings.config import EncoderConfig
from shards.errors import UsageError, UserError

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 4}


@pytest.fixture
def pixels():
    """Pictures uint8 [5, 3, 40, 40]."""
    return torch.randint(
        0, 256, (5, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture
def dinov2_file(rae_fixtures, tmp_path):
    """The recorded DINOv2's weights as a HuggingFace folder, and the arguments of its size."""
    state = load_file(rae_fixtures / "encoder_dinov2.safetensors")
    state = {
        name.removeprefix("sd.encoder."): value for name, value in state.items() if name.startswith("sd.")
    }
    (tmp_path / "hf").mkdir()
    save_file(state, tmp_path / "hf" / "model.safetensors")
    return tmp_path / "hf", {**SMALL, "init_values": 1.0}


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 2e-5), ("bfloat16", 6e-2)])
def test_tokens_do_not_depend_on_batch_or_neighbours(pixels, precision, tolerance):
    encoder = create_encoder("test_vit", "random:0", input_size=32).to_device(torch.device("cpu"), precision)
    together = encoder.encode(pixels)
    alone = torch.cat([encoder.encode(picture[None]) for picture in pixels])
    backwards = encoder.encode(pixels.flip(0)).flip(0)
    assert (together - alone).abs().max() <= tolerance
    assert (together - backwards).abs().max() <= tolerance


def test_bytes_and_fractions_of_255_are_the_same_pixels(pixels):
    encoder = create_encoder("test_vit", "random:0", input_size=32)
    assert torch.equal(encoder.encode(pixels), encoder.encode(pixels.float() / 255))


@pytest.mark.parametrize("name", ["test_vit", "test_vit2", "test_vit3", "test_vit4"])
def test_tokens_are_normalised_without_affine_and_without_prefix(name, pixels):
    encoder = create_encoder(name, "random:0", input_size=48)
    tokens = encoder.encode(pixels)
    assert tokens.shape == (5, 9, encoder.identity.width)
    assert encoder.identity.grid == (3, 3)
    assert tokens.mean(-1).abs().max() < 1e-5
    assert (tokens.var(-1, unbiased=False) - 1).abs().max() < 1e-2
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_random_weights_are_those_of_their_seed_and_leave_the_generator_alone(pixels):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (create_encoder("test_vit", f"random:{seed}", input_size=32) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.identity == same.identity
    assert torch.equal(one.encode(pixels), same.encode(pixels))
    assert one.identity.id != other.identity.id
    assert one.identity.random_weights


@pytest.mark.parametrize(
    ("name", "size", "num_tokens", "eps", "mean", "activation"),
    [
        ("vit_small_patch14_reg4_dinov2", 224, 256, 1e-6, 0.485, "GELU"),
        ("vit_base_patch16_224.mae", 256, 256, 1e-12, 0.485, "GELU"),
        ("vit_base_patch16_siglip_256.v2_webli", 256, 256, 1e-6, 0.5, "GELUTanh"),
    ],
)
def test_the_reference_s_families_have_their_settings(name, size, num_tokens, eps, mean, activation):
    encoder = create_encoder(name, "random:0", model_args=SMALL)
    assert encoder.identity.input_size == size
    assert encoder.identity.num_tokens == num_tokens
    assert {module.eps for module in encoder.modules() if isinstance(module, torch.nn.LayerNorm)} == {eps}
    assert encoder.identity.preprocessing["mean"][0] == mean
    found = encoder.trunk.blocks[0].mlp.act
    assert type(found).__name__ == activation
    assert getattr(found, "approximate", "none") == "none" or activation == "GELUTanh"


def test_448_pixels_give_1024_tokens():
    encoder = create_encoder("vit_base_patch14_reg4_dinov2", "random:0", input_size=448, model_args=SMALL)
    assert encoder.identity.grid == (32, 32)


def test_one_network_has_one_digest_and_one_identity_in_every_layout(dinov2_file, tmp_path, pixels):
    folder, arguments = dinov2_file
    name = "vit_base_patch14_reg4_dinov2"
    first = create_encoder(name, str(folder), input_size=56, model_args=arguments)

    in_timm = to_timm_layout(load_file(folder / "model.safetensors"), class_position=False)
    save_file({key: value.contiguous() for key, value in in_timm.items()}, tmp_path / "timm.safetensors")
    original = dict(in_timm)
    original["register_tokens"] = original.pop("reg_token")
    class_position = torch.randn(1, 1, 48, generator=torch.Generator().manual_seed(1)) * 0
    original["pos_embed"] = torch.cat([class_position, original["pos_embed"]], dim=1)
    original |= {
        "mask_token": torch.zeros(1, 48),
        "norm.weight": torch.ones(48),
        "norm.bias": torch.zeros(48),
    }
    torch.save({"model": original}, tmp_path / "original.pth")

    for path in (folder / "model.safetensors", tmp_path / "timm.safetensors", tmp_path / "original.pth"):
        other = create_encoder(name, str(path), input_size=56, model_args=arguments)
        assert other.identity.id == first.identity.id
        assert torch.equal(other.encode(pixels), first.encode(pixels))


def test_pretrained_weights_come_from_the_hub_s_cache(monkeypatch, tmp_path, pixels):
    """A cache as huggingface_hub lays it out, with other weights than timm would draw."""
    torch.manual_seed(3)
    state = timm.create_model("test_vit", pretrained=False).state_dict()
    repository = tmp_path / "models--timm--test_vit.r160_in1k"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(state, repository / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("timm.models._hub._has_hf_hub", True)
    encoder = create_encoder("test_vit", "pretrained", input_size=96)
    kept = to_timm_layout(state, class_position=True)
    assert encoder.identity.weights_digest == digest(kept)
    assert encoder.identity.weights == "pretrained"
    shutil.rmtree(repository)
    with pytest.raises(UserError, match="--weights PATH"):
        create_encoder("test_vit", "pretrained")


@pytest.mark.parametrize(
    ("name", "arguments", "named"),
    [
        ("vit_base_patch14_reg4_dinov2", {"depth": 3}, "do not fit"),
        ("vit_base_patch14_reg4_dinov2", {"embed_dim": 64}, "do not fit"),
        ("vit_base_patch16_224.mae", {"init_values": None}, "do not fit"),
    ],
)
def test_weights_of_another_network_are_refused(dinov2_file, name, arguments, named):
    folder, size = dinov2_file
    with pytest.raises(UsageError, match=named):
        create_encoder(name, str(folder), model_args={**size, **arguments})


def test_a_file_of_weights_beside_their_average_is_refused(tmp_path):
    weights = {"w": torch.zeros(2)}
    torch.save({"state_dict": weights, "state_dict_ema": weights}, tmp_path / "both.pth")
    with pytest.raises(UsageError, match="holds state_dict and state_dict_ema beside each other"):
        create_encoder("test_vit", str(tmp_path / "both.pth"))


def test_weights_with_nan_are_refused_by_name(tmp_path):
    state = {name: value.contiguous() for name, value in timm.create_model("test_vit").state_dict().items()}
    state["blocks.0.attn.qkv.weight"][0, 0] = float("nan")
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=r"holds NaN or infinity in blocks\.0\.attn\.qkv\.weight"):
        create_encoder("test_vit", str(tmp_path))


def test_a_file_that_would_run_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return (print, ("trap",))

    torch.save({"model": Trap()}, tmp_path / "trap.pth")
    with pytest.raises(UsageError, match="holds more than plain tensors"):
        create_encoder("test_vit", str(tmp_path / "trap.pth"))


def test_resizing_positions_keeps_the_prefix_and_antialiases_only_when_told():
    positions = torch.randn(1, 1 + 49, 3, generator=torch.Generator().manual_seed(0))
    plain = resize_positions(positions, 4, num_prefix=1, antialias=False)
    smooth = resize_positions(positions, 4, num_prefix=1, antialias=True)
    assert plain.shape == (1, 17, 3)
    assert torch.equal(plain[:, :1], positions[:, :1])
    assert (plain - smooth).abs().max() > 0.05
    assert torch.equal(resize_positions(positions, 7, num_prefix=1, antialias=True), positions)


def test_the_recorded_key_tables_are_followed(rae_fixtures):
    table = json.loads((rae_fixtures / "encoder_hf_to_timm.json").read_text())["table"]
    measured = json.loads((rae_fixtures / "encoder_hf_to_timm.json").read_text())["measured"]
    assert set(table) == {"dinov2_with_registers", "mae", "siglip2"}
    assert (
        family_of("vit_base_patch14_reg4_dinov2").norm_eps == measured["dinov2_with_registers"]["hf_ln_eps"]
    )
    assert family_of("vit_base_patch16_224.mae").norm_eps == measured["mae"]["hf_ln_eps"]
    for name, record in measured["siglip2"].items():
        assert family_of(name).model_args == {"act_layer": "gelu_tanh"}
        assert record["hf_act"] == "gelu_pytorch_tanh"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"input_size": 0}, "--input-size must be at least 1, got 0"),
        ({"model_args": {"patch_size": 0}}, "cannot be built for inputs of 160 and patch_size=0: "),
        (
            {"weights": "random:99999999999999999999999"},
            "--weights random:SEED needs a whole number of at most",
        ),
        ({"weights": "random:²"}, "--weights random:SEED needs a whole number"),
    ],
)
def test_settings_that_no_encoder_can_have_are_refused_in_one_line(arguments, complaint):
    with pytest.raises(UsageError, match=complaint) as refusal:
        create_encoder("test_vit", **{"weights": "random:0", **arguments})
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (
            {"layers": (1, 12)},
            "--layers must be within the 12 blocks of --encoder test_vit3, 0 to 11, got 12",
        ),
        ({"layers": (5, 2)}, "--layers must name each block once, in ascending order, got 5,2; use 2,5"),
        ({"layers": (2, 2)}, "got 2,2; use 2$"),
        ({"combination": "sum"}, "--combination must be one of mean, mean.spatial-mean, got sum"),
    ],
)
def test_blocks_that_cannot_be_combined_are_refused_in_one_line(arguments, complaint):
    with pytest.raises(UsageError, match=complaint) as refusal:
        create_encoder("test_vit3", "random:0", model_args={"depth": 12}, **arguments)
    assert "\n" not in str(refusal.value)


def test_combined_blocks_are_part_of_the_identity(pixels):
    """And one block without a spatial mean is what the encoder is without being asked, under the same identity."""

    def encoder(**more):
        return create_encoder("test_vit3", "random:0", input_size=32, model_args={"depth": 4}, **more)

    plain, last = encoder(), encoder(layers=(3,))
    assert plain.identity == last.identity
    several = encoder(layers=(0, 3))
    spatial = encoder(layers=(0, 3), combination="mean+spatial-mean")
    single = encoder(layers=(3,), combination="mean+spatial-mean")
    assert len({e.identity.id for e in (plain, several, spatial, single)}) == 4
    (first,) = (encoder(layers=(0,)).encode(pixels),)
    both = (first + plain.encode(pixels)) / 2
    assert (several.encode(pixels) - both).abs().max() < 1e-6
    mean = plain.encode(pixels).mean(dim=1, keepdim=True)
    assert (spatial.encode(pixels) - both - mean).abs().max() < 1e-6
    assert (single.encode(pixels) - plain.encode(pixels) - mean).abs().max() < 1e-6


def test_an_encoder_of_earlier_versions_keeps_its_identity():
    """As version 0.1.0 had it; the digest of the weights is left out, because random draws are torch's own."""
    identity = create_encoder(
        "vit_small_patch16_dinov3_qkvb", "random:0", model_args={"depth": 1, "embed_dim": 32, "num_heads": 2}
    ).identity
    assert dataclasses.replace(identity, weights_digest="").id == "aba10fc4e91d881819dafad9db5138d2"


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_named_recipes_are_networks_of_timm_with_those_blocks(name):
    recipe = RECIPES[name]
    width = {"model_args": {"embed_dim": 32, "num_heads": 2}}
    encoder = create_encoder(name, "random:0", **width)
    assert encoder.identity.num_tokens == 256
    if recipe.layers is None:
        assert encoder.identity.aggregation is None
    else:
        assert encoder.identity.aggregation == {
            "layers": list(recipe.layers),
            "combination": recipe.combination,
        }
    assert encoder.identity.preprocessing["mean"] == list(IMAGENET_MEAN)
    assert ("with its affine" in encoder.identity.final_norm) == ("siglip" in name)


def test_recipes_take_no_other_blocks():
    with pytest.raises(
        UsageError, match="names its layers, 2,5,8,11, and --layers others; use --encoder vit_base"
    ):
        create_encoder("raev2-dinov2-b-k4", "random:0", layers=(1, 2))
    with pytest.raises(UsageError, match="is no recipe; the recipes are raev2-dinov3-l-k1"):
        create_encoder("raev2-dinov3-l-k9", "random:0")


@pytest.mark.parametrize(
    ("name", "size", "width"),
    [
        ("vit_giant_patch14_reg4_dinov2", 224, 1536),
        ("vit_so400m_patch14_siglip_224.v2_webli", 224, 1152),
        ("vit_large_patch16_224.mae", 256, 1024),
        ("vit_huge_patch14_224.mae", 224, 1280),
        ("vit_large_patch16_dinov3_qkvb", 256, 1024),
    ],
)
def test_every_family_gives_256_tokens_of_any_of_its_networks(name, size, width):
    assert token_shape(name) == (16, 16, width)
    assert family_of(name).input_size(name) == size


@pytest.mark.parametrize(
    ("asked", "recorded"), [("fp32", "float32"), ("bf16", "bfloat16"), ("bfloat16", "bfloat16")]
)
def test_precisions_are_named_as_by_the_trainers_and_recorded_as_ever(asked, recorded):
    assert EncoderConfig(precision=asked).precision == recorded


@pytest.mark.parametrize(
    "name",
    [
        "vit_giant_patch14_reg4_dinov2",
        "vit_so400m_patch14_siglip_224.v2_webli",
        "vit_large_patch16_224.mae",
        "vit_large_patch16_dinov3_qkvb",
    ],
)
def test_files_in_timm_s_layout_load_whatever_else_they_hold(name, tmp_path):
    """Heads and pooling are left out; of the same weights, layout and place do not matter."""
    small = {"embed_dim": 48, "depth": 2, "num_heads": 4}
    torch.manual_seed(0)
    native = timm.create_model(name.partition(".")[0], img_size=64 if "16" in name else 56, **small)
    with torch.no_grad():
        for parameter in native.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_file(native.state_dict(), tmp_path / "model.safetensors")
    size = native.patch_embed.img_size[0]
    encoder = create_encoder(name, str(tmp_path), input_size=size, model_args=small)
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = native.eval().forward_intermediates(
            encoder.prepare(pixels), indices=[1], output_fmt="NLC", intermediates_only=True
        )[0]
    normed = torch.nn.functional.layer_norm(expected, (48,), eps=family_of(name).norm_eps)
    # The family's eps and GELU are the reference's, timm's own differ a little.
    assert (encoder.encode(pixels) - normed).abs().max() < 5e-3
