"""From a name, or a run, to a model with the right weights trainable in the right number format."""

import dataclasses
import resource
import threading
from pathlib import Path

import pytest
import torch

from luthier.core.machine import Machine, detect
from luthier.model.compat.gguf_speed import fast_gguf
from luthier.model.dtype import inference_dtype, training_dtype, warn_slow_format
from luthier.model.loading.load import load_model, prepare_for_training
from luthier.model.loading.parameters import count_parameters
from luthier.model.tokenizer import load_tokenizer
from tests.tiny import save_tiny, tiny_llama

CPU = Machine(
    device="cpu", num_accelerators=0, bf16=True, fp16=False, memory_bytes=1, device_memory_bytes=1, num_cpus=1
)
OLD_CPU = dataclasses.replace(CPU, bf16=False)
GPU = dataclasses.replace(CPU, device="cuda", num_accelerators=1, fp16=True)
OLD_GPU = dataclasses.replace(GPU, bf16=False)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def test_this_machine_is_described():
    machine = detect()
    assert machine.memory_bytes > 1e9
    assert machine.num_cpus >= 1
    assert (machine.num_accelerators == 0) == (machine.device == "cpu")
    assert machine is detect()


@pytest.mark.parametrize(
    ("asked", "checkpoint", "machine", "expected"),
    [
        ({"bf16": True}, FP32, CPU, BF16),
        ({"pure_bf16": True}, None, CPU, BF16),
        ({"fp16": True}, BF16, GPU, FP16),
        ({}, BF16, CPU, FP32),
        ({}, BF16, GPU, BF16),
        ({}, None, OLD_GPU, FP16),
    ],
)
def test_number_format_of_training(asked, checkpoint, machine, expected):
    flags = {"bf16": False, "fp16": False, "pure_bf16": False} | asked
    assert training_dtype(**flags, checkpoint=checkpoint, machine=machine) == expected


@pytest.mark.parametrize(
    ("asked", "checkpoint", "machine", "expected"),
    [
        ("float16", FP32, CPU, FP16),
        ("auto", BF16, CPU, BF16),
        ("auto", BF16, OLD_CPU, FP32),
        ("auto", FP16, CPU, FP32),
        ("auto", None, CPU, FP32),
        ("auto", FP32, CPU, FP32),
        ("auto", FP16, GPU, FP16),
        ("auto", None, GPU, BF16),
        ("auto", BF16, OLD_GPU, FP16),
    ],
)
def test_number_format_of_inference(asked, checkpoint, machine, expected):
    assert inference_dtype(asked, checkpoint=checkpoint, machine=machine) == expected


@pytest.mark.parametrize(
    ("dtype", "machine", "is_slow"),
    [(BF16, OLD_CPU, True), (BF16, CPU, False), (FP32, OLD_CPU, False), (BF16, OLD_GPU, False)],
)
def test_bfloat16_without_instructions_for_it_is_told(said, dtype, machine, is_slow):
    warn_slow_format(dtype, machine)
    assert ("bf16: this processor has no instructions for bfloat16" in "".join(said)) == is_slow


def test_a_model_is_loaded_in_the_format_asked_for(llama_folder):
    model = load_model(str(llama_folder), dtype=BF16, attn_implementation="eager")
    assert {weight.dtype for weight in model.parameters()} == {BF16}
    assert model.config._attn_implementation == "eager"
    assert not model.training


def test_random_weights_need_the_config_only(tmp_path):
    folder = tiny_llama(tmp_path)
    (folder / "model.safetensors").unlink()
    first, second = (load_model(str(folder), dtype=FP32, train_from_scratch=True) for _ in range(2))
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
    model = load_model(str(folder), dtype=FP32)
    sum(weight.sum() for weight in model.parameters())  # weights may be mapped from the file until they are read
    done.set()
    watcher.join()
    assert (max(sizes) - sizes[0]) / size_bytes < 1.3


def memory_bytes_in_use() -> int:
    """Memory of this process that is in use, what is mapped from files included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_what_learns_is_float32_beside_16_bit_weights(llama_folder):
    model = load_model(str(llama_folder), dtype=BF16).requires_grad_(False)
    model.lm_head.requires_grad_(True)
    prepare_for_training(model, upcast_lmhead_output=True)
    assert model.lm_head.weight.dtype == FP32
    assert model.model.embed_tokens.weight.dtype == BF16
    assert model.training
    assert model.config.use_cache is False
    with torch.autocast("cpu", BF16):
        assert model(torch.tensor([[1, 2, 3]])).logits.dtype == FP32
    pure = load_model(str(llama_folder), dtype=BF16)
    prepare_for_training(pure, pure_bf16=True)
    assert {weight.dtype for weight in pure.parameters()} == {BF16}


@pytest.fixture(scope="module")
def smollm2(smollm2_folder):
    """(model, tokenizer)"""
    return load_model(str(smollm2_folder), dtype=FP32), load_tokenizer(str(smollm2_folder))


def test_a_gguf_model_answers(smollm2):
    model, tokenizer = smollm2
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    words = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert tokenizer.decode(words, skip_special_tokens=True) == "The capital of France is Paris."
    assert count_parameters(model)[1] == 134_515_008


def test_a_gguf_model_can_be_saved_and_loaded_as_any_other(smollm2, tmp_path):
    model, tokenizer = smollm2
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path), dtype=FP32)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert load_tokenizer(str(tmp_path)).encode("Paris <|im_end|>") == tokenizer.encode("Paris <|im_end|>")


def test_transformers_still_asks_for_the_tensor_names_of_every_sub_module(monkeypatch, llama_folder):
    """When this fails, `luthier.model.compat.gguf_speed` is no longer needed."""
    import gguf
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    made = []
    original = gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *args: made.append(args) or original(*args))
    model = load_model(str(llama_folder), dtype=FP32)
    expected = get_gguf_hf_weights_map(model, TensorProcessor(config={}))
    assert len(made) > 10
    made.clear()
    with fast_gguf():
        assert get_gguf_hf_weights_map(model, TensorProcessor(config={})) == expected
    assert len(made) == 1
