"""A plan counts rows, tokens, steps and trainable parameters as the run itself does."""

import random
from typing import Any

import pytest
from transformers import AutoConfig

import luthier
from luthier.training.trainer import StageTrainer
from tests.matrix import representatives
from tests.plans import plan_of
from tests.runs.test_architectures import ARCHITECTURES, SIZES
from tests.small_world import small_world
from tests.tiny import save_tiny

STAGES: dict[str, dict[str, Any]] = {
    "pt": {"dataset": "plain", "cutoff_len": 48},
    "sft": {"dataset": "numbers,tools"},
    "packed": {"dataset": "numbers,tools", "packing": True, "cutoff_len": 300},
    "rm": {"dataset": "pairs"},
    "dpo": {"dataset": "pairs", "pref_loss": "orpo"},
    "kto": {"dataset": "feedback"},
}
SEEDS = range(24)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return small_world(tmp_path_factory.mktemp("world"), num_hidden_layers=1)


class Counted:
    """Of the run that was last started."""

    trainer: StageTrainer
    trainable: int


@pytest.fixture
def counted(monkeypatch) -> Counted:
    found, train = Counted(), StageTrainer.train

    def noting(trainer: StageTrainer, *arguments: Any, **more: Any) -> Any:
        found.trainer = trainer
        found.trainable = sum(weight.numel() for weight in trainer.policy.parameters() if weight.requires_grad)
        return train(trainer, *arguments, **more)

    monkeypatch.setattr(StageTrainer, "train", noting)
    return found


def drawn(seed: int) -> dict[str, Any]:
    dice = random.Random(seed)
    stage = dice.choice(list(STAGES))
    length: dict[str, Any] = {"max_steps": dice.randint(1, 12)}
    if dice.random() < 0.4:
        length = {"max_steps": -1, "num_train_epochs": dice.choice([0.3, 1, 1.7, 2])}
    order = dice.choice([{"disable_shuffling": True}, {"train_sampling_strategy": "sequential"}, {}, {"data_seed": 7}])
    return {
        **STAGES[stage],
        "stage": "sft" if stage == "packed" else stage,
        **length,
        "disable_shuffling": False,
        **order,
        "per_device_train_batch_size": dice.randint(1, 7),
        "gradient_accumulation_steps": dice.choice([1, 1, 2, 3]),
        "dataloader_drop_last": dice.random() < 0.3,
        "val_size": dice.choice([0, 0, 3]),
        "learning_rate": 1e-4,
    }


@pytest.mark.parametrize("seed", representatives(SEEDS, *range(8)))
def test_rows_tokens_and_steps_are_those_of_the_run(world, counted, tmp_path, seed):
    keys = {**world, **drawn(seed), "output_dir": str(tmp_path / "out")}
    work = plan_of(keys).work
    luthier.train(keys)
    trainer = counted.trainer
    assert (work.steps, work.rows) == (trainer.state.global_step, len(trainer.train_dataset))
    assert work.tokens == trainer.num_trained_tokens


@pytest.mark.parametrize("way", [{}, {"finetuning_type": "lora"}, {"bf16": True}, {"moe_aux_loss_coef": 0.1}], ids=str)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_a_mixture_of_experts_is_planned(world, counted, tmp_path, name, way):
    if name == "deepseek_v3" and "moe_aux_loss_coef" in way:
        pytest.skip("it balances its experts without a loss")
    sizes = {**SIZES, **ARCHITECTURES[name], "vocab_size": 320, "pad_token_id": 256, "max_position_embeddings": 1024}
    model = save_tiny(tmp_path / "model", AutoConfig.for_model(name, **sizes))
    keys = {**world, **way, "model_name_or_path": str(model), "max_steps": 2, "output_dir": str(tmp_path / "out")}
    plan = plan_of(keys)
    luthier.train(keys)
    assert (plan.trainable_parameters, plan.work.tokens) == (counted.trainable, counted.trainer.num_trained_tokens)
    assert plan.peak_bytes > plan.held.all_bytes and plan.trace.num_operations > 0


def test_rows_of_like_lengths_make_the_largest_batch(world):
    keys = {**world, "disable_shuffling": False, "train_sampling_strategy": "group_by_length"}
    assert (
        plan_of(keys).work.heaviest.num_tokens > plan_of({**world, "disable_shuffling": False}).work.heaviest.num_tokens
    )


REWARDED = {"reward_funcs": "tests.small_world:small_letters", "max_new_tokens": 2, "temperature": 1.0}
TRAINED: dict[str, dict[str, Any]] = {
    "lora": {"finetuning_type": "lora", "loraplus_lr_ratio": 16.0},
    "value head": {"stage": "ppo", "finetuning_type": "lora", "ppo_epochs": 1, **REWARDED},
    "value head of a whole model": {"stage": "ppo", "ppo_epochs": 1, **REWARDED},
    "new rows": {"finetuning_type": "lora", "template": "gemma"},
    "new rows in full": {"finetuning_type": "lora", "add_special_tokens": "<a>", "lora_target": "q_proj"},
    "score head": {"stage": "rm", "finetuning_type": "freeze", "dataset": "pairs", "freeze_trainable_layers": 1},
}
CONTINUED: dict[str, dict[str, Any]] = {
    "as it is": {},
    "with new rows": {"template": "gemma"},
    "with more rows": {"add_special_tokens": "<a>,<b>", "resize_vocab": True},
}


@pytest.mark.parametrize("kind", TRAINED)
def test_trainable_parameters_are_those_of_the_run(world, counted, tmp_path, kind):
    keys = {**world, **TRAINED[kind], "max_steps": 1, "output_dir": str(tmp_path / "out")}
    planned = plan_of(keys).trainable_parameters
    luthier.train(keys)
    assert planned == counted.trainable


@pytest.mark.parametrize("kind", CONTINUED)
def test_trainable_parameters_of_an_adapter_that_is_trained_further(world, counted, tmp_path, kind):
    first = {**world, "finetuning_type": "lora", "max_steps": 1, "output_dir": str(tmp_path / "first")}
    luthier.train(first)
    keys = {**first, **CONTINUED[kind], "adapter_name_or_path": first["output_dir"]}
    keys["output_dir"] = str(tmp_path / "out")
    planned = plan_of(keys).trainable_parameters
    luthier.train(keys)
    assert planned == counted.trainable
