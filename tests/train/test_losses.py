"""The balanced backward pass is the plain one; augmentation's edges."""

from __future__ import annotations

import torch

from train.tasks.augmentation import NUM_COINS, NUM_DRAWS, augment
from train.tasks.losses import adaptive_weight, gradient_at, last_layer_gradients, to_8_bit


def test_the_balanced_backward_pass_gives_the_gradients_of_the_written_out_loss():
    torch.manual_seed(0)
    first, last = torch.nn.Linear(4, 6).double(), torch.nn.Linear(6, 3).double()
    x, target = torch.randn(8, 4).double(), torch.randn(8, 3).double()
    gradients = []
    for balanced in (False, True):
        for layer in (first, last):
            layer.zero_grad()
        pixels = last(first(x).tanh())
        reconstruction, adversarial = (pixels - target).abs().mean(), -(pixels**3).mean()
        if balanced:
            drawn = pixels.detach().requires_grad_()
            pull = gradient_at(drawn, (drawn - target).abs().mean(dim=1), scale=1 / 8)
            push = gradient_at(drawn, -(drawn**3).mean(dim=1), scale=1 / 8)
            balance = adaptive_weight(*last_layer_gradients(pixels, last.weight, pull, push))
            torch.autograd.backward(pixels, pull + 0.75 * balance * push)
        else:
            parts = [
                torch.autograd.grad(loss, last.weight, retain_graph=True)[0]
                for loss in (reconstruction, adversarial)
            ]
            strength = adaptive_weight(*parts)
            total = reconstruction + 0.75 * strength * adversarial
            total.backward()
        gradients.append([p.grad.clone() for layer in (first, last) for p in layer.parameters()])
    assert torch.allclose(balance, strength)
    assert all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True))


def test_eight_bit_pictures_have_256_levels_and_stay_in_range():
    made = to_8_bit(torch.linspace(-1.5, 1.5, 10_001))
    assert len(made.unique()) == 256
    assert (made.min(), made.max()) == (-1, 1)
    assert torch.allclose(to_8_bit(made), made)


def test_no_augmentation_at_probability_zero():
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(
        augment(images, torch.zeros(NUM_COINS), torch.rand(NUM_DRAWS, 2), probability=0.0), images
    )


def test_augmentation_passes_gradients_and_treats_pictures_apart():
    images = torch.randn(2, 3, 16, 16, requires_grad=True)
    draws = torch.rand(NUM_DRAWS, 2)
    out = augment(images, torch.zeros(NUM_COINS), draws)
    alone = augment(images[1:], torch.zeros(NUM_COINS), draws[:, 1:])
    assert torch.allclose(out[1:], alone)
    out.square().sum().backward()
    assert images.grad.any()
