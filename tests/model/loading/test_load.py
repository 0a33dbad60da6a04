"""From a name, or a run, to a model with the right weights trainable in the right number format."""

import resource
import threading
from pathlib import Path

import pytest
import torch

from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from luthier.model.loading.parameters import count_parameters
from luthier.model.loading.training import prepare_for_training
from luthier.model.tokenizer import load_tokenizer
from tests.tiny import save_tiny, tiny_llama

BF16, FP32 = torch.bfloat16, torch.float32


def test_a_model_is_loaded_in_the_format_asked_for(llama_folder):
    model = load_model(ModelSource(str(llama_folder)), dtype=BF16, attn_implementation="eager")
    assert {weight.dtype for weight in model.parameters()} == {BF16}
    assert model.config._attn_implementation == "eager"
    assert not model.training


def test_random_weights_need_the_config_only(tmp_path):
    folder = tiny_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    first, second = (load_model(ModelSource(str(folder)), dtype=FP32, train_from_scratch=True) for _ in range(2))
    assert count_parameters(first) == count_parameters(second)
    assert not torch.equal(first.lm_head.weight, second.lm_head.weight)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from Linux' /proc")
def test_loading_makes_no_second_copy_of_the_weights(tmp_path):
    from transformers import LlamaConfig

    shape = {"hidden_size": 768, "intermediate_size": 2048, "num_attention_heads": 4, "num_hidden_layers": 4}
    folder = save_tiny(tmp_path, LlamaConfig(vocab_size=320, **shape))
    size_bytes = (folder / "model.safetensors").stat().st_size
    assert size_bytes > 1e8
    sizes, done = [memory_bytes_in_use()], threading.Event()

    def watch():
        while not done.wait(0.001):
            sizes.append(memory_bytes_in_use())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_model(ModelSource(str(folder)), dtype=FP32)
    sum(weight.sum() for weight in model.parameters())  # weights may be mapped from the file until they are read
    done.set()
    watcher.join()
    assert (max(sizes) - sizes[0]) / size_bytes < 1.3


def memory_bytes_in_use() -> int:
    """Memory of this process that is in use, what is mapped from files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_what_learns_is_float32_beside_16_bit_weights(llama_folder):
    model = load_model(ModelSource(str(llama_folder)), dtype=BF16).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    prepare_for_training(model, upcast_lmhead_output=True)
    assert model.lm_head.weight.dtype == FP32
    assert model.model.embed_tokens.weight.dtype == BF16
    assert model.training
    assert model.config.use_cache is False
    with torch.autocast("cpu", BF16):
        assert model(torch.tensor([[1, 2, 3]])).logits.dtype == FP32
    pure = load_model(ModelSource(str(llama_folder)), dtype=BF16)
    prepare_for_training(pure, pure_bf16=True)
    assert {weight.dtype for weight in pure.parameters()} == {BF16}


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    """(model, tokenizer)"""
    return load_model(ModelSource(str(smollm2_folder)), dtype=FP32), load_tokenizer(ModelSource(str(smollm2_folder)))


@pytest.mark.thorough
def test_a_gguf_model_answers(smollm2):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    words = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(words, skip_special_tokens=True) == "The capital of France is Paris."
    assert count_parameters(model)[1] == 134_515_008


@pytest.mark.thorough
def test_a_gguf_model_can_be_saved_and_loaded_as_any_other(smollm2, tmp_path):
    model, tokenizer = smollm2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_model(ModelSource(str(tmp_path)), dtype=FP32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert load_tokenizer(ModelSource(str(tmp_path))).encode("Paris <|im_end|>") == tokenizer.encode("Paris <|im_end|>")
