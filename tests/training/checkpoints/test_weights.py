"""Weights of a checkpoint that are not those of the model."""

import pytest
import torch

from luthier.core.errors import RunFailed
from luthier.training.checkpoints.weights import check_filled


def test_tied_and_never_saved_weights_and_the_value_head_are_not_missing():
    model = torch.nn.Module()
    model.body, model.head, model.value_head = (torch.nn.Linear(2, 2, bias=False) for _ in range(3))
    model.head.weight = model.body.weight
    check_filled(model, ["head.weight", "value_head.weight"], [])
    model.positions = torch.nn.Embedding(4, 2)
    with pytest.raises(RunFailed, match=r"has no weight positions\.weight ->"):
        check_filled(model, ["positions.weight"], [])
    model._keys_to_ignore_on_save = ["positions.weight"]
    check_filled(model, ["positions.weight"], [])
    with pytest.raises(RunFailed, match=r"has no weight body\.weight and 1 more"):
        check_filled(model, ["body.weight", "head.weight"], [])
    with pytest.raises(RunFailed, match=r"has an unexpected weight gate\.weight ->"):
        check_filled(model, [], ["gate.weight"])
