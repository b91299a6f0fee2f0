"""Perceptual distance, discriminator, augmentation and losses of the decoder's training are the reference's."""

from __future__ import annotations

import hashlib
import math
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from train.models.discriminator import DinoConfig, DinoFeatures, Discriminator
from train.models.perceptual import Perceptual
from train.tasks.augmentation import NUM_COINS, NUM_DRAWS, augment
from train.tasks.losses import (
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradient_at,
    last_layer_gradients,
    pixel_loss,
    to_8_bit,
    to_symmetric,
)


@cache
def perceptual(seed):
    """LPIPS with weights drawn by the recordings' recipe."""
    draws = np.random.RandomState(seed)
    model = Perceptual()
    for conv in (layer for layer in model.features if isinstance(layer, nn.Conv2d)):
        out, inner = conv.weight.shape[:2]
        weight = draws.standard_normal((out, inner, 3, 3)) * np.sqrt(2 / (inner * 9))
        conv.weight.data = torch.from_numpy(weight.astype(np.float32))
        conv.bias.data = torch.from_numpy((0.05 * draws.standard_normal(out)).astype(np.float32))
    for index, channels in enumerate((64, 128, 256, 512, 512)):
        weight = np.abs(draws.standard_normal((1, channels, 1, 1))).astype(np.float32)
        model.get_parameter(f"lin{index}.model.1.weight").data = torch.from_numpy(weight)
    return model


def sha256(tensor):
    return hashlib.sha256(tensor.detach().numpy().tobytes()).hexdigest()


@pytest.mark.recorded("lpips*")
def test_perceptual_distance_and_its_gradient_equal_the_recorded_ones(case, assert_matches):
    model = perceptual(case.meta["seed"])
    assert sha256(model.features[0].weight) == case.meta["sha256_first_conv_weight"]
    assert sha256(model.features[28].bias) == case.meta["sha256_last_conv_bias"]
    one, other = case.tensors["a"], case.tensors["b"].requires_grad_()
    distances = model(one, other)
    distances.mean().backward()
    assert_matches(distances.detach(), case.tensors["none"].flatten(), what="none")
    assert_matches(distances.detach().mean(), case.tensors["mean"].squeeze(), what="mean")
    assert_matches(distances.detach().sum(), case.tensors["sum"].squeeze(), what="sum")
    assert_matches(other.grad, case.tensors["grad_b"], what="gradient")
    assert_matches((one - model.shift) / model.scale, case.tensors["scaled_a"], what="scaled")


@pytest.mark.recorded("gan_losses*")
def test_adversarial_losses_equal_the_recorded_ones(case, assert_matches):
    real, fake = case.tensors["logits_real"], case.tensors["logits_fake"]
    losses = {
        "hinge_d": discriminator_loss(real, fake, "hinge"),
        "vanilla_d": discriminator_loss(real, fake, "non-saturating"),
        "vanilla_g": generator_loss(fake),
    }
    for name, loss in losses.items():
        assert_matches(loss.mean(), case.tensors[f"{name}.mean"].squeeze(), what=f"{name} mean")
        total = loss.sum() * real.shape[1]
        assert_matches(total, case.tensors[f"{name}.sum"].squeeze(), what=f"{name} sum")


@pytest.mark.recorded("diffaug*")
def test_augmented_pictures_equal_the_recorded_ones_outside_of_holes(case, assert_matches):
    for name in (name.removesuffix(".out") for name in case.tensors if name.endswith(".out")):
        probability, cutout = (float(number) for number in name.removeprefix("prob").split("_cutout"))
        coins, draws = case.tensors[f"{name}.draw_policy"], case.tensors[f"{name}.draw_params"]
        out = augment(case.tensors["x"], coins[:NUM_COINS], draws[:NUM_DRAWS], probability=probability)
        # No published recipe cuts holes, and ours cannot: there, the recording is zero in all channels.
        expected = case.tensors[f"{name}.out"]
        kept = (
            (expected != 0).any(dim=1, keepdim=True)
            if cutout
            else torch.ones_like(expected[:, :1], dtype=torch.bool)
        )
        assert kept.float().mean() > 0.5
        assert_matches(out * kept, expected * kept, what=name)


def load_discriminator(meta, state):
    trunk = meta["trunk"]
    model = Discriminator(trunk["embed_dim"], len(trunk["key_depths"]) + 1, meta["ks"])
    model.load_state_dict(state, strict=True)
    return model


def load_features(meta, state):
    trunk = meta["trunk"]
    features = DinoFeatures(
        DinoConfig(
            patch_size=trunk["patch_size"],
            width=trunk["embed_dim"],
            depth=trunk["depth"],
            num_heads=trunk["num_heads"],
            mlp_ratio=trunk["mlp_ratio"],
            key_depths=tuple(trunk["key_depths"]),
        )
    )
    features.load_dino({key: value for key, value in state.items() if key not in ("x_scale", "x_shift")})
    return features


@pytest.mark.recorded("dino_disc*")
def test_features_logits_and_gradients_of_the_discriminator_equal_the_recorded_ones(case, assert_matches):
    features = load_features(case.meta, case.state_dict("sd_dino."))
    model = load_discriminator(case.meta, case.state_dict("sd_before.")).eval()
    fake, real = case.tensors["fake"].requires_grad_(), case.tensors["real"]
    for index, found in enumerate(features(fake.detach())):
        recorded = case.tensors[f"act_{index}"]
        assert_matches(found[..., : recorded.shape[-1]], recorded, what=f"features {index}")
    for name, images in (("fake", fake.detach()), ("real", real)):
        assert_matches(
            model(features(images)).detach(), case.tensors[f"eval.logits_{name}"], what=f"eval {name}"
        )

    model.train()
    logits_fake, logits_real = model(features(fake)), model(features(real))
    loss = discriminator_loss(logits_real, logits_fake).mean()
    loss.backward()
    assert_matches(logits_fake.detach(), case.tensors["train.logits_fake"], what="train fake")
    assert_matches(logits_real.detach(), case.tensors["train.logits_real"], what="train real")
    assert_matches(loss.detach(), case.tensors["train.hinge_d_loss"].squeeze(), what="loss")
    assert_matches(fake.grad, case.tensors["train.grad_fake"], what="gradient")
    for name, parameter in model.named_parameters():
        assert_matches(parameter.grad.norm(), case.meta["train_grad_norms"][name], what=name)
    after = case.state_dict("sd_after_train.")
    for name, value in model.state_dict().items():
        if name in after:
            assert_matches(value, after[name], what=f"{name} after training")


@pytest.mark.recorded("stage1_losses*")
def test_a_step_of_the_decoder_equals_the_recorded_one(case, decoder, recording, assert_matches):
    model = decoder(case).requires_grad_(True)
    dino = recording("dino_disc")
    features = load_features(dino.meta, dino.state_dict("sd_dino."))
    discriminator = load_discriminator(dino.meta, case.state_dict("sd_disc.")).eval()
    images = case.tensors["images"]

    pixels = model(case.tensors["z_tokens"])
    assert_matches(pixels.detach(), case.tensors["recon"], what="pixels")
    drawn = pixels.detach().requires_grad_()
    l1 = pixel_loss(drawn, images).mean()
    distance = perceptual(recording("lpips").meta["seed"])(to_symmetric(images), to_symmetric(drawn)).mean()
    adversarial = generator_loss(discriminator(features(to_symmetric(drawn)))).mean()
    reconstruction = l1 + case.meta["perceptual_weight"] * distance
    pull, push = gradient_at(drawn, reconstruction), gradient_at(drawn, adversarial)
    strength = adaptive_weight(*last_layer_gradients(pixels, model.last_weight, pull, push))
    weight = case.meta["disc_weight"] * strength
    torch.autograd.backward(pixels, pull + weight * push)
    assert_matches(l1.detach(), case.meta["rec_l1"], what="L1")
    assert_matches(distance.detach(), case.meta["lpips"], what="perceptual")
    assert_matches(adversarial.detach(), case.meta["gan"], what="adversarial")
    assert_matches(strength, case.meta["adaptive_weight"], what="adaptive weight")
    assert_matches((reconstruction + weight * adversarial).detach(), case.meta["total"], what="total")
    for name, parameter in model.named_parameters():
        assert_matches(parameter.grad.norm(), case.meta["grad_norms"][name], what=name)

    made = to_8_bit(to_symmetric(pixels.detach()))
    assert_matches(made, case.tensors["fake_quantised"], what="8-bit")
    fake, real = discriminator(features(made)), discriminator(features(to_symmetric(images)))
    assert_matches(fake.detach(), case.tensors["logits_fake"], what="logits fake")
    assert_matches(real.detach(), case.tensors["logits_real"], what="logits real")
    loss = discriminator_loss(real, fake).mean()
    assert_matches(loss.detach(), case.meta["hinge_d_loss_eval_mode"], what="discriminator")


def test_the_adaptive_weight_is_bounded():
    gradient = torch.ones(3)
    assert adaptive_weight(gradient, torch.zeros(3)) == 1e4
    assert math.isclose(adaptive_weight(gradient, 2 * gradient).item(), 0.5, rel_tol=1e-6)
