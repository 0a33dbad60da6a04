"""Grammars hold an answer to a call of a tool, or to JSON, and to nothing else."""

import json

import pytest

from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data.types import ToolCall
from luthier.infer.grammar import Grammars, lark_grammar
from luthier.serve.errors import ApiError
from luthier.serve.forced import call_grammar, forced_grammar
from luthier.serve.protocol import ChatRequest
from tests.serve.fakes import WEATHER
from tests.tiny import byte_tokenizer

FUNCTION = WEATHER["function"]
PING = {"name": "ping", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}
JSON_BODIED = ("default", "glm4", "ling", "llama3", "minimax1", "mistral", "phi4_mini", "qwen")


def request(**fields):
    return ChatRequest(messages=[{"role": "user", "content": "hi"}], **fields)


@pytest.fixture
def follows(tokenizer):
    """Whether a text can be written under a grammar, from its beginning to its end."""

    def check(grammar: str, text: str) -> bool:
        from luthier.infer.grammar import GrammarFault

        matcher = Grammars(tokenizer, [260]).matcher(grammar, 320)
        try:
            for token_id in [*tokenizer.encode(text, add_special_tokens=False), 260]:
                matcher.advance(token_id)
        except GrammarFault:
            return False
        return True

    return check


@pytest.mark.parametrize("name", JSON_BODIED)
def test_a_call_is_forced_as_the_syntax_writes_it(name, follows):
    syntax = TOOL_SYNTAXES.get(name)
    grammar = lark_grammar(call_grammar([FUNCTION, PING], name, several=True))
    assert follows(grammar, syntax.write([ToolCall("weather", {"city": "Łódź"})]))
    assert follows(grammar, syntax.write([ToolCall("ping", {})]))
    assert not follows(grammar, syntax.write([ToolCall("weather", {"city": 5})]))
    assert not follows(grammar, syntax.write([ToolCall("other", {})]))
    assert not follows(grammar, "Hello.")
    assert not follows(grammar, "")


def test_tags_that_are_special_tokens_are_not_spelled_out():
    tokenizer = byte_tokenizer()
    tags = ["<|tool_call|>", "<|/tool_call|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    grammar = lark_grammar(call_grammar([PING], "phi4_mini", tags, several=False))
    text = TOOL_SYNTAXES.get("phi4_mini").write([ToolCall("ping", {})])
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert ids[0] >= 261 and ids[-1] >= 261
    matcher = Grammars(tokenizer, [260]).matcher(grammar, 320)
    for token_id in [*ids, 260]:
        matcher.advance(token_id)


def test_several_calls_are_allowed_unless_the_request_says_one(follows):
    two = TOOL_SYNTAXES.get("qwen").write([ToolCall("ping", {}), ToolCall("ping", {})])
    assert follows(lark_grammar(call_grammar([PING], "qwen", several=True)), two)
    assert not follows(lark_grammar(call_grammar([PING], "qwen", several=False)), two)


@pytest.mark.parametrize("name", sorted(set(TOOL_SYNTAXES.names) - set(JSON_BODIED)))
def test_syntaxes_without_json_cannot_be_forced(name):
    with pytest.raises(ApiError, match=name) as caught:
        call_grammar([FUNCTION], name, several=True)
    assert caught.value.param == "tool_choice"


def test_json(follows):
    grammar = forced_grammar(request(response_format={"type": "json_object"}), "qwen")
    assert follows(grammar, '{"a": [1, null]}') and not follows(grammar, "[1]")
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    grammar = forced_grammar(request(response_format=wanted), "qwen")
    assert follows(grammar, json.dumps({"n": 5})) and not follows(grammar, json.dumps({"n": "5"}))


@pytest.mark.parametrize("name", sorted(set(JSON_BODIED) - {"llama3"}))
def test_an_answer_with_a_format_may_call_a_tool_instead(name, follows):
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    wanted = {"type": "json_schema", "json_schema": {"schema": schema}}
    call = TOOL_SYNTAXES.get(name).write([ToolCall("weather", {"city": "Łódź"})])
    for choice in (None, "auto"):
        grammar = forced_grammar(request(tools=[WEATHER], response_format=wanted, tool_choice=choice), name)
        assert follows(grammar, call) and follows(grammar, '{"n": 5}')
        assert not follows(grammar, '{"n": "5"}') and not follows(grammar, "Hello.")
    grammar = forced_grammar(request(tools=[WEATHER], response_format=wanted, tool_choice="none"), name)
    assert follows(grammar, '{"n": 5}') and not follows(grammar, call)


@pytest.mark.parametrize(("name", "param"), [("qwen3_5", "tool_choice"), ("llama3", "response_format")])
def test_a_format_is_refused_beside_tools_where_no_grammar_holds_both(name, param):
    fields = {"tools": [WEATHER], "response_format": {"type": "json_object"}}
    with pytest.raises(ApiError, match="none") as caught:
        forced_grammar(request(**fields), name)
    assert caught.value.param == param
    assert forced_grammar(request(**fields, tool_choice="none"), name)


def test_nothing_is_forced_without_being_asked_for():
    assert forced_grammar(request(), "qwen") is None
    assert forced_grammar(request(tools=[WEATHER], response_format={"type": "text"}), "qwen") is None
    assert forced_grammar(request(tools=[WEATHER], tool_choice="auto"), "qwen3_5") is None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "absent"}}},
            "tool_choice",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/$defs/none"}}}},
            "response_format.json_schema.schema",
        ),
        (
            {
                "tools": [WEATHER],
                "response_format": {"type": "json_schema", "json_schema": {"schema": {"$ref": "#/$defs/none"}}},
            },
            "response_format.json_schema.schema",
        ),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"$ref": "#/$defs/none"}}}],
                "tool_choice": "required",
            },
            "tools",
        ),
    ],
)
def test_what_cannot_be_held_is_refused(fields, param):
    with pytest.raises(ApiError) as caught:
        forced_grammar(request(**fields), "qwen")
    assert caught.value.param == param
