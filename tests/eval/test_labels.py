"""Labels by sample number."""

import pytest
import torch

from eval.generate.labels import chosen_classes, labels_of
from shards.errors import UsageError


def test_equal_labels_go_round_so_that_any_range_is_balanced():
    found = labels_of(torch.arange(10), (4, 7, 1), "equal", seed=0)
    assert found.tolist() == [4, 7, 1, 4, 7, 1, 4, 7, 1, 4]


def test_random_labels_depend_on_seed_and_number_alone():
    numbers = torch.arange(3000)
    found = labels_of(numbers, tuple(range(10)), "random", seed=1)
    assert torch.equal(found[500:700], labels_of(numbers[500:700], tuple(range(10)), "random", seed=1))
    assert not torch.equal(found, labels_of(numbers, tuple(range(10)), "random", seed=2))
    counts = torch.bincount(found, minlength=10)
    # 300 each; six deviations of a binomial count.
    assert (counts - 300).abs().max() < 6 * (3000 * 0.1 * 0.9) ** 0.5


def test_classes_default_to_all_and_must_exist():
    assert chosen_classes((), 3) == (0, 1, 2)
    assert chosen_classes((2, 0), 3) == (2, 0)
    with pytest.raises(UsageError, match="0 to 2 for this snapshot, got -1"):
        chosen_classes((-1,), 3)


def test_classes_asked_of_a_model_without_labels_are_refused():
    assert chosen_classes((), 3, labelled=False) == (3,)
    with pytest.raises(UsageError, match="trained without labels and knows no classes"):
        chosen_classes((1,), 3, labelled=False)
