"""Every stage with every way of learning: what should learn has changed, all else is as it was bit for bit, and what
was saved loads back and gives the numbers that the model gave as training ended.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import luthier
from luthier.config.load import load_infer
from luthier.core.kinds import ADAPTERS, STAGES
from luthier.model.backends import load_for_inference
from luthier.model.heads.score_head import position_scores
from luthier.training.trainer import StageTrainer
from tests.matrix import representatives
from tests.small_world import WAYS, small_world
from tests.tiny import tiny_llama

REWARDED = {
    "max_new_tokens": 4,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "reward_funcs": "tests.small_world:small_letters",
}
STAGE_KEYS: dict[str, dict[str, Any]] = {
    "pt": {"dataset": "plain", "cutoff_len": 48},
    "sft": {},
    "rm": {"dataset": "pairs"},
    "dpo": {"dataset": "pairs"},
    "kto": {"dataset": "feedback"},
    "ppo": {**REWARDED, "ppo_epochs": 3},
    "grpo": {**REWARDED, "num_generations": 4, "num_iterations": 3, "grpo_beta": 0.1},
    "gkd": {"gkd_lambda": 0.5, "max_new_tokens": 4},
}
FOUR_BITS = {"quantization_bit": 4}
OTHER_WAYS: dict[str, dict[str, Any]] = {
    "qoft": {"finetuning_type": "oft", "oft_block_size": 16, **FOUR_BITS},
    "lora on hqq": {"finetuning_type": "lora", "quantization_method": "hqq", **FOUR_BITS},
}
PAIRS = [
    *((stage, way) for stage in STAGE_KEYS for way in WAYS),
    *((stage, way) for stage in ("sft", "rm", "ppo") for way in OTHER_WAYS),
]
SOME = (
    *(("pt", "freeze"), ("sft", "lora"), ("rm", "qlora"), ("dpo", "oft"), ("kto", "full"), ("ppo", "lora")),
    *(("grpo", "full"), ("gkd", "lora"), ("sft", "lora on hqq")),
)
"""Each stage and each way of learning, once."""
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
IDS = torch.arange(1, 40)[None]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    values = small_world(tmp_path_factory.mktemp("world"))
    teacher = tiny_llama(tmp_path_factory.mktemp("teacher"), seed=7, max_position_embeddings=1024)
    return {**values, "teacher_model": str(teacher), "max_steps": 3, "lr_scheduler_type": "constant"}


class Witness:
    """The policy of a run and its weights as training began; they are read, nothing is changed."""

    policy: Any
    before: dict[str, torch.Tensor]


@pytest.fixture
def witness(monkeypatch) -> Iterator[Witness]:
    seen, train = Witness(), StageTrainer.train

    def observed(trainer: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.policy, seen.before = trainer.policy, weights(trainer.policy)
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "train", observed)
    yield seen


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def trainable_names(name: str, stage: str, way: str) -> bool:
    """Written down from what each way of learning is, not asked of the model."""
    if name.startswith("value_head."):
        return stage == "ppo"
    if ".score." in f".{name}":
        return stage == "rm" and "original_module" not in name
    if way == "full":
        return True
    if way == "freeze":
        return name.startswith("model.layers.1.")
    return (".oft_R." if "oft" in way else ".lora_") in name


def test_all_stages_and_training_methods_are_covered():
    assert set(STAGE_KEYS) == set(STAGES.names)
    assert {keys["finetuning_type"] for keys in WAYS.values()} == set(ADAPTERS.names)
    assert {stage for stage, _ in SOME} == set(STAGES.names) and {way for _, way in SOME} >= set(WAYS)


@pytest.mark.parametrize(
    ("stage", "way"), representatives(PAIRS, *SOME), ids=[f"{stage} {way}" for stage, way in PAIRS]
)
def test_only_trainable_parameters_change_and_are_saved(world, witness, tmp_path, stage, way):
    keys = {**WAYS, **OTHER_WAYS}[way]
    if "quantization_bit" in keys:
        pytest.importorskip(keys.get("quantization_method", "bitsandbytes"))
    out = tmp_path / "out"
    luthier.train({**world, "stage": stage, **STAGE_KEYS[stage], **keys, "output_dir": str(out)})
    after = weights(witness.policy)
    assert after.keys() == witness.before.keys()
    changed = {name for name, weight in after.items() if not torch.equal(weight, witness.before[name])}
    assert changed == {name for name in after if trainable_names(name, stage, way)}
    assert_everything_is_adapted(changed, way)
    assert_saved_as_trained(world, keys, witness.policy, out, stage)


def assert_everything_is_adapted(changed: set[str], way: str) -> None:
    """By default each linear layer of each block carries its adapter."""
    part = "oft_R" if "oft" in way else "lora_B" if "lora" in way else "weight"
    for layer in (0, 1) if way != "freeze" else (1,):
        for linear in LINEAR:
            assert any(f".{layer}." in name and f".{linear}.{part}" in name for name in changed), (layer, linear)


def assert_saved_as_trained(world: dict[str, Any], keys: dict[str, Any], policy: Any, out: Path, stage: str) -> None:
    is_adapter = (out / "adapter_model.safetensors").is_file()
    assert is_adapter == (keys["finetuning_type"] in ("lora", "oft"))
    values = {"model_name_or_path": world["model_name_or_path"], "adapter_name_or_path": str(out)}
    bits = {name: value for name, value in keys.items() if name.startswith("quantization")}
    values = {**values, **bits} if is_adapter else {"model_name_or_path": str(out)}
    again = load_for_inference(load_infer({**values, "template": "chatml"}), scores=stage == "rm")
    torch.testing.assert_close(numbers(again, stage), numbers(policy, stage), atol=1e-4, rtol=1e-4)
    assert (out / "value_head.safetensors").is_file() == (stage in ("rm", "ppo"))
    if stage == "ppo":
        saved, head = load_file(out / "value_head.safetensors"), policy.get_submodule("value_head")
        assert torch.equal(saved["v_head.summary.weight"], head.weight)
        assert torch.equal(saved["v_head.summary.bias"], head.bias)


@torch.no_grad()
def numbers(model: Any, stage: str) -> torch.Tensor:
    """Logits, or the scores of a reward model."""
    model.eval()
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "position_ids": torch.arange(39)[None]}
    inputs = {name: values.to(model.device) for name, values in inputs.items()}
    if stage == "rm":
        return position_scores(model, inputs)
    return model(**inputs, use_cache=False).logits.float()
