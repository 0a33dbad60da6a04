"""Freeze: which layers and modules are trained."""

import pytest
from transformers import LlamaConfig, LlamaForSequenceClassification

from luthier.core.errors import ModelError
from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters
from luthier.model.adapters.freeze import FreezeConfig, layers_to_train
from luthier.model.embeddings import NewTokens
from tests.model.adapters.test_lora import build
from tests.tiny import TINY_LLAMA, byte_tokenizer


def freeze(model, **config):
    return ADAPTERS.get("freeze").apply(model, FreezeConfig(**config), given=GivenAdapters(), pure_bf16=False)


def learning(model) -> set[str]:
    return {name for name, weight in model.named_parameters() if weight.requires_grad}


def test_freeze_trains_the_last_or_the_first_layers():
    model = build(num_hidden_layers=4)
    last = learning(freeze(model, freeze_trainable_layers=1))
    assert last == {name for name, _ in model.named_parameters() if ".layers.3." in name}
    first = learning(freeze(model, freeze_trainable_layers=-2))
    assert first == {n for n, _ in model.named_parameters() if ".layers.0." in n or ".layers.1." in n}


def test_freeze_trains_named_modules_inside_and_outside_the_layers():
    model = freeze(
        build(), freeze_trainable_layers=1, freeze_trainable_modules=("mlp",), freeze_extra_modules=("lm_head", "norm")
    )
    mlp = {f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    assert learning(model) == mlp | {"lm_head.weight", "model.norm.weight"}


def test_freeze_finds_layers_by_structure():
    assert learning(freeze(build("gpt2"), freeze_trainable_layers=1)) == {
        name for name, _ in build("gpt2").named_parameters() if ".h.1." in name
    }


@pytest.mark.parametrize("key", ["freeze_trainable_modules", "freeze_extra_modules"])
def test_freeze_lists_the_names_it_knows(key):
    with pytest.raises(ModelError) as caught:
        freeze(build(), **{key: ("mlpp",)})
    assert key in str(caught.value)
    assert ("mlp" if key == "freeze_trainable_modules" else "embed_tokens") in str(caught.value)


def test_more_layers_than_there_are_is_all_of_them(said):
    assert list(layers_to_train(2, 2)) == list(layers_to_train(2, -2)) == [0, 1] and not said
    assert list(layers_to_train(2, 5)) == [0, 1]
    assert list(layers_to_train(2, -5)) == [0, 1]
    assert len(said) == 2


def test_the_name_of_what_holds_the_layers_means_all_but_the_layers():
    found = learning(freeze(build(), freeze_trainable_layers=1, freeze_extra_modules=("model",)))
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= found
    assert not any(".layers.0." in name for name in found)


def test_the_score_layer_of_a_reward_model_is_always_trained():
    model = LlamaForSequenceClassification(LlamaConfig(**TINY_LLAMA, num_labels=1))
    model.config.architectures = ["LlamaForSequenceClassification"]
    found = learning(freeze(model, freeze_trainable_layers=1))
    assert found == {name for name, _ in model.named_parameters() if ".layers.1." in name or name == "score.weight"}


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_train_the_embedding_and_the_head(tied):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<new>"])
    model = build(tie_word_embeddings=tied)
    config = FreezeConfig(freeze_trainable_layers=1)
    tokens = NewTokens(tokenizer, ("<new>",))
    ADAPTERS.get("freeze").apply(model, config, given=GivenAdapters(), new_tokens=tokens, pure_bf16=False)
    ends = {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    assert learning(model) == ends | {name for name, _ in model.named_parameters() if ".layers.1." in name}


def test_what_is_named_is_trained_even_in_a_frozen_part():
    model = build()
    config = FreezeConfig(freeze_trainable_layers=1, freeze_extra_modules=("norm",))
    frozen = ("model.layers", "norm", "lm_head")
    ADAPTERS.get("freeze").apply(model, config, given=GivenAdapters(), frozen=frozen, pure_bf16=False)
    assert learning(model) == {"model.norm.weight"}
