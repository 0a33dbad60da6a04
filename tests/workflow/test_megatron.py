"""What mcore_adapter and Megatron-Bridge share: groups of processes and padded rows."""

from types import SimpleNamespace

import numpy as np
import pytest

from luthier.config.keys.mcore import McoreConfig
from luthier.core.errors import InvalidInput, ModelError
from luthier.model.files.sources import ModelFiles
from luthier.workflow.megatron import block_of, model_folder, require_whole_groups, shifted_batch


def test_gguf_files_are_not_read():
    source = SimpleNamespace(files=ModelFiles("a", gguf_file="model.gguf"))
    with pytest.raises(ModelError, match=r"USE_MCA: a/model.gguf: mcore_adapter does not read GGUF files -> write the"):
        model_folder(source, "USE_MCA", "mcore_adapter")


def test_labels_are_the_next_tokens():
    rows = [
        {"input_ids": np.array([5, 6, 7], np.uint16), "labels": np.array([-100, 6, 7])},
        {"input_ids": [8, 9], "labels": [-100, 9]},
    ]
    batch = shifted_batch(rows, pad_token_id=1, block=4)
    assert batch["input_ids"].tolist() == [[5, 6, 1, 1], [8, 1, 1, 1]]
    assert batch["labels"].tolist() == [[6, 7, -100, -100], [9, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0]]


@pytest.mark.parametrize(
    ("keys", "one_length", "block"),
    [
        ({}, False, 64),
        ({"context_parallel_size": 3}, False, 192),
        ({"tensor_model_parallel_size": 8, "context_parallel_size": 16}, False, 64),
        ({"expert_model_parallel_size": 2}, True, 1024),
    ],
)
def test_padded_lengths(keys, one_length, block):
    assert block_of(McoreConfig(**keys), 1000, one_length=one_length) == block


def test_processes_hold_whole_copies_of_the_model():
    keys = McoreConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=3)
    require_whole_groups(keys, 12)
    message = r"tensor_model_parallel_size 2 x pipeline_model_parallel_size 3: 6 processes hold one copy .* are 8 proc"
    with pytest.raises(InvalidInput, match=message):
        require_whole_groups(keys, 8)
