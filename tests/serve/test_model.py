"""Prompts for a conversation: as the chat format writes them, with or without thoughts, continued or refused."""

import pytest

from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.types import Message, ToolCall
from luthier.infer.conversation import Conversation
from luthier.infer.prompting import ModelTemplatePrompting
from luthier.serve.convert import Asked, conversation, tools_text
from luthier.serve.errors import ApiError
from luthier.serve.protocol import ChatMessage, Tool
from tests.serve.fakes import WEATHER, chat_model
from tests.tiny import byte_tokenizer

HI = (Message("user", "hi"),)
PROGRAM = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def with_program():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = PROGRAM
    prompting = ModelTemplatePrompting(ModelChatTemplate(Encoder(tokenizer)), "qwen")
    return chat_model(prompting=prompting, thinking_tags=("<think>", "</think>"))


def text(model, asked=None, enable_thinking=None):
    asked = asked or Asked(HI, None)
    return model.tokenizer.decode(model.prompt_ids(asked, "", enable_thinking))


def test_the_prompt_is_that_of_chat():
    model = chat_model()
    assert model.prompt_ids(Asked(HI, "Be brief."), "", None) == model.prompting.prompt_ids(HI, "Be brief.", "")


def test_a_thought_may_be_opened_by_the_prompt():
    model = with_program()
    assert text(model).endswith("assistant\n<think>\n")
    assert text(model, enable_thinking=False).endswith("assistant\n")
    assert model.opens_thought(model.prompt_ids(Asked(HI, None), "", None))
    assert not model.opens_thought(model.prompt_ids(Asked(HI, None), "", False))
    assert not chat_model().opens_thought(model.prompt_ids(Asked(HI, None), "", None))


def test_an_empty_thought_in_the_prompt_is_closed():
    model = chat_model(template="qwen3")
    assert not model.opens_thought(model.prompt_ids(Asked(HI, None), "", False))


@pytest.mark.parametrize("make", [chat_model, with_program])
def test_the_beginning_of_an_answer_is_part_of_the_prompt(make):
    assert text(make(), Asked(HI, None, "Once"), enable_thinking=False).endswith("assistant\nOnce")


def test_what_the_format_cannot_write_is_the_fault_of_the_messages():
    model = chat_model()
    with pytest.raises(ApiError) as caught:
        model.prompt_ids(Asked((*HI, *HI), None), "", None)
    assert caught.value.param == "messages"
    with pytest.raises(ApiError) as caught:
        model.prompt_ids(Asked(HI, None), "[5]", None)
    assert caught.value.param == "tools"
    with pytest.raises(ApiError, match="does not render tools") as caught:
        with_program().prompt_ids(Asked(HI, None), tools_text([Tool(**WEATHER)]), None)
    assert caught.value.param == "tools"


def test_the_models_own_template_may_write_questions_in_a_row():
    assert text(with_program(), Asked((*HI, Message("user", "you there?")), None)).count("<|im_start|>user") == 2


@pytest.mark.parametrize("template", ["qwen", "qwen3", "llama3", "glm4", "mistral", "chatml", "gemma", "default"])
def test_a_conversation_with_tools_has_the_prompt_of_chat(template):
    """In `luthier chat` an answer is text, and the next line is the result; a client sends both as objects."""
    model = chat_model(template=template)
    tools = tools_text([Tool(**WEATHER)])
    chat = Conversation(model.prompting, "Be brief.", tools)
    chat.ask("Weather?")
    chat.answered(TOOL_SYNTAXES.get(model.call_syntax).write([ToolCall("weather", {"city": "Łódź"})]))
    assert chat.awaits_tool_result
    expected = chat.ask("rain")
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Łódź"}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    asked = conversation([ChatMessage(**message) for message in messages])
    assert model.prompt_ids(asked, tools, None) == expected
