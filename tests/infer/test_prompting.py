"""Prompts of a chat are those of training, or those of the model's own chat template; answers are read as they are."""

import json

import pytest

from luthier.core.errors import InvalidInput
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.render import render
from luthier.data.templates import get_template
from luthier.data.types import Message
from luthier.infer.prompting import ModelTemplatePrompting, TemplatePrompting
from tests.tiny import byte_tokenizer
from tests.trait_programs import model_tokenizer

HISTORY = (Message("user", "Hi"), Message("assistant", "Hello."), Message("user", "How are you?"))
WEATHER = {
    "name": "weather",
    "description": "d",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
TOOLS = json.dumps([WEATHER])
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ '' if enable_thinking else '<think></think>' }}{% endif %}"
)


def prompting(name, tokenizer, **settings):
    return TemplatePrompting(get_template(name), Encoder(tokenizer), **settings)


def own_prompting(tokenizer, call_syntax="default", **settings):
    return ModelTemplatePrompting(ModelChatTemplate(Encoder(tokenizer), **settings), call_syntax)


@pytest.fixture
def own():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.mark.parametrize("name", ["default", "chatml", "llama3", "mistral", "qwen3", "glm4"])
def test_the_prompt_and_the_answer_are_a_row_of_training(name):
    """prompt + answer at inference = all turns of training joined, where no thoughts are at play."""
    tokenizer = byte_tokenizer(additional_special_tokens=["[gMASK]", "<sop>"])
    template, encoder = get_template(name), Encoder(tokenizer)
    dialogue = (*HISTORY, Message("assistant", "Well."))
    settings = {"system": "Be brief.", "enable_thinking": False}
    turns = render(template, dialogue, **settings, purpose="train")
    *_, last = turns
    learned = [i for turn in turns for part in (turn.prompt, turn.answer) for i in encoder.pieces(part)]
    prompt = TemplatePrompting(template, encoder, enable_thinking=False).prompt_ids(HISTORY, "Be brief.", "")
    if not template.reasons:
        assert learned == prompt + encoder.pieces(last.answer)
    assert tokenizer.decode(prompt).endswith(tokenizer.decode(encoder.pieces(last.prompt)))


@pytest.mark.parametrize(("thinking", "opened"), [(True, False), (False, True), (None, True)])
def test_thinking_switched_off_is_told_in_the_prompt(thinking, opened):
    tokenizer = byte_tokenizer()
    prompt = prompting("qwen3", tokenizer, enable_thinking=thinking).prompt_ids((Message("user", "Hi"),), "", "")
    assert tokenizer.decode(prompt).endswith("<think>\n\n</think>\n\n") == opened


def test_calls_are_read_in_the_syntax_of_the_format():
    answer = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    message = prompting("qwen", byte_tokenizer()).read_answer(answer, TOOLS)
    assert [(call.name, call.arguments) for call in message.calls] == [("weather", {"city": "Rome"})]
    assert message.role == "function"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("qwen", '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'),
        ("qwen", 'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'),
        (
            "qwen3",
            '<think>\nRain?\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
        ),
        ("mistral", '[{"name": "weather", "arguments": {"city": "Rome"}}]'),
        ("llama3", '{"name": "weather", "parameters": {"city": "Rome"}}'),
        ("default", 'Action: weather\nAction Input: {"city": "Rome"}'),
    ],
)
def test_a_call_goes_back_into_the_prompt_as_the_model_wrote_it(name, answer):
    tokenizer = byte_tokenizer()
    way = prompting(name, tokenizer, preserve_thinking=True)
    message = way.read_answer(answer, TOOLS)
    assert len(message.calls) == 1
    prompt = tokenizer.decode(way.prompt_ids((HISTORY[0], message, Message("observation", "sunny")), "", TOOLS))
    assert answer in prompt


def test_without_tools_every_answer_is_words():
    answer = '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>'
    assert prompting("qwen", byte_tokenizer()).read_answer(answer, "") == Message("assistant", answer)


def test_tools_that_the_format_cannot_describe_are_one_error():
    with pytest.raises(InvalidInput, match="cannot write this conversation: a tool is not an object with name"):
        prompting("default", byte_tokenizer()).prompt_ids(HISTORY, "", '[{"description": "no name"}]')


def test_the_models_own_template_writes_the_prompt(own):
    prompt = own.decode(own_prompting(own, default_system="Be brief.").prompt_ids(HISTORY, None, ""))
    assert prompt == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(("thinking", "closed"), [(True, False), (False, True), (None, True)])
def test_the_models_own_template_is_told_whether_to_think(own, thinking, closed):
    prompt = own_prompting(own, enable_thinking=thinking).prompt_ids(HISTORY[:1], "", "")
    assert own.decode(prompt).endswith("<think></think>") == closed


def test_calls_reach_the_models_own_template_as_calls(own):
    way = own_prompting(own, "qwen")
    message = way.read_answer('<tool_call>{"name": "weather", "arguments": {"city": "Rome"}}</tool_call>', TOOLS)
    assert len(message.calls) == 1
    prompt = own.decode(way.prompt_ids((HISTORY[0], message, Message("observation", "sunny")), "", TOOLS))
    assert '<|im_start|>assistant\n{"name": "weather", "arguments": {"city": "Rome"}}<|im_end|>' in prompt
    assert "<|im_start|>tool\nsunny<|im_end|>" in prompt


CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.mark.parametrize("name", ["qwen3", "grouped results"])
@pytest.mark.parametrize(
    "answer",
    [
        CALL,
        f"Let me look.\n{CALL}",
        f"<think>\nRain?\n</think>\n\n{CALL}",
        f"<think>\nR\n</think>\n\nSee:\n{CALL}",
        f"{CALL}\n{CALL}",
    ],
)
def test_an_answer_stands_in_the_history_as_the_model_wrote_it(name, answer):
    tokenizer = model_tokenizer(name)
    way = own_prompting(tokenizer, "qwen")
    message = way.read_answer(answer, TOOLS)
    assert len(message.calls) == answer.count("<tool_call>")
    history = (HISTORY[0], message, Message("observation", "sunny"))
    assert f"assistant\n{answer}<|im_end|>" in tokenizer.decode(way.prompt_ids(history, None, TOOLS))


@pytest.mark.parametrize("name", ["call ids", "mistral"])
def test_calls_of_the_model_get_ids_where_its_template_needs_them(name):
    """The model's own words hold none that luthier could read."""
    tokenizer = model_tokenizer(name)
    way = own_prompting(tokenizer, "mistral")
    message = way.read_answer('[{"name": "weather", "arguments": {}}, {"name": "weather", "arguments": {}}]', TOOLS)
    prompt = tokenizer.decode(way.prompt_ids((HISTORY[0], message, Message("observation", "sunny")), None, TOOLS))
    assert [prompt.count(f'"call0000{number}"') for number in (0, 1)] == [2, 1]


def test_what_the_models_own_template_refuses_is_one_error(own):
    own.chat_template = "{{ raise_exception('no system please') }}"
    with pytest.raises(InvalidInput, match=r"own chat template refuses the conversation: no system please"):
        own_prompting(own).prompt_ids(HISTORY, "Be brief.", "")
