"""Adapters on split layers are made in their whole size; tests/runs/test_tensor_parallel.py trains them."""

from peft.tuners.lora import layer
from torch import nn

from luthier.model.compat.peft_split_layers import whole_adapters
from tests.split_layer import split_layer


def test_peft_itself_takes_the_size_of_a_part():
    """Once this fails, `whole_adapters` is not needed any more."""
    with split_layer() as linear:
        assert layer._get_in_out_features(linear) == (3, 4)


def test_adapters_have_the_whole_size():
    with split_layer() as linear:
        with whole_adapters():
            assert layer._get_in_out_features(linear) == (6, 4)
            assert layer._get_in_out_features(nn.Embedding(5, 2)) == (5, 2)
        assert layer._get_in_out_features(linear) == (3, 4)
