"""What a run of each method leaves, read by plain peft: nothing of luthier is imported but to train."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.matrix import representatives
from tests.small_world import small_world

METHODS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True, "lora_rank": 4},
    "dora": {"use_dora": True},
    "pissa": {"pissa_init": True, "lora_rank": 4},
    "pissa exact": {"pissa_init": True, "pissa_iter": -1, "lora_rank": 4},
    "embeddings": {"additional_target": "embed_tokens,lm_head"},
    "loraplus": {"loraplus_lr_ratio": 16.0},
    "oft": {"finetuning_type": "oft", "oft_block_size": 16},
    "qlora": {"quantization_bit": 4, "bf16": True},
    "loftq": {"quantization_bit": 4, "bf16": True, "loftq_init": True},
    "qoft": {"quantization_bit": 4, "bf16": True, "finetuning_type": "oft", "oft_block_size": 16},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    shared = small_world(tmp_path_factory.mktemp("world"))
    return {**shared, "finetuning_type": "lora", "max_steps": 8, "learning_rate": 5e-3}


def base(world: dict[str, Any], method: str) -> Any:
    options: dict[str, Any] = {"dtype": torch.float32}
    if "quantization_bit" in METHODS[method]:
        from transformers import BitsAndBytesConfig

        kind = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        options = {"dtype": torch.bfloat16, "quantization_config": kind}
    return AutoModelForCausalLM.from_pretrained(world["model_name_or_path"], **options).eval()


def loss(model: Any, folder: Path) -> float:
    """Of an answer of the training set; no luthier code computes it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "<|im_start|>user\nSay the number 3.<|im_end|>\n<|im_start|>assistant\nvery very very well: 3<|im_end|>\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids.to(model.device)
    with torch.no_grad():
        return float(model(input_ids=ids, labels=ids).loss)


@pytest.mark.parametrize("method", representatives(METHODS, "lora", "pissa", "oft", "qlora"))
def test_the_adapter_is_loaded_by_plain_peft_and_has_learned(world, tmp_path, method):
    if "quantization_bit" in METHODS[method]:
        pytest.importorskip("bitsandbytes")
    import luthier

    folder = tmp_path / "out"
    result = luthier.train({**world, **METHODS[method], "output_dir": str(folder)})
    learned = [entry["loss"] for entry in result.log_history if "loss" in entry]
    assert learned[-1] < learned[0]

    model = base(world, method)
    before = loss(model, folder)
    adapted = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    after = loss(adapted, folder)
    assert after < before - 0.05
    found = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    assert found == set(load_file(folder / "adapter_model.safetensors"))
    if "quantization_bit" not in METHODS[method]:
        assert loss(adapted.merge_and_unload(), folder) == pytest.approx(after, abs=1e-4)
