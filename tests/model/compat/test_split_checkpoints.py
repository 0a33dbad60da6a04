"""transformers refuses to save the optimizer of split layers; tests/runs/test_tensor_parallel.py resumes with it."""

from types import SimpleNamespace

import pytest
from torch import nn
from transformers import Trainer, TrainingArguments

from luthier.model.compat.split_checkpoints import saving_split_layers


class Split(nn.Linear):
    is_distributed_loading_by_transformers = True


@pytest.fixture
def args(tmp_path):
    return TrainingArguments(str(tmp_path), save_strategy="steps", use_cpu=True, report_to=[])


def test_transformers_itself_refuses_it(args):
    """Once this fails, `saving_split_layers` is not needed any more."""
    with pytest.raises(ValueError, match="their optimizer state cannot be checkpointed"):
        Trainer(Split(1, 1), args)


def test_a_trainer_of_split_layers_is_made(args):
    with saving_split_layers(args, SimpleNamespace(tp_size=2)):
        Trainer(Split(1, 1), args)
    assert not args.save_only_model


def test_other_models_stay_as_they_are(args):
    with saving_split_layers(args, SimpleNamespace(tp_size=None)):
        assert not args.save_only_model
