"""The flat compressor, its loss and its updates are FlatDINO's, from its own parameter trees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from train.distributed import Team
from train.engine.feed import MicroBatch
from train.engine.loop import Trainer
from train.engine.lr import learning_rate
from train.engine.signals import StopRequest
from train.engine.task import Losses, Task
from train.models.build import build_model
from train.models.config import config_from_dict, config_to_dict
from train.models.cost import flat_half_flops
from train.models.flat import FlatHalf, Posterior
from train.models.flat_config import FLAT_SIZES, FlatConfig, FlatHalfConfig
from train.settings.config import DiTNetwork, DiTSettings, OptimizerSettings
from train.tasks.flat_loss import FlatLoss, flat_terms


@pytest.fixture(params=["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def called(request):
    """The function as it is, or compiled."""
    return (lambda f: f) if request.param == "eager" else (lambda f: torch.compile(f, fullgraph=True))


@pytest.fixture
def network(flat_layout):
    def build(case, half):
        model = build_model(flat_layout.compressor(case.meta["config"]))
        getattr(model, half).load_state_dict(flat_layout.state(case.state_dict("sd.")))
        return model

    return build


@pytest.mark.recorded("flat_encoder*")
def test_latents_are_the_recorded_ones(case, network, called, assert_matches):
    model, tensors = network(case, "encoder"), case.tensors
    with torch.no_grad():
        whole = called(model.encoder.whole)(tensors["tokens"])
        posterior = called(model.posterior)(tensors["tokens"])
        assert_matches(whole, tensors["encoder_out"], case.tolerance, "whole output")
        assert_matches(posterior.mean, tensors["mu"], case.tolerance, "mean")
        assert_matches(posterior.log_variance, tensors["logvar"], case.tolerance, "log variance")
        assert_matches(model.encode(tensors["tokens"]), tensors["z_deterministic"], case.tolerance)
        assert_matches(model.latents(posterior, tensors["eps"]), tensors["z"], case.tolerance, "drawn")


@pytest.mark.recorded("flat_decoder*")
def test_tokens_are_the_recorded_ones(case, network, called, assert_matches):
    model, tensors = network(case, "decoder"), case.tensors
    with torch.no_grad():
        assert_matches(called(model.decode)(tensors["z"]), tensors["tokens"], case.tolerance, "tokens")
        if "tokens_intermediate" in tensors:
            inner = model.decoder(tensors["z"])[..., model.config.token_width :]
            assert_matches(inner, tensors["tokens_intermediate"], case.tolerance, "inner layer")


@pytest.mark.recorded("flat_encoder*", "flat_decoder*", having="mid.")
def test_parts_of_a_half_put_out_the_recorded_values(case, network, flat_layout, assert_matches):
    half = "encoder" if "encoder" in case.meta["fixture"] else "decoder"
    model = getattr(network(case, half), half)
    wanted = case.state_dict("mid.")
    names = {"att_norm": "norm1", "attention": "attn", "mlp_norm": "norm2"}
    seen = {}
    for theirs in wanted:
        ours = ".".join(names.get(part, part) for part in theirs.split("."))
        model.get_submodule(ours).register_forward_hook(
            lambda _module, _args, out, theirs=theirs: seen.__setitem__(theirs, out)
        )
    with torch.no_grad():
        model(case.tensors["tokens" if half == "encoder" else "z"])
    for name, value in wanted.items():
        assert_matches(seen[name], value, case.tolerance, name)


@pytest.mark.recorded("flat_encoder*", "flat_decoder*", having="grad_norms_of")
def test_gradients_of_a_half_have_the_recorded_norms(case, network, flat_layout, assert_matches):
    encodes = "encoder" in case.meta["fixture"]
    model, tensors = network(case, "encoder" if encodes else "decoder"), case.tensors
    if encodes:
        posterior = model.posterior(tensors["tokens"])
        z = model.latents(posterior, tensors["eps"])
        loss = (z - z.flip(0)).square().mean() + (posterior.mean.flip(2) * posterior.log_variance).mean()
    else:
        # With an inner layer the scalar is of the tokens alone.
        tokens = model.decode(tensors["z"])
        loss = (tokens - tokens.flip(1)).square().mean() + (tokens.flip(2) * tokens.flip(0)).mean()
    assert_matches(loss.detach(), case.meta["scalar_loss"], case.tolerance, "scalar")
    loss.backward()
    half = model.encoder if encodes else model.decoder
    gradients = {name: p.grad for name, p in half.named_parameters() if p.grad is not None}
    wanted = case.meta["grad_norms_of_scalar_loss"]
    for key, norm in wanted.items():
        found = flat_layout.part(key, gradients, tree=wanted).norm()
        assert found.item() == pytest.approx(norm, rel=10 * case.tolerance, abs=case.tolerance), key


def terms_of(case, model, tensors):
    meta = case.meta
    weights = FlatLoss(
        reconstruction_weight=meta["recon_weight"],
        kl_weight=meta["kl_weight"],
        free_bits=meta.get("free_bits", 0.0),
        kl_variance_weight=meta.get("kl_var_weight", 0.0),
        inner_weight=meta.get("intermediate_weight", 1.0),
    )
    posterior, made = model(tensors["tokens"], tensors["eps"])
    inner = tensors.get("tokens_intermediate")
    terms = flat_terms(
        posterior, made, tensors["tokens"], config=model.config, weights=weights, inner_tokens=inner
    )
    return terms, posterior, made


def whole_network(case, flat_layout, prefix):
    model = build_model(flat_layout.compressor(case.meta["config"]))
    model.load_state_dict(flat_layout.state(case.state_dict(prefix)))
    return model


@pytest.mark.recorded("flat_loss*", having="metrics")
def test_every_term_of_the_loss_and_its_gradient_are_the_recorded_ones(case, flat_layout, assert_matches):
    model, metrics = whole_network(case, flat_layout, "sd."), case.meta["metrics"]
    terms, posterior, made = terms_of(case, model, case.tensors)
    assert_matches(posterior.mean, case.tensors["mu"], what="mean")
    width = model.config.token_width
    assert_matches(made[..., :width], case.tensors["reconstruction"], what="reconstruction")
    for ours, theirs in {
        "loss": case.meta["loss"],
        "huber": metrics["recon_loss"],
        "inner_huber": metrics["intermediate_loss"],
        "kl": metrics["kl_loss"],
        "kl_variance": metrics["kl_variance"],
        "mse": metrics["recon_mse"],
    }.items():
        assert_matches(getattr(terms, ours).mean().detach(), theirs, what=ours)
    terms.loss.mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    wanted = case.meta["grad_norms"]
    for key, norm in wanted.items():
        assert_matches(flat_layout.part(key, gradients, tree=wanted).norm(), norm, what=key)
    total = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert_matches(total, case.meta["global_grad_norm"], what="norm of all")


class RecordedCompression(Task):
    """The loss of recorded tokens with recorded draws."""

    config = None

    def __init__(self, case, model):
        self.case, self.model = case, model

    def losses(self, model, batch):
        number = int(batch.positions[0])
        tensors = {name: self.case.tensors[name][number] for name in ("tokens", "eps")}
        terms, _, _ = terms_of(self.case, model, tensors)
        return Losses(terms.loss, {})

    def describe(self, positions):
        return ""

    def save_snapshot(self, path, weights, *, step, ema_rate, write=True):
        raise AssertionError

    render_samples = save_snapshot


def scheduled(values):
    """Our settings of a recorded schedule, with one step an epoch."""
    return OptimizerSettings(
        lr=values["lr_peak"],
        start_lr=values["lr_start"],
        final_lr=values["lr_final"],
        schedule="warmup-stable-decay",
        hold_epochs=values["warmup_steps"],
        decay_start_epoch=values["total_updates"] - values["decay_steps"],
        decay_end_epoch=values["total_updates"],
        betas=(0.9, 0.999),
        weight_decay=0.02,
        decay_matrices_only=True,
        clip_norm=10.0,
    )


@pytest.mark.recorded("flat_loss*", having="learning_rate_in_force")
def test_updates_give_the_recorded_losses_norms_rates_and_weights(
    case, flat_layout, tmp_path, assert_matches
):
    meta, micro = case.meta, case.meta["micro_batches_per_step"]
    size = case.tensors["tokens"].shape[1]
    model = whole_network(case, flat_layout, "sd_init.")
    settings = DiTSettings(
        model=DiTNetwork(width=8, depth=1, num_heads=1),
        out=tmp_path,
        global_batch_size=micro * size,
        ema_rates=(0.0,),
        precision="fp32",
        optimizer=scheduled(meta["schedule"]),
    )
    trainer = Trainer(RecordedCompression(case, model), settings, Team(), steps_per_epoch=1, facts={})
    nothing = np.zeros(size, np.int64)
    for step, rate in enumerate(meta["learning_rate_in_force"]):
        batches = [
            MicroBatch(
                step=step,
                rows=nothing,
                positions=torch.full((size,), number),
                labels=torch.from_numpy(nothing),
                fields={},
                last_of_step=number == micro * (step + 1) - 1,
            )
            for number in range(micro * step, micro * (step + 1))
        ]
        result = trainer.train_step(iter(batches), StopRequest()).read()
        assert not result.skipped
        total, weight = result.metrics["loss"]
        losses = meta["loss_per_micro_batch"][micro * step : micro * (step + 1)]
        assert total / weight == pytest.approx(sum(losses) / micro, rel=1e-5)
        if micro == 1:
            wanted = meta["global_grad_norm_before_clipping_per_micro_batch"][step]
            assert result.gradient_norm == pytest.approx(wanted, rel=1e-4)
        found = trainer.optimizer.param_groups[0]["lr"]
        assert found == pytest.approx(rate, abs=3e-7 * meta["schedule"]["lr_peak"])
        trainer.step += 1
    for name, value in flat_layout.state(case.state_dict("sd_final.")).items():
        assert torch.allclose(model.state_dict()[name], value, rtol=0, atol=5e-5), name


@pytest.mark.recorded("flat_lr_schedule*")
def test_every_recorded_rate_of_the_compressor(case):
    for name, table in case.meta["tables"].items():
        if "warmup_steps" not in table or "decay_steps" not in table:
            continue
        defaults = {"lr_start": 1e-6, "lr_peak": 1e-4, "lr_final": 1e-8}
        settings = scheduled({**defaults, **table})
        for step, lr in table["lr"].items():
            assert learning_rate(int(step), 1, settings) == pytest.approx(lr, abs=3e-7 * settings.lr), (
                name,
                step,
            )
    for name, table in case.meta["tiny_schedules"].items():
        for step, lr in enumerate(table["lr_at_optimizer_step"]):
            found = learning_rate(step, 1, scheduled(table))
            assert found == pytest.approx(lr, abs=3e-7 * table["lr_peak"]), (name, step)


@pytest.mark.recorded("flat_lr_schedule*")
def test_the_weight_of_the_kl_follows_from_the_shape_of_the_latents(case):
    half = FlatHalfConfig(width=8, depth=1, num_heads=1, mlp_width=8)
    for name, weight in case.meta["default_kl_weight"].items():
        latents, width = map(int, name.split("x"))
        config = FlatConfig(
            num_tokens=4, token_width=8, num_latents=latents, latent_width=width, encoder=half, decoder=half
        )
        assert FlatLoss().weight_of_kl(config) == pytest.approx(weight, rel=1e-12), name


@pytest.mark.recorded("flat_shapes*")
def test_full_size_halves_have_the_published_keys_shapes_parameters_and_flops(case, flat_layout):
    networks = {k: v for k, v in case.meta["networks"].items() if k.startswith("compressor")}
    assert networks
    for name, values in networks.items():
        half, _, experiment = name.removeprefix("compressor_").partition(" ")
        _, latents, sizes, width = experiment.split("-")[:4]
        tokens = values["shapes_one_block"]["reg_tokens"][1] if half == "decoder" else values["input"][0]
        channels = values["input"][1] if half == "encoder" else 768
        config = FlatConfig(
            num_tokens=tokens,
            token_width=channels,
            num_latents=int(latents),
            latent_width=int(width),
            encoder=FlatHalfConfig(**FLAT_SIZES[sizes[0]]._asdict()),
            decoder=FlatHalfConfig(**FLAT_SIZES[sizes[1]]._asdict()),
        )
        assert config_from_dict(config_to_dict(config)) == config
        shape = getattr(config, f"{half}_shape")
        with torch.device("meta"):
            network = FlatHalf(shape)
        assert sum(p.numel() for p in network.parameters()) == values["parameters"], name
        assert flat_half_flops(shape) == values["forward_flops_batch1"], name
        theirs = {
            key.replace("{i}", str(i)): torch.empty(size, device="meta")
            for key, size in values["shapes_one_block"].items()
            for i in range(shape.config.depth if "{i}" in key else 1)
        }
        assert len(theirs) == values["keys"], name
        ours = {key: value.shape for key, value in network.state_dict().items()}
        assert ours == {k: v.shape for k, v in flat_layout.state(theirs).items()}, name


def test_weights_start_as_normals_cut_at_two_deviations():
    half = FlatHalfConfig(width=64, depth=1, num_heads=4, mlp_width=128)
    torch.manual_seed(0)
    model = build_model(
        FlatConfig(num_tokens=64, token_width=32, num_latents=32, latent_width=8, encoder=half, decoder=half)
    )
    for name in ("encoder.blocks.0.attn.qkv.weight", "decoder.queries", "decoder.pos_embed"):
        values = model.get_parameter(name).detach()
        assert values.abs().max() <= 0.04
        # A normal of deviation 0.02 cut at 0.04 and not rescaled.
        assert values.std().item() == pytest.approx(0.0176, rel=0.05)
    assert model.encoder.blocks[0].attn.qkv.bias.abs().max() == 0
    assert torch.equal(model.encoder.norm.weight, torch.ones(64))


def test_a_mean_without_noise_is_what_a_store_keeps():
    posterior = Posterior(torch.full((1, 2, 3), 0.5), torch.zeros(1, 2, 3))
    half = FlatHalfConfig(width=8, depth=1, num_heads=1, mlp_width=8)
    model = build_model(
        FlatConfig(num_tokens=4, token_width=8, num_latents=2, latent_width=3, encoder=half, decoder=half)
    )
    assert torch.equal(model.latents(posterior), posterior.mean)
