"""DINOv3's weights in every layout: nothing of them is lost, and what does not fit is refused by name."""

import pytest
import torch
import transformers
from safetensors.torch import save_file
from timm.models.eva import checkpoint_filter_fn

from pipeline.encoders.dinov3_weights import dinov3_to_timm
from pipeline.encoders.encoder import create_encoder
from shards.errors import UsageError

WIDTH, DEPTH = 32, 2
NAME = "vit_small_patch16_dinov3_qkvb"
SIZE = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 2}


def original(*, gated: bool = False, seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict in the layout of DINOv3's own files."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator) * 0.2

    state = {
        "cls_token": draw(1, 1, WIDTH),
        "storage_tokens": draw(1, 4, WIDTH),
        "mask_token": draw(1, WIDTH),
        "patch_embed.proj.weight": draw(WIDTH, 3, 16, 16),
        "patch_embed.proj.bias": draw(WIDTH),
        "rope_embed.periods": 100 ** (torch.arange(4) / 4),
        "norm.weight": draw(WIDTH),
        "norm.bias": draw(WIDTH),
    }
    for block in range(DEPTH):
        stem = f"blocks.{block}"
        mask = torch.ones(3 * WIDTH)
        mask[WIDTH : 2 * WIDTH] = 0
        for norm in ("norm1", "norm2"):
            state |= {f"{stem}.{norm}.weight": draw(WIDTH), f"{stem}.{norm}.bias": draw(WIDTH)}
        state |= {f"{stem}.ls1.gamma": draw(WIDTH), f"{stem}.ls2.gamma": draw(WIDTH)}
        state |= {f"{stem}.attn.qkv.bias_mask": mask}
        hidden = 4 * WIDTH
        linear = {"attn.qkv": (3 * WIDTH, WIDTH), "attn.proj": (WIDTH, WIDTH)}
        if gated:
            linear |= {"mlp.w1": (hidden, WIDTH), "mlp.w2": (hidden, WIDTH), "mlp.w3": (WIDTH, hidden)}
        else:
            linear |= {"mlp.fc1": (hidden, WIDTH), "mlp.fc2": (WIDTH, hidden)}
        for name, shape in linear.items():
            state |= {f"{stem}.{name}.weight": draw(*shape), f"{stem}.{name}.bias": draw(shape[0])}
    return state


def in_transformers(state: dict[str, torch.Tensor], blocks: str) -> dict[str, torch.Tensor]:
    """The same under the names of transformers' DINOv3ViTModel, whose blocks are called `blocks`."""
    renamed = {
        "embeddings.cls_token": state["cls_token"],
        "embeddings.register_tokens": state["storage_tokens"],
        "embeddings.mask_token": state["mask_token"][None],
        "embeddings.patch_embeddings.weight": state["patch_embed.proj.weight"],
        "embeddings.patch_embeddings.bias": state["patch_embed.proj.bias"],
        "norm.weight": state["norm.weight"],
        "norm.bias": state["norm.bias"],
    }
    names = {"attn.proj": "attention.o_proj", "norm1": "norm1", "norm2": "norm2"}
    if "blocks.0.mlp.w1.weight" in state:
        names |= {"mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.up_proj", "mlp.w3": "mlp.down_proj"}
    else:
        names |= {"mlp.fc1": "mlp.up_proj", "mlp.fc2": "mlp.down_proj"}
    for block in range(DEPTH):
        own, other = f"blocks.{block}", f"{blocks}.{block}"
        for kind in ("weight", "bias"):
            for name, new in names.items():
                renamed[f"{other}.{new}.{kind}"] = state[f"{own}.{name}.{kind}"]
            parts = state[f"{own}.attn.qkv.{kind}"].chunk(3)
            for part, value in zip("qkv", parts, strict=True):
                if (part, kind) != ("k", "bias"):
                    renamed[f"{other}.attention.{part}_proj.{kind}"] = value.contiguous()
        for number in (1, 2):
            renamed[f"{other}.layer_scale{number}.lambda1"] = state[f"{own}.ls{number}.gamma"]
    return renamed


@pytest.fixture
def load(tmp_path):
    """An encoder with the weights of a state dict."""

    def build(state, name=NAME, **more):
        save_file(state, tmp_path / "weights.safetensors")
        arguments = {"input_size": 48, "model_args": SIZE, **more}
        return create_encoder(name, str(tmp_path / "weights.safetensors"), **arguments)

    return build


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_one_network_has_one_identity_in_every_layout(load, pixels):
    state = original()
    first = load(state)
    timm_state = {name: value.contiguous() for name, value in first.trunk.state_dict().items()}
    for other in (
        in_transformers(state, "layer"),
        in_transformers(state, "model.layer"),
        timm_state,
        {f"teacher.backbone.{name}": value for name, value in state.items()},
    ):
        encoder = load(other)
        assert encoder.identity == first.identity
        assert torch.equal(encoder.encode(pixels), first.encode(pixels))


@pytest.mark.parametrize("gated", [False, True])
def test_tokens_equal_those_of_transformers(load, pixels, gated):
    state = original(gated=gated)
    config = transformers.DINOv3ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=DEPTH,
        num_attention_heads=2,
        num_register_tokens=4,
        use_gated_mlp=gated,
        hidden_act="silu" if gated else "gelu",
    )
    model = transformers.DINOv3ViTModel(config).eval()
    blocks = "model.layer" if "model.layer.0.norm1.weight" in model.state_dict() else "layer"
    theirs = in_transformers(state, blocks)
    model.load_state_dict(theirs, strict=True)
    encoder = load(
        state,
        "vit_huge_plus_patch16_dinov3_qkvb" if gated else NAME,
    )
    with torch.no_grad():
        hidden = model(encoder.prepare(pixels)).last_hidden_state
    # Their last norm has the affine that tokens are taken without.
    expected = (hidden[:, 5:] - state["norm.bias"]) / state["norm.weight"]
    error = (encoder.encode(pixels) - expected).abs().max()
    assert error < 1e-4 * expected.abs().max()


def test_gated_networks_are_laid_out_as_timm_lays_them_out(load):
    state = original(gated=True)
    encoder = load(state, "vit_huge_plus_patch16_dinov3_qkvb")
    theirs = checkpoint_filter_fn(dict(state), encoder.trunk)
    ours = dinov3_to_timm(state)
    assert set(ours) - {"rope.periods"} == set(theirs) - {"norm.weight", "norm.bias"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if name != "rope.periods")


def test_biases_are_never_dropped_silently(load):
    with pytest.raises(UsageError, match="use --encoder vit_small_patch16_dinov3_qkvb") as refusal:
        load(original(), "vit_small_patch16_dinov3")
    assert "\n" not in str(refusal.value)
    plain = {name: value for name, value in original().items() if "qkv.bias" not in name}
    assert load(plain, "vit_small_patch16_dinov3").identity.width == WIDTH
    with pytest.raises(UsageError, match=r"hold none; use --encoder vit_small_patch16_dinov3$"):
        load(plain)


def test_a_bias_of_keys_is_refused_unless_the_file_masks_it(load):
    state = original()
    unmasked = {name: value for name, value in state.items() if not name.endswith("bias_mask")}
    with pytest.raises(UsageError, match="keys have no bias"):
        load(unmasked)


@pytest.mark.parametrize(
    ("periods", "complaint"),
    [
        (torch.ones(8), "rotary periods are of a head width of 32, not 16"),
        (torch.tensor([1.0, 2.0, float("nan"), 4.0]), "must be above 0"),
    ],
)
def test_periods_that_do_not_fit_are_refused(load, periods, complaint):
    with pytest.raises(UsageError, match=complaint):
        load(original() | {"rope_embed.periods": periods})


@pytest.mark.parametrize("size", [48, 80])
def test_periods_of_a_file_are_computed_with_at_every_size(load, size):
    state = original()
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(2))
    held = load(state | {"rope_embed.periods": 20 ** (torch.arange(4) / 4)}, input_size=size)
    without = {name: value for name, value in state.items() if name != "rope_embed.periods"}
    computed = load(without, input_size=size, model_args={**SIZE, "rope_temperature": 20.0})
    assert torch.equal(held.encode(pixels), computed.encode(pixels))
    assert not torch.equal(held.encode(pixels), load(state, input_size=size).encode(pixels))
    assert held.identity.weights_digest != load(state, input_size=size).identity.weights_digest


@pytest.mark.parametrize("size", [224, 256, 384, 512])
def test_every_input_size_has_its_rotary_table(load, size):
    """Also where timm has cached the table of the size it was built for."""
    state = {name: value for name, value in original().items() if not name.startswith("blocks.1")}
    encoder = load(state, input_size=size, model_args={**SIZE, "depth": 1})
    side = size // 16
    assert encoder.identity.grid == (side, side)
    pixels = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(3))
    tokens = encoder.encode(pixels)
    assert tokens.shape == (1, side * side, WIDTH)
    fixed = load(state, input_size=size, model_args={**SIZE, "depth": 1, "dynamic_img_size": False})
    assert torch.equal(fixed.encode(pixels), tokens)
