"""Tool-call syntaxes: what is written can be read, for whatever the wire format can carry."""

import time
from datetime import date

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data.types import ToolCall

NAMES = TOOL_SYNTAXES.names
TAGGED = ("glm4_moe", "minimax2", "qwen3_5", "seed_oss")
"""Strings stand without quotes between tags."""
JSON_LIKE = tuple(sorted(set(NAMES) - {*TAGGED, "gemma4", "glm4"}))
"""Any JSON value and any argument name; gemma4 has bare keys, glm4 one call."""

text = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(
    [
        "1",
        "true",
        "null",
        "",
        " x ",
        "\n",
        "a \"b\" 'c'",
        "\\",
        "{}",
        "</tool_call>",
        "<tool_call>",
        "Action: x\n",
        "世界",
        "\u2028",
    ]
)
scalars = st.none() | st.booleans() | st.integers(-(10**18), 10**18) | st.floats(allow_nan=False, allow_infinity=False)


def values(strings, keys):
    return st.recursive(
        scalars | strings,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=3),
        max_leaves=6,
    )


def calls(strings, keys, max_size=3):
    one = st.builds(ToolCall, identifiers, st.dictionaries(keys, values(strings, keys), max_size=3))
    return st.lists(one, min_size=1, max_size=max_size)


identifiers = st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,8}", fullmatch=True)
HOSTILE = [
    ToolCall("f", {"code": 'print("a")\n# </tool_call> [1, 2)', "from": [True, None, {"k ey": "it's"}], "n": "1"}),
    ToolCall("a.b-c", {}),
    ToolCall("g", {"deep": {"list": [[], {}, [1.5, -2]]}, "x-y": 1e300}),
]


@pytest.mark.parametrize("name", JSON_LIKE)
@settings(max_examples=80, deadline=None)
@given(made=calls(text, text))
@example(made=HOSTILE)
@example(made=[ToolCall("f", {"name\x85": None, " name": 1, "name=": 2, "²": 3})])
def test_round_trip_of_any_json(name, made):
    syntax = TOOL_SYNTAXES.get(name)
    assert syntax.parse(syntax.write(made)) == made


@settings(max_examples=80, deadline=None)
@given(calls(text, text, max_size=1))
def test_round_trip_of_glm4(made):
    syntax = TOOL_SYNTAXES.get("glm4")
    assert syntax.parse(syntax.write(made)) == made


bare_keys = st.text(st.characters(codec="utf-8", exclude_characters=':,{}[]<"'), min_size=1, max_size=6).filter(
    lambda key: key == key.strip()
)


@settings(max_examples=150, deadline=None)
@given(calls(text.filter(lambda s: "<|" not in s and not s.endswith("<") and not s.startswith("|")), bare_keys))
def test_round_trip_of_gemma4(made):
    syntax = TOOL_SYNTAXES.get("gemma4")
    assert syntax.parse(syntax.write(made)) == made


CLOSING = "</"
plain_text = text.filter(lambda s: CLOSING not in s)


def schema_of(call: ToolCall) -> dict:
    """A tool whose parameters have the types of the call's arguments."""
    kinds = {k: {"type": "string"} if isinstance(v, str) else {"type": "object"} for k, v in call.arguments.items()}
    return {"type": "function", "function": {"name": call.name, "parameters": {"type": "object", "properties": kinds}}}


@pytest.mark.parametrize("name", TAGGED)
@settings(max_examples=80, deadline=None)
@given(
    made=st.lists(
        st.builds(ToolCall, identifiers, st.dictionaries(identifiers, values(plain_text, plain_text), max_size=3)),
        min_size=1,
        max_size=3,
        unique_by=lambda call: call.name,
    )
)
def test_round_trip_of_tagged_syntaxes_with_schema(name, made):
    """The schema says which values are strings, so "1" and " x " come back as they were."""
    syntax = TOOL_SYNTAXES.get(name)
    assert syntax.parse(syntax.write(made), [schema_of(call) for call in made]) == made


@pytest.mark.parametrize("name", TAGGED)
def test_tagged_syntaxes_guess_without_schema(name):
    syntax = TOOL_SYNTAXES.get(name)
    written = syntax.write([ToolCall("f", {"city": "Paris", "n": 1, "flags": [True], "zip": "75001"})])
    assert syntax.parse(written) == [ToolCall("f", {"city": "Paris", "n": 1, "flags": [True], "zip": 75001})]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=60, deadline=None)
@given(said=st.text(max_size=40))
@example(said="It is 21 degrees.")
@example(said="1")
@example(said="null")
@example(said="[]")
@example(said='{"name": "f"}')
@example(said="Here:\n{}")
def test_a_plain_answer_is_no_call(name, said):
    assert TOOL_SYNTAXES.get(name).parse(said) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_off_call_is_no_call(name):
    """At any length nothing is raised, and what is read is whole calls of the answer."""
    syntax = TOOL_SYNTAXES.get(name)
    made = HOSTILE[:1] if name in (*TAGGED, "glm4") else HOSTILE
    written = syntax.write(made)
    for length in range(len(written)):
        read = syntax.parse(written[:length]) or []
        assert len(read) <= len(made)


@pytest.mark.parametrize("name", NAMES)
def test_long_broken_answers_are_read_in_time(name):
    """No pattern goes back and forth: twice the text takes about twice the time."""
    syntax = TOOL_SYNTAXES.get(name)
    written = syntax.write([ToolCall("f", {f"k{i}": "v" for i in range(2000)})])
    start = time.process_time()
    syntax.parse(written[: len(written) - len(written) // 50])
    assert time.process_time() - start < 2


@pytest.mark.parametrize("name", NAMES)
def test_bare_and_wrapped_tools_are_the_same(name):
    """Also without a type, and as in OpenAI's Responses API. Not in seed_oss, which shows them as they are given."""
    bare = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    describe = TOOL_SYNTAXES.get(name).describe
    forms = ({"type": "function", "function": bare}, {"function": bare}, {"type": "function", **bare})
    same = {describe([bare], date(2026, 1, 2)) == describe([form], date(2026, 1, 2)) for form in forms}
    assert same == {name != "seed_oss"}


@pytest.mark.parametrize("name", ["default", "gemma4"])
def test_a_key_that_is_null_is_left_out(name):
    """Clients write all keys of a schema, with null for those that are not given; `true` is a schema, too."""
    given = {"properties": {"a": {"type": "string"}, "b": {}}, "type": "object"}
    nulls = {
        "properties": {"a": {"type": "string", "description": None, "enum": None, "items": None}, "b": True},
        "type": "object",
        "required": None,
    }
    describe = TOOL_SYNTAXES.get(name).describe
    for parameters, others in (
        (given, nulls),
        ({"type": "object"}, {"type": "object", "properties": None}),
        ({}, True),
    ):
        tool, other = {"name": "f", "parameters": parameters}, {"name": "f", "description": None, "parameters": others}
        text = describe([tool], date(2026, 1, 2))
        assert describe([other], date(2026, 1, 2)) == text
    assert "None" not in describe([{**other, "parameters": {"properties": {"a": {"type": None}}}}], date(2026, 1, 2))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("tool", [{"name": "ping"}, {"name": "ping", "parameters": None}])
def test_a_tool_without_parameters_can_be_described(name, tool):
    assert "ping" in TOOL_SYNTAXES.get(name).describe([tool], date(2026, 1, 2))


def test_llama3_tells_the_date():
    assert "Today Date: 02 Jan 2026\n" in TOOL_SYNTAXES.get("llama3").describe([{"name": "f"}], date(2026, 1, 2))


def test_lfm2_writes_python():
    syntax = TOOL_SYNTAXES.get("lfm2")
    made = [ToolCall("f", {"s": 'a "b"', "t": True, "n": None, "l": [False, {"k": "v"}], "x-y": 1})]
    literal = """[f(s="a \\"b\\"", t=True, n=None, l=[False, {"k": "v"}], **{"x-y": 1})]"""
    assert syntax.write(made) == f"<|tool_call_start|>{literal}<|tool_call_end|>"
    assert syntax.parse("<|tool_call_start|>[f(a=true, b=[null])]<|tool_call_end|>") == [
        ToolCall("f", {"a": True, "b": [None]})
    ]


@pytest.mark.parametrize("literal", ["{[1]: 2}", "{1, 2}", "b'a'", "1j", "...", "1e999", "{'a': 1, **{'b': 2}}"])
def test_what_json_does_not_have_is_no_argument_of_lfm2(literal):
    """The arguments of a call are sent as JSON."""
    assert TOOL_SYNTAXES.get("lfm2").parse(f"<|tool_call_start|>[f(x={literal})]<|tool_call_end|>") is None


def test_lfm2_reads_other_literals_as_json():
    read = TOOL_SYNTAXES.get("lfm2").parse("<|tool_call_start|>[f(x=(1, -2.5), y={1: 'a' 'b'})]<|tool_call_end|>")
    assert read == [ToolCall("f", {"x": [1, -2.5], "y": {"1": "ab"}})]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_a_word_that_json_does_not_have_is_no_number(name, word):
    syntax = TOOL_SYNTAXES.get(name)
    found = syntax.parse(syntax.write([ToolCall("f", {"a": 12345})]).replace("12345", word))
    assert found is None or found == [ToolCall("f", {"a": word})]


@pytest.mark.parametrize("name", TAGGED)
@pytest.mark.parametrize(
    "parameters",
    [
        None,
        True,
        {"properties": None},
        {"properties": {"x": None}},
        {"properties": {"x": True}},
        {"properties": {"x": {"type": None}}},
    ],
)
def test_a_schema_that_says_nothing_leaves_the_type_to_the_text(name, parameters):
    """Clients send `parameters: null` for a tool without any, and `true` is a schema that allows everything."""
    syntax, made = TOOL_SYNTAXES.get(name), [ToolCall("f", {"x": 1})]
    tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
    assert syntax.parse(syntax.write(made), [tool]) == made


def test_default_describes_enums_and_items():
    tool = {
        "name": "f",
        "parameters": {
            "properties": {
                "a": {"type": "integer", "enum": [1, 2]},
                "b": {"type": "array", "items": {"type": "string"}, "description": "many"},
            },
            "required": ["a"],
        },
    }
    text = TOOL_SYNTAXES.get("default").describe([tool], date(2026, 1, 2))
    assert "  - a (integer, required): , should be one of [1, 2]\n" in text
    assert "  - b (array): many, where each item should be string\n" in text


def test_gemma4_describes_nested_schemas():
    tool = {
        "name": "f",
        "description": "d",
        "parameters": {
            "type": "object",
            "properties": {
                "o": {"type": "object", "properties": {"x": {"type": "array", "items": {"type": "string"}}}}
            },
        },
    }
    assert TOOL_SYNTAXES.get("gemma4").describe([tool], date(2026, 1, 2)) == (
        'declaration:f{description:<|"|>d<|"|>,parameters:{properties:{o:{properties:{x:{items:{type:<|"|>STRING<|"|>},'
        'type:<|"|>ARRAY<|"|>}},type:<|"|>OBJECT<|"|>}},type:<|"|>OBJECT<|"|>}}'
    )


def test_gemma4_describes_each_tool_on_a_line_of_its_own():
    """In alphabetical order of the parameters, as the chat template of the model has them."""
    parameters = {"type": "object", "properties": {"b": {"type": "number"}, "a": {"type": "string"}}}
    tools = [{"name": "f", "parameters": parameters}, {"name": "g"}]
    assert TOOL_SYNTAXES.get("gemma4").describe(tools, date(2026, 1, 2)) == (
        'declaration:f{description:<|"|><|"|>,parameters:{properties:{a:{type:<|"|>STRING<|"|>},'
        'b:{type:<|"|>NUMBER<|"|>}},type:<|"|>OBJECT<|"|>}}\ndeclaration:g{description:<|"|><|"|>}'
    )


def test_glm4_7_line_breaks_are_optional():
    pairs = "<arg_key>a</arg_key><arg_value>1</arg_value><arg_key>b</arg_key><arg_value>x</arg_value>"
    compact = f"<tool_call>f{pairs}</tool_call>"
    assert TOOL_SYNTAXES.get("glm4_moe").parse(compact) == [ToolCall("f", {"a": 1, "b": "x"})]


@pytest.mark.parametrize("name", NAMES)
def test_lists_without_end_are_no_call(name):
    """A model that repeats itself opens one list after the other; Python reads only so many inside each other."""
    syntax = TOOL_SYNTAXES.get(name)
    written = syntax.write([ToolCall("f", {"a": 12345})])
    for deep in ("[" * 100_000, "[" * 100_000 + "]" * 100_000):
        found = syntax.parse(written.replace("12345", deep))
        assert found is None or found == [ToolCall("f", {"a": deep})]


@pytest.mark.parametrize("value", ['"\\ud800"', '"\\udc00\\ud800"', "1e999", "-1e999", "NaN"])
@pytest.mark.parametrize("name", ["default", "llama3", "mistral", "qwen", "glm4"])
def test_a_value_that_no_client_could_read_makes_no_call(name, value):
    """Half of a surrogate pair cannot be encoded, and JSON has no infinity."""
    syntax = TOOL_SYNTAXES.get(name)
    tools = [{"name": "f", "parameters": {}}]
    good = syntax.write([ToolCall("f", {"a": "MARK"})])
    assert syntax.parse(good, tools)
    assert syntax.parse(good.replace('"MARK"', value), tools) is None
    pair = syntax.parse(good.replace("MARK", "\\ud83d\\ude00"), tools)
    assert pair is not None and pair[0].arguments == {"a": "\U0001f600"}
