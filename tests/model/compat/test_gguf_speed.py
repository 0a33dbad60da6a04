"""Reading the names of GGUF tensors once, and whether transformers still needs that."""

import torch

from luthier.model.compat.gguf_speed import fast_gguf
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model


def test_transformers_still_asks_for_the_tensor_names_of_every_sub_module(monkeypatch, llama_folder):
    """When this fails, `luthier.model.compat.gguf_speed` is no longer needed."""
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    made = []
    original = gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *args: made.append(args) or original(*args))
    model = load_model(ModelSource(str(llama_folder)), dtype=torch.float32)
    expected = get_gguf_hf_weights_map(model, TensorProcessor(config={}))
    assert len(made) > 10
    made.clear()
    with fast_gguf():
        assert get_gguf_hf_weights_map(model, TensorProcessor(config={})) == expected
    assert len(made) == 1
