"""The 121 chat formats: names, inheritance, overrides, and what is made of them for tokenizers and Ollama."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from luthier.core.errors import UnknownVariant
from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data import templates
from luthier.data.chat.jinja import chat_template, give_chat_template
from luthier.data.chat.modelfile import modelfile
from luthier.data.chat.render import as_text, render
from luthier.data.templates import Special, Token, get_template, template_names
from luthier.data.types import Message
from tests import tiny

FOLDER = Path(templates.__file__).parent
TABLES = {file.name: tomllib.loads(file.read_text("utf-8")) for file in FOLDER.glob("*.toml")}
NO_CHAT_TEMPLATE = {"chatglm3", "yuan"}
"""They name tokens by id, which text cannot."""


def test_headers_are_found_without_parsing():
    """Every table of every file, and nothing else, is a name or (with `_`) a base."""
    names = sorted(name for tables in TABLES.values() for name in tables)
    assert len(names) == len(set(names))
    assert tuple(name for name in names if not name.startswith("_")) == template_names()
    assert len(template_names()) == 121


@pytest.mark.parametrize("name", template_names())
def test_every_format_is_whole(name):
    template = get_template(name)
    assert template.tool_syntax in TOOL_SYNTAXES.names and template.call_syntax in TOOL_SYNTAXES.names
    for slot in (template.system, template.user, template.assistant, template.observation, template.call_slots):
        assert sum("{{content}}" in piece for piece in slot if isinstance(piece, str)) == 1
    assert not any("{{" in piece for piece in template.prefix if isinstance(piece, str))
    if template.kind == "llama2":
        assert len(template.system) == 1, "it becomes part of a text"
    if template.replace_eos:
        assert template.stop_words


def test_no_table_repeats_what_it_inherits():
    for tables in TABLES.values():
        for name, own in tables.items():
            inherited = templates._keys(own["base"]) if "base" in own else {}
            repeated = [key for key, value in own.items() if key != "base" and inherited.get(key) == value]
            assert not repeated, f"{name} repeats {repeated}"


def test_reading_names_imports_nothing_heavy():
    code = (
        "import sys; from luthier.data.templates import template_names, get_template;"
        "template_names(); get_template('qwen3');"
        "sys.exit(','.join(m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(UnknownVariant, match="did you mean 'qwen3'"):
        get_template("qwen33")
    with pytest.raises(UnknownVariant, match="did you mean 'mistral'"):
        get_template("qwen3", tool_format="mistrall")
    with pytest.raises(UnknownVariant):
        get_template("_chatml")


def test_overrides():
    """A call in another syntax ends like any other answer of the format."""
    template = get_template("mistral", tool_format="qwen", default_system="Be brief.")
    assert (template.tool_syntax, template.call_syntax, template.default_system) == ("qwen", "qwen", "Be brief.")
    assert template.call_slots == template.assistant == (" {{content}}", Special("eos"))
    assert get_template("mistral").call_slots == ("[TOOL_CALLS] {{content}}", Special("eos"))
    assert get_template("qwen", default_system="").default_system == ""


def test_inheritance_of_derived_keys():
    """Observation follows user and calls follow the answer, unless the table or one of its bases says otherwise."""
    assert get_template("yi").observation == get_template("yi").user
    assert get_template("chatml_de").observation == get_template("chatml").observation != get_template("chatml").user
    assert get_template("qwen3_5").call_syntax == "qwen3_5"
    assert get_template("chatglm3").prefix == (Token("[gMASK]"), Token("sop"))


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
        for system in ("", "Be brief."):
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
        [{"role": "system", "content": system}, *chat] if system else chat,
        tokenize=False,
        add_generation_prompt=len(messages) % 2 == 1,
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


LLAMA3_MODELFILE = '''\
# Made by luthier.

FROM .

TEMPLATE """<|begin_of_text|>{{ if .System }}<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|start_header_id|>user<|end_header_id|>

{{ .Content }}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{{ else if eq .Role "assistant" }}{{ .Content }}<|eot_id|>{{ end }}{{ end }}"""

PARAMETER stop "<|eot_id|>"
PARAMETER stop "<|eom_id|>"
PARAMETER num_ctx 4096
'''


def test_modelfile():
    made = modelfile(get_template("llama3"), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    assert made == LLAMA3_MODELFILE


def test_modelfile_with_system_in_the_first_turn():
    text = modelfile(get_template("gemma"), bos_token="<bos>", eos_token="<end_of_turn>")
    assert "<start_of_turn>user\n{{ if and $first $.System }}{{ $.System }}\n\n{{ end }}{{ $first = false }}" in text
    assert 'SYSTEM """You are a helpful assistant."""' in modelfile(
        get_template("qwen2_vl"), bos_token=None, eos_token="<|im_end|>"
    )


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
