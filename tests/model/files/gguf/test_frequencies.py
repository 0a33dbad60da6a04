"""Models that are stretched in the way of Llama 3: a GGUF file has the frequencies, which tell their window."""

import pytest
import torch
import transformers

from luthier.core.errors import ModelError
from luthier.model.files.gguf.frequencies import llama3_factors
from luthier.model.files.gguf.writer import write_gguf
from luthier.model.files.sources import ModelSource
from luthier.model.loading.config import load_config
from luthier.model.loading.load import load_model
from tests.model.files.gguf.test_writer import logits, saved
from tests.tiny import TINY_LLAMA


def test_the_factors_by_hand():
    """theta_i = 100^(-2i/8) has wavelengths 2 pi (1, 3.16, 10, 31.6). Of a window of 64 those below 64 / 4 stay, those
    above 64 are divided by 8. Between, 1 / factor is (1 - s) / 8 + s with s = (64 / wavelength - 1) / 3."""
    rope = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    config = transformers.LlamaConfig(**{**TINY_LLAMA, "head_dim": 8, "rope_parameters": rope})
    shares = [(64 / (2 * torch.pi * 10**power) - 1) / 3 for power in (0.5, 1)]
    expected = [1.0, *(1 / ((1 - s) / 8 + s) for s in shares), 8.0]
    torch.testing.assert_close(llama3_factors(config), torch.tensor(expected))


@pytest.mark.parametrize("window", [8192, 128])
def test_a_model_stretched_in_the_way_of_llama_3_comes_back_with_its_own_window(tmp_path, window):
    rope = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"rope_theta": 1e6, "original_max_position_embeddings": window}
    settings = {**TINY_LLAMA, "rope_parameters": rope, "max_position_embeddings": 4 * window}
    model = saved(tmp_path / "model", transformers.LlamaConfig(**settings))
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32")
    again = load_model(ModelSource(str(tmp_path / "m.gguf")), dtype=torch.float32, attn_implementation="eager")
    assert again.config.rope_parameters == model.config.rope_parameters
    assert (logits(again) - logits(model)).abs().max() < 1e-5


def test_frequencies_that_no_window_explains_are_refused(tmp_path):
    rope = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 2.0, "high_freq_factor": 8.0}
    rope |= {"rope_theta": 1e6, "original_max_position_embeddings": 128}
    saved(tmp_path / "model", transformers.LlamaConfig(**{**TINY_LLAMA, "rope_parameters": rope}))
    write_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32")
    with pytest.raises(ModelError, match="rotary frequencies are not those of Llama 3"):
        load_config(ModelSource(str(tmp_path / "m.gguf")))
