"""What is checked and recorded once weights are in place."""

import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

from luthier.core.errors import ModelError
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from luthier.model.loading.loaded import as_it_came, keep_use_cache, repair_generation_config, resolved_settings
from luthier.model.save import write_model
from tests.tiny import byte_tokenizer, tiny_llama

SAMPLING = {
    "temperature": 0.6,
    "top_k": 20,
    "top_p": 0.8,
    "min_p": 0.1,
    "typical_p": 0.9,
    "epsilon_cutoff": 3e-4,
    "eta_cutoff": 3e-4,
    "num_return_sequences": 2,
}
WITHOUT_EFFECT = {
    "early_stopping": True,
    "length_penalty": 0.5,
    "output_scores": True,
    "output_attentions": True,
    "pad_token_id": -1,
}


def test_the_manifest_gets_what_open_choices_became(llama_folder):
    model = AutoModelForCausalLM.from_pretrained(llama_folder, attn_implementation="sdpa")
    assert resolved_settings(model) == {"attention": "sdpa", "dtype": "float32"}
    model.config.rope_parameters["rope_type"] = "yarn"
    assert resolved_settings(model)["rope"] == "yarn"


def saved_with(model, folder, **settings):
    """What stands in generation_config.json after the model had these settings and was saved."""
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    with as_it_came(model):
        model.save_pretrained(folder)
    return json.loads((folder / "generation_config.json").read_text())


@pytest.mark.parametrize("name", SAMPLING)
def test_a_setting_of_sampling_means_that_sampling_was_meant(llama_folder, tmp_path, said, name):
    model = load_model(ModelSource(str(llama_folder)), dtype=torch.float32)
    saved = saved_with(model, tmp_path, **{name: SAMPLING[name], "max_new_tokens": 7})
    assert (saved[name], saved["do_sample"], saved["max_new_tokens"]) == (SAMPLING[name], True, 7)
    assert not any("left out" in message for message in said)


@pytest.mark.parametrize("name", WITHOUT_EFFECT)
def test_a_setting_without_effect_is_left_out_and_named(llama_folder, tmp_path, said, name):
    model = load_model(ModelSource(str(llama_folder)), dtype=torch.float32)
    saved = saved_with(model, tmp_path, **{name: WITHOUT_EFFECT[name], "max_new_tokens": 7})
    assert name not in saved and saved["max_new_tokens"] == 7
    assert "do_sample" not in saved
    assert f"left out of what is saved: {name}: {WITHOUT_EFFECT[name]!r}" in "\n".join(said)


def test_all_of_them_together_can_be_saved(tmp_path):
    folder = tiny_llama(tmp_path / "base")
    sampling = {name: value for name, value in SAMPLING.items() if name != "num_return_sequences"}  # never loads
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, **sampling, **WITHOUT_EFFECT}))
    saved = saved_with(load_model(ModelSource(str(folder)), dtype=torch.float32), tmp_path)
    assert saved["do_sample"] is True
    assert {name: saved[name] for name in sampling} == sampling
    assert not WITHOUT_EFFECT.keys() & saved.keys()


def test_valid_settings_stay(llama_folder):
    model = load_model(ModelSource(str(llama_folder)), dtype=torch.float32)
    chosen = {"num_beams": 4, "early_stopping": True, "return_dict_in_generate": True, "output_scores": True}
    model.generation_config = GenerationConfig(**chosen, repetition_penalty=1.1)
    before = model.generation_config.to_dict()
    repair_generation_config(model)
    assert model.generation_config.to_dict() == before


@pytest.mark.parametrize("came", [True, False, None])
def test_the_config_is_saved_with_the_use_cache_it_came_with(llama_folder, tmp_path, came):
    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    if came is None:
        del model.config.use_cache
    else:
        model.config.use_cache = came
    keep_use_cache(model)
    model.config.use_cache = in_use = not came
    with as_it_came(model):
        model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()).get("use_cache") is came
    assert model.config.use_cache is in_use


def test_a_temperature_of_zero_asks_for_no_sampling(tmp_path):
    folder = tiny_llama(tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.0, "max_new_tokens": 7}))
    saved = saved_with(load_model(ModelSource(str(folder)), dtype=torch.float32), tmp_path)
    assert not {"temperature", "do_sample"} & saved.keys()
    assert saved["max_new_tokens"] == 7


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is not a valid JSON file"),
        ("[]", "not a mapping"),
        ('{"max_new_tokens": 0}', "`max_new_tokens` must be greater than 0, but is 0"),
        ('{"pad_token_id": [1, 2]}', "not supported between instances of 'list' and 'int'"),
        ('{"early_stopping": "soon"}', "`early_stopping` must be a boolean or 'never', but is soon"),
        ('{"num_return_sequences": 3}', "do not support `num_return_sequences`"),
        ('{"cache_implementation": "none"}', "Invalid `cache_implementation`"),
        ('{"watermarking_config": "w"}', "has no attribute 'validate'"),
        ('{"eos_token_id": 1.5}', "eos_token_id: 1.5 is no token id"),
        ('{"eos_token_id": [2, "</s>"]}', "eos_token_id: [2, '</s>'] is no token id"),
        ('{"bos_token_id": 1000000000000000000000000000000}', "is no token id"),
        ('{"stop_strings": [7]}', "stop_strings: [7] is no list of texts"),
        ('{"stop_strings": ["."," ",""]}', "stop_strings: ['.', ' ', ''] is no list of texts"),
    ],
)
def test_settings_that_are_refused_are_named_with_their_file(tmp_path, text, reason):
    folder = tiny_llama(tmp_path / "base")
    (folder / "generation_config.json").write_text(text)
    with pytest.raises(ModelError) as caught:
        load_model(ModelSource(str(folder)), dtype=torch.float32)
    assert str(caught.value).startswith(f"{folder}: its generation_config.json cannot be used (")
    assert reason in str(caught.value)
    assert str(caught.value).endswith("-> correct it, or remove it to generate with default settings")


NAMES = sorted(name for name in vars(GenerationConfig()) if not name.startswith("_"))
VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 5),
    st.floats(-1, 2),
    st.sampled_from(["", "never", "static", "x"]),
    st.lists(st.integers(0, 9), max_size=3),
    st.dictionaries(st.sampled_from(["bias", "a"]), st.integers(), max_size=1),
)


@given(st.dictionaries(st.sampled_from([*NAMES, "of_another_version"]), VALUES, max_size=4))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_settings_are_saved_for_plain_transformers_or_refused_in_a_sentence(llama_folder, tmp_path, given_settings):
    folder, saved = tmp_path / "base", tmp_path / "saved"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(llama_folder, folder)
    (folder / "generation_config.json").write_text(json.dumps(given_settings))
    try:
        model = load_model(ModelSource(str(folder)), dtype=torch.float32)
    except ModelError as refused:
        assert "its generation_config.json cannot be used" in str(refused)
        return
    assert not write_model(saved, model, byte_tokenizer())
    GenerationConfig.from_pretrained(saved).validate(strict=True)
