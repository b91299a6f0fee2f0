"""A step is queued on the device without waiting for it: the host never asks for, nor sends, a single number."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from train.engine.loop import Trainer
from train.models.discriminator import DINO_SIZES, DinoConfig, DinoFeatures
from train.randomness import compile_draws

# 22 images in batches of 8 are 2 steps an epoch: the adversary learns from the first step, and plays from the third.
ADVERSARIAL = (
    " --adversarial True --adversary.discriminator-start-epoch 0 --adversary.adversarial-start-epoch 1"
    " --adversary.kernel-size 3 --discriminator-weights "
)
# Checkpoints, pictures and lines of metrics wait for the device, as they must; none is due between the first and last.
QUIET = "--max-steps 6 --micro-batch-size 4 --checkpoint-every 100 --snapshot-every 100 --log-every 100"
WARM_UP = 4
"""Steps in which compilers and allocators may wait; the adversary has played in two of them."""


@pytest.fixture(params=["dit", "decoder", "adversarial"])
def trained(request, tmp_path, monkeypatch, train_here):
    """Trains a tiny run of each task; `trained()` returns the exit code."""
    trainer, more = request.param, ""
    if trainer == "adversarial":
        tiny = DinoConfig(patch_size=56, width=16, depth=2, num_heads=2, key_depths=(0, 1))
        monkeypatch.setitem(DINO_SIZES, "S_8", tiny)
        torch.save(DinoFeatures(tiny).vit.state_dict(), tmp_path / "dino.pth")
        trainer, more = "decoder", f"{ADVERSARIAL}{tmp_path}/dino.pth"
    return lambda other="": train_here(trainer, tmp_path / "run", f"{QUIET}{more} --compile False {other}")


ASKING = {"item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "new_tensor", "numpy"}
"""What copies a number from a CUDA device, or to it, and waits for the copy."""


class Refused(TorchFunctionMode):
    """Refuses functions of tensors by name, and choosing elements by a mask, of which the host asks how many."""

    def __init__(self, names):
        super().__init__()
        self.names = names

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        assert name not in self.names, f"a step called {name}"
        if name == "__getitem__":
            chosen = args[1] if isinstance(args[1], tuple) else (args[1],)
            assert all(getattr(index, "dtype", None) != torch.bool for index in chosen), (
                "a step chose by a mask"
            )
        return func(*args, **(kwargs or {}))


def watch(monkeypatch, enter):
    """Have every step after the warm-up run within a context; returns the list of those steps."""
    train_step, watched = Trainer.train_step, []

    def watching(self, *arguments):
        if self.step < WARM_UP:
            return train_step(self, *arguments)
        watched.append(self.step)
        with enter():
            return train_step(self, *arguments)

    monkeypatch.setattr(Trainer, "train_step", watching)
    return watched


def test_no_step_asks_a_tensor_for_a_number(trained, request, monkeypatch):
    # The adversary tosses its coins on the host.
    coins = {"__bool__"} if "adversarial" in request.node.name else set()
    watched = watch(monkeypatch, lambda: Refused(ASKING - coins))
    assert trained() == 0
    assert watched == [4, 5]


def test_neither_the_one_pass_nor_draws_as_they_are_compiled_ask_for_a_number(
    tmp_path, train_here, monkeypatch
):
    def not_compiled(function):
        return function

    # What is compiled is run as it is written.
    monkeypatch.setattr("train.engine.update.compile_function", not_compiled)
    monkeypatch.setattr("train.engine.launch.compile_draws", lambda compiler: compile_draws(not_compiled))
    watched = watch(monkeypatch, lambda: Refused(ASKING))
    try:
        assert train_here("dit", tmp_path / "run", f"{QUIET} --compile False --one-pass True") == 0
    finally:
        compile_draws(None)
    assert watched == [4, 5]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "more",
    ["", "--activation-checkpointing True", "--one-pass True"],
    ids=["kept", "recomputed", "one pass"],
)
def test_no_step_waits_for_the_device(trained, more, monkeypatch, waiting_is_an_error):
    watched = watch(monkeypatch, waiting_is_an_error)
    assert trained(more) == 0
    assert watched == [4, 5]
