"""Parts of trainers as runs ask for them: rows, frozen models, rollouts."""

from functools import partial
from typing import Any

import pytest
import torch

from luthier.config.load import load_train
from luthier.core.errors import ModelError
from luthier.core.kinds import STAGES
from luthier.core.machine import detect
from luthier.data.collate import concatenate_rows
from luthier.data.prepare import prepare
from luthier.data.shared_prefixes import concatenate_sharing_prefixes
from luthier.model.frozen_models import InitialPolicy, SeparateModel
from luthier.training.arguments import training_arguments
from luthier.workflow.frozen_models import layout_for
from luthier.workflow.parts import make_parts, report_padding
from luthier.workflow.text import load_text_side
from luthier.workflow.training import load_policy
from tests.small_world import small_world

PPO = {"stage": "ppo", "reward_funcs": "tests.small_world:small_letters", "max_new_tokens": 4, "temperature": 1.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return small_world(tmp_path_factory.mktemp("world"))


def parts_of(values: dict[str, Any]):
    from transformers import AutoModelForCausalLM

    run = load_train(values)
    stage, text = STAGES.get(run.stage), load_text_side(run)
    data = prepare(run, stage.rows, text.encoding)
    policy = AutoModelForCausalLM.from_pretrained(values["model_name_or_path"], dtype=torch.float32)
    args = training_arguments(run, detect())
    return make_parts(run, stage, policy, data, text, args, padding_reason="asked for by the test")


def test_rows_carry_what_the_reference_says_before_training(world):
    parts = parts_of({**world, "stage": "dpo", "dataset": "pairs", "val_size": 0.25})
    assert len(parts.train_rows[0]["reference_logps"]) == len(parts.eval_rows[""][0]["reference_logps"]) == 2
    assert all(logp < 0 for logp in parts.train_rows[0]["reference_logps"])
    assert not parts.models.frozen and parts.rollouts is None


@pytest.mark.parametrize(
    ("changes", "how"),
    [
        ({}, "parts"),
        ({"stage": "rm"}, "all"),
        ({"pref_loss": "orpo"}, "all"),
        ({"stage": "rm", "finetuning_type": "lora", "lora_dropout": 0.1}, "none"),
        ({"finetuning_type": "lora", "lora_dropout": 0.1}, "parts"),
        ({"fast_path": False}, "none"),
        ({"neftune_noise_alpha": 5.0}, "none"),
        ({"stage": "sft", "dataset": "numbers"}, "all"),
        ({"stage": "sft", "dataset": "numbers", "mixture_of_depths": "convert"}, "none"),
        ({"stage": "kto", "dataset": "feedback"}, "none"),
    ],
)
def test_tokens_are_shared_where_that_changes_no_number(world, tmp_path, changes, how):
    values = {**world, "stage": "dpo", "dataset": "pairs", **changes}
    run = load_train(values)
    stage, text = STAGES.get(run.stage), load_text_side(run)
    policy = load_policy(run, stage, text, detect(), tmp_path).model
    layout = layout_for(run, stage, [policy], sees=False)
    if isinstance(layout, partial):
        assert layout.func is concatenate_sharing_prefixes and layout.keywords == {"num_parts": 2} and how == "parts"
    else:
        assert layout is {"all": concatenate_sharing_prefixes, "none": concatenate_rows}[how]


def test_a_reference_that_no_key_names_is_the_policy_and_a_teacher_is_a_model_of_its_own(world):
    frozen = parts_of({**world, "use_asft_loss": True}).models.frozen
    assert isinstance(frozen["reference"], InitialPolicy)
    teacher = {"stage": "gkd", "teacher_model": world["model_name_or_path"]}
    frozen = parts_of({**world, **teacher}).models.frozen
    assert isinstance(frozen["teacher"], SeparateModel)
    assert not any(weight.requires_grad for weight in frozen["teacher"].model.parameters())


def test_rollouts_know_the_value_head_and_the_reference_does_not_need_it(world):
    parts = parts_of({**world, **PPO})
    assert parts.rollouts is not None and parts.rollouts.models is parts.models
    assert parts.models.head.value is not None and parts.models.frozen["reference"].head.value is None
    assert len(parts.rollouts.step_rows) == 24 // 4 * 4 * 4


def test_packs_that_must_be_isolated_cannot_be_padded(said):
    with pytest.raises(ModelError, match=r"neat_packing: .* because"):
        report_padding("because", is_packed=True, must_isolate=True)
    report_padding("because", is_packed=True, must_isolate=False)
    assert (
        said[0] == "rows are padded: because" and "packing: this model attends across the samples of a row" in said[1]
    )


def test_a_run_without_media_says_that_no_features_are_kept(world, said):
    parts_of({**world, "stage": "sft", "dataset": "numbers", "cache_media_features": True})
    assert any("cache_media_features has no effect" in line for line in said)
