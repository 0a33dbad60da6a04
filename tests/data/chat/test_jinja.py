"""Chat templates in Jinja, made of a format: they write what render writes."""

import pytest

from luthier.data.chat.jinja import chat_template, give_chat_template
from luthier.data.chat.render import as_text, render
from luthier.data.templates import get_template, template_names
from luthier.data.types import Message
from tests import tiny

NO_CHAT_TEMPLATE = {"chatglm3", "yuan"}
"""They name tokens by id, which text cannot."""


CONVERSATIONS = {
    "one turn": [("user", "Hi"), ("assistant", "Hello 'there' \\n")],
    "two turns": [("user", "Hi"), ("assistant", "{{content}}"), ("user", "And?"), ("assistant", "世界\n")],
    "tool answer": [("user", "Hi"), ("assistant", "look"), ("observation", '{"a": 1}'), ("assistant", "so")],
    "thoughts": [
        ("user", "Hi"),
        ("assistant", "OPENfirstCLOSEone"),
        ("user", "?"),
        ("assistant", "OPENsecondCLOSEtwo"),
    ],
    "broken thought": [
        ("user", "Hi"),
        ("assistant", "OPEN a OPEN b CLOSE one"),
        ("user", "?"),
        ("assistant", "two OPEN"),
    ],
    "quoted thought": [
        ("user", "Hi"),
        ("assistant", "\nWrite OPENthisCLOSE first."),
        ("user", "?"),
        ("assistant", "\n OPENsoCLOSEWrite OPENthatCLOSE next."),
    ],
    "opened in the prompt": [("user", "Hi"), ("assistant", "soCLOSEone"), ("user", "?"), ("assistant", "thusCLOSEtwo")],
}


ROLES = {"observation": "tool"}


@pytest.mark.parametrize("name", [name for name in template_names() if name not in NO_CHAT_TEMPLATE])
def test_chat_template_writes_what_render_writes(name):
    """For inference with and without a pending question, with and without a system text, thinking on, off and unset."""
    template = get_template(name)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = chat_template(template)
    opening, closing = template.thinking_tags
    for pairs in CONVERSATIONS.values():
        said = [(role, text.replace("OPEN", opening).replace("CLOSE", closing)) for role, text in pairs]
        for system in (None, "", "Be brief."):
            for thinking in (True, False, None):
                for preserve in (True, False):
                    for messages in (said, said[:-1]):
                        check_chat_template(template, tokenizer, messages, system, thinking, preserve)


def check_chat_template(template, tokenizer, messages, system, thinking, preserve):
    (turn,) = render(
        template,
        tuple(Message(*message) for message in messages),
        system=system,
        enable_thinking=thinking,
        preserve_thinking=preserve,
        purpose="infer",
    )
    chat = [{"role": ROLES.get(role, role), "content": content} for role, content in messages]
    text = tokenizer.apply_chat_template(
        chat if system is None else [{"role": "system", "content": system}, *chat],
        tokenize=False,
        add_generation_prompt=len(messages) % 2 == 1,
        enable_thinking=thinking,
        preserve_thinking=preserve,
    )
    assert text == as_text((*turn.prompt, *turn.answer), "<s>", "</s>")


@pytest.mark.parametrize("thinking", [True, False, None])
@pytest.mark.parametrize("preserve", [True, False])
@pytest.mark.parametrize("name", ["qwen3", "chatml", "seed_oss"])
def test_thoughts_given_apart_are_written_as_by_render(name, preserve, thinking):
    template, tokenizer = get_template(name), tiny.byte_tokenizer()
    tokenizer.chat_template = chat_template(template)
    said = [("user", "Hi", ""), ("assistant", "\none", "\nfirst"), ("user", "?", ""), ("assistant", "two", "second\n")]
    (turn,) = render(
        template,
        tuple(Message(role, content, thought=thought) for role, content, thought in said),
        enable_thinking=thinking,
        preserve_thinking=preserve,
        purpose="infer",
    )
    text = tokenizer.apply_chat_template(
        [{"role": role, "content": content, "reasoning_content": thought} for role, content, thought in said],
        tokenize=False,
        enable_thinking=thinking,
        preserve_thinking=preserve,
    )
    assert text == as_text((*turn.prompt, *turn.answer), "<s>", "</s>")


def test_formats_that_text_cannot_express():
    assert {name for name in template_names() if chat_template(get_template(name)) is None} == NO_CHAT_TEMPLATE


def test_chat_template_refuses_tools():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = chat_template(get_template("qwen"))
    with pytest.raises(Exception, match="without tools"):
        tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tools=[{"name": "f"}], tokenize=False)


def test_chat_template_without_tokens():
    """A tokenizer without bos: the format's bos is nothing."""
    tokenizer = tiny.byte_tokenizer(bos_token=None)
    tokenizer.chat_template = chat_template(get_template("mistral"))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "?"}], tokenize=False)
    assert text == "[INST] ?[/INST]"


def test_who_gets_a_chat_template():
    """A tokenizer without one, or with one that the format replaces, if the format can be put into one."""
    own = "{{ 'own' }}"
    for name, before, after in [
        ("qwen", None, chat_template(get_template("qwen"))),
        ("qwen", own, own),
        ("chatml", own, chat_template(get_template("chatml"))),
        ("yuan", None, None),
    ]:
        tokenizer = tiny.byte_tokenizer()
        tokenizer.chat_template = before
        give_chat_template(tokenizer, get_template(name))
        assert tokenizer.chat_template == after
