"""Rendering against the reference's texts, by properties."""

import json
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import RowError
from luthier.data.chat.render import as_text, render
from luthier.data.templates import get_template, template_names
from luthier.data.types import Message, ToolCall
from tests.deep import DEPTHS, deep_tools

FACTS = Path(__file__).parents[1] / "templates"
CONVERSATIONS = {c["id"]: c for c in json.loads((FACTS / "conversations.json").read_text("utf-8"))}
EXPECTED = [json.loads(line) for line in (FACTS / "expected.jsonl").read_text("utf-8").splitlines()]
RENDERED_ON = date(2026, 11, 22)

NO_CLOSING_TAG = "the reference leaves </tool_call> out"
CALL = "<arg_value>celsius</arg_value>"
CORRECTED = {
    ("glm4_moe", "tool_call"): (NO_CLOSING_TAG, [(CALL, f"{CALL}\n</tool_call>")]),
    ("glm4_5v", "tool_call"): (NO_CLOSING_TAG, [(CALL, f"{CALL}\n</tool_call>")]),
    ("glm4_7", "tool_call"): (NO_CLOSING_TAG, [(CALL, f"{CALL}\n</tool_call>")]),
    ("aeva", "tool_call"): (NO_CLOSING_TAG, [(CALL, f"{CALL}\n</tool_call>")]),
    ("minimax2", "tool_call"): (
        "the reference leaves <minimax:tool_call> out",
        [
            ('<invoke name="get_weather">', '\n<minimax:tool_call>\n<invoke name="get_weather">'),
            ("celsius</parameter>\n</invoke>", "celsius</parameter>\n</invoke>\n</minimax:tool_call>"),
        ],
    ),
    ("seed_oss", "tool_call"): (
        "the reference begins a call with a second bos and does not close <function=",
        [("<BOS>\n\n<seed:tool_call>\n<function=get_weather\n", "<seed:tool_call>\n<function=get_weather>\n")],
    ),
    ("granite4", "tool_call"): (
        "the reference opens the answer to a tool without <|end_of_role|>, in a role that the model does not have",
        [
            (
                '<|start_of_role|>tool<|end_of_role|>{"temp": 21}<|end_of_text|>\n<|start_of_role|>assistant\n',
                '<|start_of_role|>user<|end_of_role|>\n<tool_response>\n{"temp": 21}\n</tool_response><|end_of_text|>\n'
                "<|start_of_role|>assistant<|end_of_role|>",
            )
        ],
    ),
    ("phi4_mini", "tool_call"): (
        "the reference writes calls in a syntax that the model does not know",
        [
            (
                'Action: get_weather\nAction Input: {"city": "Paris", "unit": "celsius"}',
                '<|tool_call|>[{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}}]'
                "<|/tool_call|>",
            )
        ],
    ),
}
"""(format, conversation) -> why the reference is not followed, and what is different in its text."""
LOST_PREFIX = "phi_small"
"""The reference loses this format's prefix: every text begins with the tokenizer's bos as well."""


def corrected(expected: dict) -> dict:
    """What the reference should have written."""
    _, changes = CORRECTED.get((expected["template"], expected["conversation"]), ("", []))
    text = json.dumps(expected, ensure_ascii=False)
    for wrong, right in changes:
        wrong, right = (json.dumps(part, ensure_ascii=False)[1:-1] for part in (wrong, right))
        assert text.count(wrong) >= 2, "the fault is in the training text and in the inference text"
        text = text.replace(wrong, right)
    right = json.loads(text)
    if expected["template"] == LOST_PREFIX:
        right["turns"][0][0] = "<BOS>" + right["turns"][0][0]
        right["inference_prompt"] = "<BOS>" + right["inference_prompt"]
    return right


def messages_of(conversation: dict) -> tuple[Message, ...]:
    return tuple(Message(m["role"], m["content"]) for m in conversation["messages"])


@pytest.mark.parametrize("name", template_names())
def test_equal_to_the_reference(name):
    rows = [row for row in EXPECTED if row["template"] == name]
    assert [row["conversation"] for row in rows] == list(CONVERSATIONS)
    for row in rows:
        conversation = CONVERSATIONS[row["conversation"]]
        given = {key: conversation[key] for key in ("system", "tools", "enable_thinking") if key in conversation}
        template, messages = get_template(name), messages_of(conversation)
        turns = render(template, messages, purpose="train", today=RENDERED_ON, **given)
        (last,) = render(template, messages, purpose="infer", today=RENDERED_ON, **given)
        assert {
            "template": name,
            "conversation": row["conversation"],
            "turns": [[as_text(turn.prompt), as_text(turn.answer)] for turn in turns],
            "inference_prompt": as_text(last.prompt),
            "response": as_text(last.answer),
        } == corrected(row)


def test_every_correction_is_of_a_known_format():
    assert all(name in template_names() and conversation in CONVERSATIONS for name, conversation in CORRECTED)


def test_tools_without_a_system_text():
    """MOSS-VL begins with them; other formats keep the blank line that follows a system text."""
    tools = json.dumps([{"name": "f", "description": "", "parameters": {}}])

    def prompt(name, **given):
        (turn,) = render(get_template(name), (Message("user", "x"),), tools=tools, purpose="infer", **given)
        return as_text(turn.prompt)

    assert prompt("moss_vl").startswith("<|im_start|>system\n# Tools\n\nYou may call")
    assert prompt("qwen3").startswith("<|im_start|>system\n\n\n# Tools\n\nYou may call")
    assert prompt("moss_vl", system="s").startswith("<|im_start|>system\ns\n\n# Tools")


words = st.text(st.characters(codec="utf-8", exclude_characters="<>{}"), max_size=20)
dialogues = st.lists(st.tuples(words, words), min_size=1, max_size=3).map(
    lambda pairs: tuple(m for user, answer in pairs for m in (Message("user", user), Message("assistant", answer)))
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(template_names()), dialogues, words)
def test_training_and_inference_agree(name, messages, system):
    """For formats that do not reason, the pieces of all turns in training are the pieces at inference."""
    template = get_template(name)
    turns = render(template, messages, system=system, purpose="train")
    (last,) = render(template, messages, system=system, purpose="infer")
    assert len(turns) == len(messages) // 2
    if not template.reasons:
        assert tuple(p for turn in turns for p in (*turn.prompt, *turn.answer)) == (*last.prompt, *last.answer)
    assert last.answer == turns[-1].answer
    (waiting,) = render(template, messages[:-1], system=system, purpose="infer")
    assert waiting.answer == () and waiting.prompt == last.prompt


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(template_names()), dialogues)
def test_every_answer_ends_as_the_format_ends_it(name, messages):
    template = get_template(name)
    (*_, content) = (
        i for i, piece in enumerate(template.assistant) if isinstance(piece, str) and "{{content}}" in piece
    )
    ending = template.assistant[content].partition("{{content}}")[2]
    for turn in render(template, messages, purpose="train"):
        if template.assistant[content + 1 :]:
            assert turn.answer[-len(template.assistant[content + 1 :]) :] == template.assistant[content + 1 :]
        elif ending:
            assert turn.answer[-1].endswith(ending)
        else:
            assert template.efficient_eos or name == "empty"


def test_placeholders_in_the_content_stay():
    (turn,) = render(get_template("chatml"), (Message("user", "{{content}} {{idx}}"),), purpose="infer")
    assert as_text(turn.prompt) == "<|im_start|>user\n{{content}} {{idx}}<|im_end|>\n<|im_start|>assistant\n"


def test_empty_pieces_are_left_out():
    (turn,) = render(get_template("empty"), (Message("user", ""), Message("assistant", "")), purpose="train")
    assert turn.prompt == turn.answer == ()


THOUGHTS = (
    Message("user", "a"),
    Message("assistant", "<think>\nx\n</think>\n\nA"),
    Message("user", "b"),
    Message("assistant", "B"),
)
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("thinking", "first", "second"),
    [
        (True, ("", "<think>\nx\n</think>\n\nA"), ("", EMPTY + "B")),
        (None, ("", "<think>\nx\n</think>\n\nA"), (EMPTY, "B")),
        (False, (EMPTY, "A"), (EMPTY, "B")),
    ],
)
def test_thinking_in_training(thinking, first, second):
    """What the prompt ends with and what is answered: an empty thought is learned only with thinking on."""
    turns = render(get_template("qwen3"), THOUGHTS, purpose="train", enable_thinking=thinking)
    for turn, (lead, answer) in zip(turns, (first, second), strict=True):
        assert as_text(turn.prompt).partition("assistant\n")[2] == lead
        assert as_text(turn.answer) == answer + "<|im_end|>\n"


@pytest.mark.parametrize("thinking", [True, False, None])
def test_masked_history_looks_as_at_inference(thinking):
    """Without past thoughts the earlier turns have neither a thought nor an empty one."""
    template = get_template("qwen3")
    turns = render(template, THOUGHTS, purpose="train", enable_thinking=thinking, keep_past_thinking=False)
    (last,) = render(template, THOUGHTS, purpose="infer", enable_thinking=thinking)
    assert tuple(p for turn in turns for p in (*turn.prompt, *turn.answer)) == (*last.prompt, *last.answer)
    assert as_text(turns[0].answer) == "A<|im_end|>\n" and "think" not in as_text(turns[0].prompt)
    kept = render(template, THOUGHTS, purpose="train", keep_past_thinking=False, preserve_thinking=True)
    assert as_text(kept[0].answer).startswith("<think>\nx")


@pytest.mark.parametrize(("thinking", "lead"), [(True, ""), (False, EMPTY), (None, EMPTY)])
def test_preserved_history_is_as_it_was_said(thinking, lead):
    """With its thoughts, and with no empty one where there was none."""
    messages = (*THOUGHTS, Message("user", "c"))
    (turn,) = render(get_template("qwen3"), messages, purpose="infer", enable_thinking=thinking, preserve_thinking=True)
    said = [as_text((piece,)) for piece in turn.prompt]
    assert f"{THOUGHTS[1].content}<|im_end|>\n" in said and "B<|im_end|>\n" in said
    assert as_text(turn.prompt).count(EMPTY) == bool(lead) == as_text(turn.prompt).endswith(EMPTY)


@pytest.mark.parametrize(("thinking", "lead"), [(True, ""), (False, EMPTY), (None, EMPTY)])
def test_waiting_prompt(thinking, lead):
    """With thinking on, the model opens its own thought."""
    (turn,) = render(get_template("qwen3"), THOUGHTS[:3], purpose="infer", enable_thinking=thinking)
    assert as_text(turn.prompt).endswith("b<|im_end|>\n<|im_start|>assistant\n" + lead)
    assert turn.prompt.count(EMPTY) == (thinking is not True), "the empty thought is a piece of its own"


CALL_JSON = '{"name": "f", "arguments": {"q": "<think>\\nno\\n</think>\\n\\n</tool_call>"}}'


def call_text(content: str, name: str = "qwen3", **given) -> str:
    messages = (Message("user", "a"), Message("function", content))
    return as_text(render(get_template(name), messages, purpose="train", **given)[0].answer)


def test_calls_as_they_come():
    """Bare, as a list, after a thought, between tags with text around; arguments as JSON text are not encoded twice."""
    written = f"<tool_call>\n{CALL_JSON}\n</tool_call>"
    assert call_text(CALL_JSON) == f"{EMPTY}{written}<|im_end|>\n"
    assert call_text(f"[{CALL_JSON}, {CALL_JSON}]") == f"{EMPTY}{written}\n{written}<|im_end|>\n"
    assert call_text(f"<think>\nx\n</think>\n\n{CALL_JSON}") == f"<think>\nx\n</think>\n\n{written}<|im_end|>\n"
    assert call_text(f"<think>\nx\n</think>\n\n{CALL_JSON}", enable_thinking=False) == f"{written}<|im_end|>\n"
    simple = '{"name": "f", "arguments": {"a": 1}}'
    around = f"I look.\n<tool_call>{simple}</tool_call><tool_call>{simple}</tool_call>"
    assert (
        call_text(around)
        == f"{EMPTY}I look.\n" + "\n".join([f"<tool_call>\n{simple}\n</tool_call>"] * 2) + "<|im_end|>\n"
    )
    as_json_text = json.dumps({"name": "f", "arguments": '{"a": 1}'})
    assert call_text(as_json_text) == f"{EMPTY}<tool_call>\n{simple}\n</tool_call><|im_end|>\n"


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("mistral", ' I look.\n[TOOL_CALLS] [{"name": "f", "arguments": {}}]<EOS>'),
        ("ministral", 'I look.\n[TOOL_CALLS][{"name": "f", "arguments": {}}]<EOS>'),
        ("glm4", "I look.\nf\n{}"),
        ("gemma4", "<|channel>thought\nx<channel|>I look.\n<|tool><|tool_call>call:f{}<tool_call|><tool|>"),
        ("ernie_vl", "\nAssistant: <think>\nx\n</think>\n\nI look.\nAction: f\nAction Input: {}<|end_of_sentence|>"),
    ],
)
def test_text_stands_before_the_mark_that_opens_calls(name, answer):
    """A server takes what comes after [TOOL_CALLS] for a list of calls. In other formats the mark opens any answer."""
    template = get_template(name)
    thought = "x" if template.reasons else ""
    messages = (Message("user", "a"), Message("function", "I look.", thought=thought, calls=(ToolCall("f", {}),)))
    assert as_text(render(template, messages, purpose="train")[0].answer) == answer


def test_a_thought_before_a_seed_call_ends_its_line():
    text = call_text('<seed:think>x</seed:think>{"name": "f", "arguments": {}}', "seed_oss")
    assert text.startswith("<seed:think>x</seed:think>\n<seed:tool_call>\n<function=f>\n</function>")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("no call", "not JSON"),
        ("[]", "holds no call"),
        ('{"name": "f"}', "name and arguments"),
        ('{"name": "f", "arguments": [1]}', "name and arguments"),
        ('{"name": "f", "arguments": "text"}', "name and arguments"),
        ("<tool_call>{broken</tool_call>", "name and arguments"),
        ("<think>\nx\n</think>\n\nno call", "name and arguments"),
    ],
)
def test_malformed_calls(content, reason):
    with pytest.raises(RowError, match=reason):
        call_text(content)


def test_glm4_writes_one_call():
    with pytest.raises(RowError, match="one call"):
        call_text('[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]', "glm4")


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        *[("no", "not JSON"), ("{}", "not a list"), ('["f"]', "not an object"), ("[{}]", "not an object")],
        *((deep_tools(depth), "the tools are not JSON: it is nested more than 100 levels deep") for depth in DEPTHS),
    ],
)
def test_malformed_tools(tools, reason):
    with pytest.raises(RowError, match=reason):
        render(get_template("chatml"), (Message("user", "a"),), tools=tools, purpose="infer")


def test_an_empty_list_of_tools_is_no_tools():
    (turn,) = render(get_template("chatml"), (Message("user", "a"),), tools="[]", purpose="infer")
    assert as_text(turn.prompt) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("name", template_names())
def test_a_thought_given_apart_is_written_as_if_it_stood_in_the_text(name):
    """Between the tags of the format, wherever the thinking options let a thought stand."""
    template = get_template(name)
    opening, closing = template.thinking_tags
    question = Message("user", "a")
    for role, text, calls in (("assistant", "A", ()), ("function", "I look.", (ToolCall("f", {"x": 1}),))):
        apart = (question, Message(role, f"\n{text}", thought="\nx\ny\n", calls=calls))
        inline = (question, Message(role, f"{opening}x\ny{closing}{text}", calls=calls))
        for purpose in ("train", "infer"):
            for thinking in (True, None):
                written = render(template, apart, purpose=purpose, enable_thinking=thinking)
                assert written == render(template, inline, purpose=purpose, enable_thinking=thinking)
                assert "x\ny" in as_text(written[-1].answer)
            left_out = as_text(render(template, apart, purpose=purpose, enable_thinking=False)[-1].answer)
            assert "x\ny" not in left_out and text in left_out


def test_tags_that_an_answer_quotes_stay():
    """In every position of a conversation, with thinking on or off: they are words, not a thought."""
    quoting = Message("assistant", "\nWrite <think>\nthis\n</think>\n\n first.")
    for thinking in (True, False, None):
        messages = (Message("user", "a"), quoting, Message("user", "b"), quoting)
        for turn in render(get_template("qwen3"), messages, purpose="train", enable_thinking=thinking):
            assert as_text(turn.answer).removeprefix(EMPTY) == quoting.content + "<|im_end|>\n"
            assert as_text((*turn.prompt, *turn.answer)).count(EMPTY) == 1
        (last,) = render(get_template("qwen3"), messages, purpose="infer", enable_thinking=thinking)
        assert as_text(last.prompt).count(quoting.content) == 1


@pytest.mark.parametrize("thought", ["<think>x</think>\n", " <think>\n\nx </think>", "<think>\nx\n</think>\n\n"])
def test_a_thought_is_left_out_whatever_whitespace_is_around_its_tags(thought):
    messages = (Message("user", "a"), Message("assistant", f"{thought}A"))
    (turn,) = render(get_template("qwen3"), messages, purpose="train", enable_thinking=False)
    assert as_text(turn.answer) == "A<|im_end|>\n"


@pytest.mark.parametrize("name", template_names())
def test_an_empty_system_text_that_is_given_stays_empty(name):
    template = replace(get_template(name), default_system="Default text.")
    for system, found in ((None, True), ("", False)):
        (turn,) = render(template, (Message("user", "a"),), system=system, purpose="infer")
        assert ("Default text." in as_text(turn.prompt)) is found


@pytest.mark.parametrize("name", template_names())
def test_calls_given_as_objects_are_written_like_those_in_json_text(name):
    template = get_template(name)
    calls = (ToolCall("f", {"city": "Zürich"}, "id1"), ToolCall("g", {}, "id2"))
    calls = calls[:1] if template.call_syntax == "glm4" else calls
    text = json.dumps([{"name": call.name, "arguments": call.arguments} for call in calls], ensure_ascii=False)
    for content, before in (("", ""), ("I look.", "I look.\n"), ("I look.\n", "I look.\n\n")):
        as_objects = (Message("user", "a"), Message("function", content, calls=calls))
        as_text = (Message("user", "a"), Message("function", f"{before}<tool_call>{text}</tool_call>"))
        assert render(template, as_objects, purpose="train") == render(template, as_text, purpose="train")
