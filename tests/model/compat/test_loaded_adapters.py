"""Adapters in bfloat16 that a trainer loads. If the first test fails, `loaded_adapters` can go."""

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from luthier.model.compat.loaded_adapters import keeping_formats
from tests.tiny import TINY_LLAMA


@pytest.fixture
def adapted() -> peft.PeftModel:
    model = LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)).bfloat16()
    return peft.get_peft_model(model, peft.LoraConfig(r=2), autocast_adapter_dtype=False)


def formats(adapted: peft.PeftModel) -> set[torch.dtype]:
    return {weight.dtype for weight in adapted.parameters() if weight.requires_grad}


def load(adapted: peft.PeftModel, folder: str) -> None:
    args = TrainingArguments(folder, use_cpu=True, report_to="none")
    Trainer(adapted, args)._load_from_checkpoint(folder)


def test_the_trainer_of_transformers_widens_them(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    assert formats(adapted) == {torch.bfloat16}
    load(adapted, str(tmp_path))
    assert formats(adapted) == {torch.float32}


def test_their_format_is_kept(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    with keeping_formats(adapted):
        load(adapted, str(tmp_path))
    assert formats(adapted) == {torch.bfloat16}
    assert "load_adapter" not in vars(adapted)
