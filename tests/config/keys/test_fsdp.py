"""Every way to write the settings of FSDP gives what transformers 5 takes, or an error that names the right word."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.config.keys.fsdp import STRATEGIES, WORDS, fsdp_settings
from luthier.config.keys.legacy import training_arguments_kwargs
from luthier.config.load import load_train
from luthier.core.errors import InvalidInput

RUN = {"model_name_or_path": "m", "output_dir": "o", "dataset": "d", "do_train": True}


def given_to_transformers(**keys):
    kwargs = training_arguments_kwargs(load_train({**RUN, **keys}).training)
    return kwargs.get("fsdp"), kwargs.get("fsdp_config")


def settings(keys, config=None):
    return fsdp_settings(load_train({**RUN, **keys}).training, config or {})


@pytest.mark.parametrize("layers", ["LlamaDecoderLayer", "A,B", "A, B"])
@pytest.mark.parametrize(
    "fsdp", ["full_shard auto_wrap", ["full_shard", "auto_wrap"], "full_shard,auto_wrap", ["FULL_SHARD auto_wrap"]]
)
def test_the_reference_writes_a_list_and_the_class_of_layers(fsdp, layers):
    assert given_to_transformers(fsdp=fsdp, fsdp_transformer_layer_cls_to_wrap=layers) == (
        True,
        {"reshard_after_forward": True, "transformer_layer_cls_to_wrap": layers.replace(" ", "").split(",")},
    )


def test_the_names_that_accelerate_writes():
    written = {
        "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": True,
        "fsdp_offload_params": True,
        "fsdp_sharding_strategy": "FULL_SHARD",
        "fsdp_state_dict_type": "FULL_STATE_DICT",
        "fsdp_transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
    }
    expected = {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "cpu_ram_efficient_loading": True,
        "cpu_offload": True,
        "reshard_after_forward": True,
        "state_dict_type": "FULL_STATE_DICT",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    }
    assert given_to_transformers(fsdp=True, fsdp_config=written) == (True, expected)
    plain = {name.removeprefix("fsdp_"): value for name, value in written.items()}
    assert given_to_transformers(fsdp=True, fsdp_config=plain) == (True, expected)


@pytest.mark.parametrize(
    "name", ["backward_prefetch", "forward_prefetch", "use_orig_params", "sync_module_states", "limit_all_gathers"]
)
@pytest.mark.parametrize("prefix", ["", "fsdp_"])
def test_what_only_fsdp_1_has_is_said_and_left_out(name, prefix):
    found = settings({"fsdp": True}, {prefix + name: False})
    assert (found.values, found.problems) == ({}, [])
    assert f"{prefix}{name} has no effect: it is a setting of FSDP 1" in str(found.warnings[0])
    first = settings({"fsdp": True}, {prefix + name: False, "fsdp_version": 1})
    assert (first.values, first.problems, first.warnings) == ({name: False, "version": 1}, [], [])


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("spell", [lambda n: STRATEGIES[n - 1], lambda n: STRATEGIES[n - 1].upper(), int, str])
def test_strategies_by_name_and_number(number, spell):
    found = settings({"fsdp": True}, {"fsdp_sharding_strategy": spell(number)})
    assert found.values == {"reshard_after_forward": number == 1} and not found.problems
    found = settings({"fsdp": True}, {"fsdp_sharding_strategy": spell(number), "version": 1})
    assert found.values == {"reshard_after_forward": STRATEGIES[number - 1], "version": 1}


@pytest.mark.parametrize("again", [True, False, "true", "False"])
def test_whether_to_shard_again(again):
    is_again = str(again).lower() == "true"
    for version, value in ((2, is_again), (1, STRATEGIES[not is_again])):
        found = settings({"fsdp": True}, {"fsdp_reshard_after_forward": again, "fsdp_version": version})
        assert found.values == {"reshard_after_forward": value, "version": version} and not found.problems


def test_the_size_of_modules_and_offloading():
    assert given_to_transformers(fsdp="full_shard offload", fsdp_min_num_params=1000) == (
        True,
        {
            "reshard_after_forward": True,
            "cpu_offload": True,
            "min_num_params": 1000,
            "auto_wrap_policy": "SIZE_BASED_WRAP",
        },
    )


@pytest.mark.parametrize("off", [None, False, "", []])
def test_without_fsdp_nothing_is_translated(off):
    assert given_to_transformers(fsdp=off, fsdp_config={"a": 1})[1] == {"a": 1}


@pytest.mark.parametrize(
    ("keys", "config", "key", "words"),
    [
        ({"fsdp": "full_shrad"}, {}, "fsdp", "full_shrad is not a word of FSDP -> did you mean full_shard?"),
        ({"fsdp": "hybrid_shard"}, {}, "fsdp", "hybrid_shard is not part of FSDP 2 -> use full_shard or shard_grad_op"),
        ({"fsdp": ["no_shard"]}, {}, "fsdp", "no_shard shards nothing"),
        ({"fsdp": True}, {"fsdp_offload_parms": True}, "fsdp_config", "did you mean offload_params?"),
        ({"fsdp": True}, {"sharding_strategy": 5}, "fsdp_config", "hybrid_shard_zero2 is not part of FSDP 2"),
        ({"fsdp": True}, {"sharding_strategy": "all"}, "fsdp_config", "all is not a sharding strategy"),
        ({"fsdp": True}, {"fsdp_version": 3}, "fsdp_config", "there is no version 3 of FSDP"),
        (
            {"fsdp": "full_shard"},
            {"reshard_after_forward": False},
            "fsdp",
            "says reshard_after_forward: True, and another setting of FSDP says reshard_after_forward: False",
        ),
        (
            {"fsdp": True},
            {"cpu_offload": True, "fsdp_offload_params": False},
            "fsdp_config",
            "leave one of the two out",
        ),
        (
            {"fsdp": True, "fsdp_min_num_params": 9, "fsdp_transformer_layer_cls_to_wrap": "A"},
            {},
            "fsdp_min_num_params",
            "and transformer_layer_cls_to_wrap by their class -> leave one of the two out",
        ),
    ],
)
def test_what_cannot_be_meant(keys, config, key, words):
    (problem,) = settings(keys, config).problems
    assert problem.key == key and words in str(problem)
    with pytest.raises(InvalidInput, match=words.partition(" -> ")[0].replace("?", r"\?")):
        given_to_transformers(**keys, fsdp_config=config)


@given(st.lists(st.sampled_from(WORDS), min_size=1), st.booleans())
def test_any_words_are_taken_or_refused(words, as_text):
    found = settings({"fsdp": " ".join(words) if as_text else words})
    assert found.problems or found.values.keys() <= {"reshard_after_forward", "cpu_offload"}


def test_what_transformers_makes_of_it(tmp_path, monkeypatch):
    """The translated settings reach accelerate; transformers passes over names that it does not know."""
    from transformers import TrainingArguments

    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # transformers sets it for the whole process
    file = tmp_path / "fsdp.json"
    file.write_text(json.dumps({"fsdp_offload_params": True, "fsdp_sharding_strategy": "SHARD_GRAD_OP"}))
    fsdp, config = given_to_transformers(
        fsdp=["auto_wrap"], fsdp_config=str(file), fsdp_transformer_layer_cls_to_wrap="LlamaDecoderLayer"
    )
    plugin = TrainingArguments(output_dir=str(tmp_path), fsdp=fsdp, fsdp_config=config).fsdp_plugin_args
    assert plugin["cpu_offload"] is True and plugin["reshard_after_forward"] is False
    assert plugin["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer" and plugin["fsdp_version"] == 2
