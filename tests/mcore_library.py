"""A stand-in for mcore_adapter: the names, signatures and settings that luthier uses, over the model of transformers.

As in the library, labels are not shifted, rows are read in order, and `save_model` writes weights of Hugging Face only
where `save_hf_model` is set. Facts of https://github.com/alibaba/ROLL, mcore_adapter 0.10, 2026-08.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer
from transformers import Seq2SeqTrainingArguments as HFSeq2SeqTrainingArguments


@dataclass
class Seq2SeqTrainingArguments(HFSeq2SeqTrainingArguments):
    tensor_model_parallel_size: int | None = None
    pipeline_model_parallel_size: int | None = None
    sequence_parallel: bool = False
    context_parallel_size: int | None = None
    expert_model_parallel_size: int | None = None
    recompute_granularity: str | None = None
    moe_token_dispatcher_type: str = "allgather"
    use_distributed_optimizer: bool = False
    overlap_grad_reduce: bool = False
    save_hf_model: bool = False
    ckpt_format: str = "legacy"
    additional_configs: dict[str, Any] | str | None = None


class VirtualModels:
    """One model per virtual pipeline stage."""

    def __init__(self, models: list[Any]) -> None:
        self.models, self.config = models, models[0].config

    def __getitem__(self, index: int) -> Any:
        return self.models[index]

    def save_pretrained_as_hf(self, save_directory: str) -> None:
        self.models[0].save_pretrained(save_directory)


class AutoModel:
    @classmethod
    def from_pretrained(cls, model_name_or_path: str, args: Seq2SeqTrainingArguments) -> VirtualModels:
        assert args.tensor_model_parallel_size and args.pipeline_model_parallel_size, "the sizes have no default"
        return VirtualModels([AutoModelForCausalLM.from_pretrained(model_name_or_path, dtype=torch.float32)])


class McaTrainer(Trainer):
    def __init__(self, model: VirtualModels, args: Seq2SeqTrainingArguments, **kwargs: Any) -> None:
        kwargs["processing_class"] = kwargs.pop("tokenizer")
        super().__init__(model[0], args=args, **kwargs)
        self.models = model

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs["labels"]
        logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        loss = cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        return (loss, logits) if return_outputs else loss

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = output_dir or self.args.output_dir
        if not (self.args.save_only_model and self.args.save_hf_model):
            Path(folder).mkdir(parents=True, exist_ok=True)
            torch.save(self.model.state_dict(), Path(folder, "megatron.pt"))
        if self.args.save_hf_model:
            self.models.save_pretrained_as_hf(folder)
        self.processing_class.save_pretrained(folder)


def modules() -> dict[str, ModuleType]:
    """What `sys.modules` has where the library is imported."""
    found = {name: ModuleType(name) for name in ("mcore_adapter", *(f"mcore_adapter.{part}" for part in _PARTS))}
    for part, names in _PARTS.items():
        for name in names:
            setattr(found[f"mcore_adapter.{part}"], name, globals()[name])
    assert not found.keys() & sys.modules.keys(), "the library itself is here"
    return found


_PARTS = {"models": ("AutoModel",), "trainer": ("McaTrainer",), "training_args": ("Seq2SeqTrainingArguments",)}
