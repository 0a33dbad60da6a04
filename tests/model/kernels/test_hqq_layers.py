"""transformers calls the reader of HQQ layers before and after it loads the other weights."""

import torch
from transformers import LlamaForCausalLM

from luthier.model.kernels.hqq_layers import METHOD, hqq_marker


class Calls:
    def __init__(self):
        self.found = []

    def __deepcopy__(self, memo):
        return self

    def make_room(self, model, files):
        self.found.append(("make_room", len(files)))

    def fill(self, model):
        self.found.append(("fill", bool(next(model.parameters()).isfinite().all())))


def test_the_reader_is_called_around_loading(llama_folder):
    calls = Calls()
    marker = hqq_marker(calls)
    LlamaForCausalLM.from_pretrained(llama_folder, quantization_config=marker, dtype=torch.float32)
    assert calls.found == [("make_room", 1), ("fill", True)]
    assert marker.to_dict() == {"quant_method": METHOD}
