"""Keys of a message that say something about training are told from those that only sound like it."""

import pytest

from luthier.data.training_keys import is_about_training, training_keys


@pytest.mark.parametrize(
    "key",
    [
        "loss",
        "train",
        "weight",
        "mask",
        "ignore_loss",
        "trainOnTurn",
        "LOSS_MASK",
        "is-trainable",
        "compute_loss",
        "no_mask",
    ],
)
def test_keys_about_training(key):
    assert is_about_training(key)


@pytest.mark.parametrize(
    "key", ["content", "role", "weight_kg", "training_data", "name", "step", "label", "mask_url", "trainer", "", "损失"]
)
def test_other_keys(key):
    assert not is_about_training(key)


def test_a_key_without_value_says_nothing():
    assert list(training_keys({"content": "x", "loss": None, "train": False, "weight": 0})) == ["train", "weight"]
