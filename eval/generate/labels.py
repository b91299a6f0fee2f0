"""Which class sample i shows: a rule of i and the seed alone."""

from __future__ import annotations

import torch
from torch import Tensor

from eval.networks.transfer import to_device
from eval.settings import LabelRule
from shards import UsageError
from train.randomness import uniform


def labels_of(numbers: Tensor, classes: tuple[int, ...], rule: LabelRule, seed: int) -> Tensor:
    """Return the class of each sample.

    `equal`: sample i has `classes[i mod len(classes)]`, so every class is shown equally often, up to one, in
    any range of samples, and the consecutive parts of the Inception Score all hold every class. `random`:
    classes are drawn evenly.

    Args:
        numbers: Sample numbers int64 [B].
        classes: The classes to choose from.
        rule: How to choose.
        seed: Seed of the draw.

    Returns:
        int64 [B], on the device of `numbers`.
    """
    choices = to_device(torch.tensor(classes), numbers.device)
    if rule == "equal":
        return choices[numbers % len(classes)]
    drawn = (uniform(seed, "label", numbers).double() * len(classes)).long()
    return choices[drawn]


def chosen_classes(asked: tuple[int, ...], num_classes: int, *, labelled: bool = True) -> tuple[int, ...]:
    """Return the classes asked for, or all.

    Args:
        asked: Labels, or none.
        num_classes: Classes of the model, which is also the label that means no class.
        labelled: Whether the model was trained on images with labels. One trained without knows one class, whose
            label was always withheld.

    Raises:
        UsageError: One of them does not exist.
    """
    if not labelled:
        if asked:
            raise UsageError(
                f"--classes {' '.join(map(str, asked))}: this snapshot was trained without labels and knows "
                "no classes; leave "
                "the option out"
            )
        return (num_classes,)
    for label in asked:
        if not 0 <= label < num_classes:
            raise UsageError(f"a class must be 0 to {num_classes - 1} for this snapshot, got {label}")
    return asked or tuple(range(num_classes))
