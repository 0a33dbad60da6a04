"""What a template expects of messages is found by running it."""

import pytest

from luthier.data.chat.traits import Traits, traits_of
from tests.trait_programs import CALL_IDS, MODELS, merging_tokenizer, model_tokenizer


def traits(chat_template: str) -> Traits:
    return traits_of(merging_tokenizer(chat_template), has_tools=False)


@pytest.mark.parametrize("name", MODELS)
def test_every_trait_is_found(name):
    model, found = MODELS[name], traits_of(model_tokenizer(name), has_tools=False)
    key = {"thought key": "reasoning_content", "reasoning": "reasoning", "channels": "thinking"}
    others = {"opens thought": "reasoning_content", "grouped results": "reasoning_content"}
    # transformers gives a thought under both names
    assert found.thought_key in (key | others).get(name, "") or (name, found.thought_key) == (
        "channels",
        "reasoning_content",
    )
    assert bool(found.thought_key) == (name in key | others)
    assert (found.thought_key != "" and not found.reads_inline) == model.moves_inline
    assert found.text_arguments == model.text_arguments
    assert found.needs_ids == bool(model.ids)
    assert found.switches == (("thinking",) if name == "switch" else ())


@pytest.mark.parametrize("name", ["thinking", "enable_reasoning", "think"])
def test_a_switch_of_another_name_is_found(name):
    assert traits("{% if " + name + " is true %}on{% endif %}").switches == (name,)


def test_a_variable_that_the_template_sets_is_no_switch():
    assert traits("{% set thinking = true %}{% if thinking %}on{% endif %}").switches == ()
    assert traits("{% for m in messages %}{{ m.thinking }} thinking {% endfor %}").switches == ()


def test_tags_of_transformers_do_not_hide_a_switch():
    assert traits("{% generation %}{{ thinking }}{% endgeneration %}").switches == ("thinking",)


def test_the_template_for_tools_has_traits_of_its_own():
    tokenizer = merging_tokenizer({"default": "{{ messages[0].content }}", "tool_use": CALL_IDS})
    assert not traits_of(tokenizer, has_tools=False).needs_ids
    assert traits_of(tokenizer, has_tools=True).needs_ids


def test_another_template_of_the_same_tokenizer_is_looked_at_anew():
    tokenizer = merging_tokenizer("{{ messages[0].content }}")
    assert not traits_of(tokenizer, has_tools=False).switches
    tokenizer.chat_template = "{{ thinking }}"
    assert traits_of(tokenizer, has_tools=False).switches == ("thinking",)


def test_a_broken_template_has_no_traits():
    assert traits("{{ 1 // 0 }}") == Traits()
    assert traits("{% if %}") == Traits()
