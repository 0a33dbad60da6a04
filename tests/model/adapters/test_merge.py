"""Given adapters: the last is trained on, those before are merged, and a wrong or damaged one is refused by name."""

import json

import peft
import pytest
import torch

from luthier.core.errors import ModelError
from luthier.model.adapters._merge import GivenAdapters, attach_adapter, merge_adapters
from luthier.model.embeddings import num_rows
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from luthier.model.loading.parameters import count_parameters
from tests.model.adapters.test_lora import adapt, build, logits, train_a_little
from tests.tiny import tiny_llama


@pytest.fixture
def two_adapters(tmp_path):
    """Two different adapters of the same base, and the base's folder."""
    folder = tiny_llama(tmp_path / "base")
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        adapted = adapt(load_model(ModelSource(str(folder)), dtype=torch.float32), lora_target=("q_proj", "down_proj"))
        train_a_little(adapted, learning_rate=0.02 * (1 + seed))
        adapted.save_pretrained(tmp_path / name)
    return folder, str(tmp_path / "first"), str(tmp_path / "second")


def fresh(folder):
    return load_model(ModelSource(str(folder)), dtype=torch.float32)


def test_the_last_given_adapter_is_trained_on_and_those_before_are_merged(two_adapters):
    folder, first, second = two_adapters
    merged = logits(merge_adapters(fresh(folder), [first, second], GivenAdapters()))
    going_on = adapt(fresh(folder), GivenAdapters((first, second)))
    torch.testing.assert_close(logits(going_on), merged, atol=1e-5, rtol=0)
    assert count_parameters(going_on)[0] > 0
    assert {name for name, p in going_on.named_parameters() if p.requires_grad} == {
        name for name, _ in going_on.named_parameters() if "lora_" in name
    }


def test_with_create_new_adapter_all_are_merged_and_a_fresh_one_changes_nothing_yet(two_adapters):
    folder, first, second = two_adapters
    merged = logits(merge_adapters(fresh(folder), [first, second], GivenAdapters()))
    new = adapt(fresh(folder), GivenAdapters((first, second)), create_new_adapter=True, lora_rank=2)
    torch.testing.assert_close(logits(new), merged, atol=1e-5, rtol=0)
    assert new.peft_config["default"].r == 2


def test_adapter_folder_is_the_folder_inside(two_adapters, tmp_path):
    folder, first, _ = two_adapters
    given = GivenAdapters((str(tmp_path),), folder="first")
    expected = logits(merge_adapters(fresh(folder), [first], GivenAdapters()))
    assert torch.equal(logits(merge_adapters(fresh(folder), given.names, given)), expected)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 128}, ["does not fit", "size mismatch"]),
        ({"num_hidden_layers": 1}, ["does not fit", "has weights for what the model does not have"]),
        ({"num_hidden_layers": 3}, ["does not fit", "has no weights for"]),
    ],
)
def test_an_adapter_of_another_model_is_refused(two_adapters, tmp_path, changes, words):
    other = tiny_llama(tmp_path / "other", **changes)
    with pytest.raises(ModelError) as caught:
        attach_adapter(fresh(other), two_adapters[1], GivenAdapters(), is_trainable=True)
    assert all(word in str(caught.value) for word in [*words, "model_name_or_path", str(two_adapters[0])])


def test_an_adapter_of_another_architecture_is_refused(two_adapters):
    with pytest.raises(ModelError, match="does not fit"):
        attach_adapter(build("gpt2"), two_adapters[1], GivenAdapters(), is_trainable=True)


def test_an_adapter_of_a_model_of_another_name_is_used_with_a_warning(two_adapters, tmp_path, said):
    other = tiny_llama(tmp_path / "namesake")
    attach_adapter(fresh(other), two_adapters[1], GivenAdapters(), is_trainable=False)
    assert any("was trained on" in message for message in said)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), "weights are missing"),
        (
            lambda folder: (folder / "adapter_model.safetensors").write_bytes(
                (folder / "adapter_model.safetensors").read_bytes()[:-100]
            ),
            "cut off",
        ),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not valid JSON"),
    ],
)
def test_a_damaged_adapter_is_named(two_adapters, tmp_path, spoil, words):
    spoil(tmp_path / "first")
    with pytest.raises(ModelError, match=words):
        merge_adapters(fresh(two_adapters[0]), [two_adapters[1]], GivenAdapters())


def test_an_adapter_loads_in_plain_peft(two_adapters):
    from peft import AutoPeftModelForCausalLM

    folder, first, _ = two_adapters
    expected = logits(attach_adapter(fresh(folder), first, GivenAdapters(), is_trainable=False))
    assert json.loads((folder.parent / "first" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    plain = AutoPeftModelForCausalLM.from_pretrained(first, dtype=torch.float32)
    torch.testing.assert_close(logits(plain), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig", "PromptEncoderConfig"])
@pytest.mark.parametrize("is_trainable", [False, True])
def test_an_adapter_that_changes_no_weights_is_refused_with_its_kind(tmp_path, kind, is_trainable):
    folder = tiny_llama(tmp_path / "base")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    peft.get_peft_model(fresh(folder), config).save_pretrained(tmp_path / "prompt")
    method = config.peft_type.value.replace("_", " ").lower()
    with pytest.raises(ModelError, match=f"adapter of {method}, which changes no weights.* -> give"):
        attach_adapter(fresh(folder), str(tmp_path / "prompt"), GivenAdapters(), is_trainable=is_trainable)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (peft.PolyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "of poly, which cannot be used here"),
        (peft.LilyConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]), "of lily, which cannot be merged here"),
    ],
    ids=["poly", "lily"],
)
def test_an_adapter_that_needs_more_than_tokens_or_has_no_merge_is_refused_with_its_kind(tmp_path, config, words):
    folder = tiny_llama(tmp_path / "base")
    peft.get_peft_model(fresh(folder), config).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match=rf"adapter {words} \(.+\) -> give an adapter of LoRA or OFT"):
        merge_adapters(fresh(folder), [str(tmp_path / "other")], GivenAdapters())


@pytest.mark.parametrize(
    "kind", ["LoHaConfig", "LoKrConfig", "AdaLoraConfig", "BOFTConfig", "LNTuningConfig", "VeraConfig"]
)
def test_adapters_of_other_methods_are_merged_as_plain_peft_does(tmp_path, kind):
    folder = tiny_llama(tmp_path / "base")
    own = {"total_step": 10} if kind == "AdaLoraConfig" else {"boft_block_size": 4} if kind == "BOFTConfig" else {}
    targets = ["input_layernorm"] if kind == "LNTuningConfig" else ["q_proj"]
    adapted = peft.get_peft_model(fresh(folder), getattr(peft, kind)(target_modules=targets, **own))
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    adapted.save_pretrained(tmp_path / "other")
    ours = merge_adapters(fresh(folder), [str(tmp_path / "other")], GivenAdapters())
    torch.testing.assert_close(logits(ours), logits(adapted.eval()), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha_pattern": None}, "cannot read this adapter"),
        ({"bias": None}, "cannot read this adapter"),
        ({"trainable_token_indices": -1}, "cannot read this adapter"),
        ({"layer_replication": -1}, "cannot read this adapter"),
        ({"init_lora_weights": -1}, "cannot read this adapter"),
        ({"alora_invocation_tokens": [1]}, "an adapter of aLoRA, which changes some tokens"),
        ({"arrow_config": {"top_k": 1}}, "an adapter of Arrow, which changes some tokens"),
    ],
)
@pytest.mark.parametrize("is_trainable", [False, True])
def test_an_odd_value_in_the_config_of_an_adapter_is_refused_in_a_sentence(
    two_adapters, tmp_path, changes, words, is_trainable
):
    folder, first, _ = two_adapters
    file = tmp_path / "first" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(ModelError, match=words):
        attach_adapter(fresh(folder), first, GivenAdapters(), is_trainable=is_trainable)


def test_the_name_of_the_base_may_be_anything(two_adapters, tmp_path):
    folder, first, _ = two_adapters
    file = tmp_path / "first" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": -1}))
    attach_adapter(fresh(folder), first, GivenAdapters(), is_trainable=False)


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x04}", bytes(64)])
def test_damaged_weights_of_pytorch_are_refused_in_a_sentence(two_adapters, tmp_path, content):
    folder, first, _ = two_adapters
    (tmp_path / "first" / "adapter_model.safetensors").unlink()
    (tmp_path / "first" / "adapter_model.bin").write_bytes(content)
    with pytest.raises(ModelError, match="the adapter's weights cannot be read"):
        attach_adapter(fresh(folder), first, GivenAdapters(), is_trainable=False)


def test_the_embedding_grows_to_the_last_row_that_an_adapter_trains(tmp_path):
    folder = tiny_llama(tmp_path / "base")
    grown = fresh(folder)
    grown.resize_token_embeddings(384, mean_resizing=False)
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [322, 330]})
    peft.get_peft_model(grown, config).save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    adapted = attach_adapter(fresh(folder), str(tmp_path / "lora"), GivenAdapters(), is_trainable=False)
    assert num_rows(adapted.get_base_model()) == 331
