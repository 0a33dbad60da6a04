"""The gate: random conversations under every chat template equal `apply_chat_template`, token for token.

Each conversation is drawn as the messages of OpenAI's API. A server gets them as they are; the rows of training are
made of the same messages in luthier's types. Nothing of luthier makes the server's side.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from luthier.core.errors import RowError
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.jinja import chat_template
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.openai_messages import openai_messages
from luthier.data.chat.traits import Traits
from luthier.data.rows.tokenize import turn_ids
from luthier.data.templates import get_template, template_names
from luthier.data.types import Dialogue, Message, ToolCall, ToolResult
from tests.matrix import representatives
from tests.trait_programs import MODELS, Model, merging_tokenizer, model_tokenizer

TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "description": f"Does {name}.", "parameters": {"type": "object", "properties": {}}},
    }
    for name in ("weather", "convert")
]
WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    [
        *("", " ", "Hello.", "\nA line first", "\n\n\nthree lines", "a blank behind ", " a blank before", "line\n"),
        *("naïve – 🙂", "你好", "<|im_end|>", "</s>", "{{ x }}", "a\\n\"b\" 'c'", "use <think>tags</think> like this"),
        *("the tag </think> ends it", "<tool_call>", "[/THINK]", "assistant"),
    ]
)
THOUGHTS = st.sampled_from(["", "", "first look", "two\nlines", "a <tag> inside", "6 * 7 = 42 \\o/"])
SWITCHES = {"enable_thinking": True, "thinking": True}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 99) | st.text(st.sampled_from("ab \"\\\n'é🙂<"), max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("xyz"), inner, max_size=2),
    max_leaves=4,
)


@dataclass
class Drawn:
    """A conversation on both sides."""

    system: str | None
    tools: list[Any] | None
    messages: list[Message] = field(default_factory=list)
    served: list[list[dict[str, Any]]] = field(default_factory=list)
    """The messages of OpenAI's API for each message of luthier: several for parallel results."""

    @property
    def dialogue(self) -> Dialogue:
        return Dialogue(tuple(self.messages), self.system, json.dumps(self.tools) if self.tools else "")

    def sent(self, end: int) -> list[dict[str, Any]]:
        """What a client sends up to message `end`."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + [one for part in self.served[:end] for one in part]


@st.composite
def conversations(draw: st.DrawFn, model: Model, has_tools: bool = True) -> Drawn:
    tools = draw(st.sampled_from([None, TOOLS, TOOLS])) if has_tools else None
    drawn = Drawn(draw(st.sampled_from([None, None, "", "Be brief."])), tools)
    thinks, keeps_inline = draw(st.booleans()), draw(st.booleans())
    num_calls = 0
    for _ in range(draw(st.integers(1, 3))):
        question = draw(WORDS)
        add(drawn, Message("user", question), {"role": "user", "content": question})
        for _ in range(draw(st.integers(0, 2)) if drawn.tools else 0):
            ids = [f"abcdef{num_calls + i:03d}" for i in range(draw(st.integers(1, 2)))]
            num_calls += len(ids)
            add_call(draw, drawn, model, ids, draw(THOUGHTS) if thinks else "")
        text, thought = draw(WORDS), draw(THOUGHTS) if thinks else ""
        if thought and keeps_inline:
            inline = f"<think>\n{thought}\n</think>\n\n{text}"
            moved = {"content": text.lstrip("\n"), model.thought_key: thought}
            given = moved if model.moves_inline else {"content": inline}
            add(drawn, Message("assistant", inline), {"role": "assistant", **given})
        else:
            given = {model.thought_key: thought} if thought else {}
            add(drawn, Message("assistant", text, thought=thought), {"role": "assistant", "content": text, **given})
    return drawn


def add(drawn: Drawn, message: Message, *served: dict[str, Any]) -> None:
    drawn.messages.append(message)
    drawn.served.append(list(served))


def add_call(draw: st.DrawFn, drawn: Drawn, model: Any, ids: list[str], thought: str) -> None:
    beside, has_ids = draw(st.sampled_from(["", "", "Let me look."])), draw(st.booleans()) or bool(model.ids)
    calls, results, served_calls, served_results = [], [], [], []
    for call_id in ids:
        name, arguments = draw(st.sampled_from(["weather", "convert"])), draw(st.dictionaries(st.just("city"), VALUES))
        text, own_id = draw(WORDS), call_id if has_ids else ""
        calls.append(ToolCall(name, arguments, own_id))
        results.append(ToolResult(text, own_id))
        function = {"name": name, "arguments": dump(arguments) if model.text_arguments else arguments}
        served_calls.append({**({"id": own_id} if own_id else {}), "type": "function", "function": function})
        result_id = {"tool_call_id": own_id} if own_id else {}
        served_results.append({"role": "tool", "content": text, **result_id})
    given = {model.thought_key: thought} if thought else {}
    answer = {"role": "assistant", "content": beside, **given, "tool_calls": served_calls}
    add(drawn, Message("function", beside, thought=thought, calls=tuple(calls)), answer)
    joined = "\n".join(result.content for result in results)
    add(drawn, Message("observation", joined, results=tuple(results)), *served_results)


def dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def served_ids(tokenizer: Any, drawn: Drawn, end: int, **options: Any) -> list[int]:
    """Of the first `end` messages."""
    return tokenizer.apply_chat_template(
        drawn.sent(end), tools=drawn.tools, tokenize=True, return_dict=False, **SWITCHES, **options
    )


def served_text(tokenizer: Any, drawn: Drawn, end: int, **options: Any) -> str:
    return tokenizer.apply_chat_template(drawn.sent(end), tools=drawn.tools, tokenize=False, **SWITCHES, **options)


def check_rows(tokenizer: Any, drawn: Drawn, rows: list[list[tuple[list[int], list[int]]]]) -> None:
    """Every answer stands behind the ids that a server sends, and what is learned holds all that the data give."""
    index = 1
    for row in rows:
        before: list[int] = []
        for prompt, answer in row:
            before += prompt
            assert before == served_ids(tokenizer, drawn, index, add_generation_prompt=True)
            before += answer
            check_words(drawn.messages[index], tokenizer.decode(answer))
            check_rendering(tokenizer, drawn, index, tokenizer.decode(answer))
            index += 2
    assert index == len(drawn.messages) + 1, "every answer is learned once"


def check_words(message: Message, learned: str) -> None:
    inline = re.match(r"<think>\n(.*?)\n</think>\n\n(.*)", message.content, re.DOTALL)
    thought, text = (inline[1], inline[2]) if inline else (message.thought, message.content)
    unopened, closing, rest = text.partition("</think>")
    if closing and not thought and "<think>" not in unopened and text.strip() not in learned:
        thought, text = unopened, rest  # a template may take the words before an end tag for a thought
    for part in (thought, text):
        assert part.strip() in learned
        learned = learned.replace(part.strip(), "", 1)
    for call in message.calls:
        assert call.name in learned


def check_rendering(tokenizer: Any, drawn: Drawn, index: int, learned: str) -> None:
    """The answer is the text of the template, if that holds all and continues the prompt. The empty thought that only a
    last answer has may be missing."""
    prompt = served_text(tokenizer, drawn, index, add_generation_prompt=True)
    whole = served_text(tokenizer, drawn, index + 1)
    answer = whole.removeprefix(prompt)
    if not whole.startswith(prompt) or not is_complete(drawn.messages[index], answer):
        return
    message = drawn.messages[index]
    without_thought = not message.thought and not message.content.startswith("<think>")
    assert learned == answer or (without_thought and answer.endswith(learned))


def is_complete(message: Message, learned: str) -> bool:
    try:
        check_words(message, re.sub("<[^>]*>$", "", learned))
    except AssertionError:
        return False
    return not message.thought or message.thought in learned


def check(tokenizer: Any, drawn: Drawn, refuses: Sequence[str] = ()) -> None:
    program = ModelChatTemplate(Encoder(tokenizer))
    try:
        rows = turn_ids(program.encoder, program.rows(drawn.dialogue))
    except RowError as refusal:
        assert any(reason in str(refusal) for reason in refuses), refusal
        return
    check_rows(tokenizer, drawn, rows)


def gate(num_conversations: int) -> Any:
    few = settings(max_examples=num_conversations, deadline=None, suppress_health_check=list(HealthCheck))
    return lambda test: few(given(data=st.data())(test))


@pytest.mark.parametrize("name", MODELS)
@gate(25)
def test_rows_are_what_a_server_sends(name, data):
    check(model_tokenizer(name), data.draw(conversations(MODELS[name])), MODELS[name].refuses)


@pytest.mark.thorough
@pytest.mark.parametrize("name", MODELS)
@gate(400)
def test_many_rows_are_what_a_server_sends(name, data):
    check(model_tokenizer(name), data.draw(conversations(MODELS[name])), MODELS[name].refuses)


NAMED = [name for name in template_names() if chat_template(get_template(name)) is not None]


@pytest.mark.parametrize("name", representatives(NAMED, "qwen3", "llama2", "chatml", "seed_oss"))
@gate(20)
def test_rows_of_a_model_saved_with_a_named_format_are_what_a_server_sends(name, data):
    """Its chat template is made of the format, without tools. Thoughts stand between its own tags or in a key."""
    template = get_template(name)
    model = Model("", moves_inline=template.reasons and template.thinking_tags[0].strip() != "<think>")
    check(merging_tokenizer(chat_template(template)), data.draw(conversations(model, has_tools=False)))


@pytest.mark.thorough
@gate(25)
def test_rows_of_smollm2_are_what_a_server_sends(smollm2_folder, data):
    from luthier.model.files.sources import ModelSource
    from luthier.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(ModelSource(str(next(smollm2_folder.rglob("*.gguf")))))
    drawn = data.draw(conversations(Model(""), has_tools=False))
    messages = [
        replace(m, content=kept(tokenizer, m.content), thought=kept(tokenizer, m.thought)) for m in drawn.messages
    ]
    served = [[{key: kept(tokenizer, value) for key, value in one.items()} for one in some] for some in drawn.served]
    check(tokenizer, replace(drawn, system=kept(tokenizer, drawn.system), messages=messages, served=served))


def kept(tokenizer: Any, value: Any) -> Any:
    """A text without the characters whose bytes the vocabulary lacks, as control characters; anything else as it is."""
    if not isinstance(value, str):
        return value
    return "".join(c for c in value if tokenizer.decode(tokenizer.encode(c, add_special_tokens=False)) == c)


IDS = Traits(needs_ids=True, writes_ids=True)
CALLS = (ToolCall("weather", {"city": "Rome"}), ToolCall("weather", {"city": "Bern"}))
WITH_CALLS = (
    Message("user", "?"),
    Message("function", "Look:", calls=CALLS),
    Message("observation", "3\n5", results=(ToolResult("3"), ToolResult("5"))),
    Message("assistant", "3 and 5."),
)


def ids_of(listed: list[dict[str, Any]]) -> tuple[list[str | None], list[str | None]]:
    calls = [call.get("id") for message in listed for call in message.get("tool_calls", ())]
    return calls, [message.get("tool_call_id") for message in listed if message["role"] == "tool"]


def test_an_id_that_the_data_lack_is_never_learned():
    with pytest.raises(RowError, match="writes the ids of calls, and the data give none"):
        openai_messages(WITH_CALLS[:2], IDS, learns_last=True)


def test_in_the_history_ids_are_invented_where_the_template_needs_them():
    invented = ["call00000", "call00001"]
    assert ids_of(openai_messages(WITH_CALLS, IDS, learns_last=True)) == (invented, invented)
    assert ids_of(openai_messages(WITH_CALLS[:2], Traits(needs_ids=True), learns_last=True)) == (invented, [])
    assert ids_of(openai_messages(WITH_CALLS, Traits())) == ([None, None], [None, None])


def test_ids_of_the_data_are_kept_and_results_without_one_have_that_of_their_call():
    calls = (ToolCall("f", {}, "a"), ToolCall("f", {}, "b"))
    named = (WITH_CALLS[0], Message("function", "", calls=calls), *WITH_CALLS[2:])
    for known in (Traits(), IDS):
        assert ids_of(openai_messages(named, known)) == (["a", "b"], ["a", "b"])
    results = (ToolResult("5", "b"), ToolResult("3", "a"))
    swapped = (*named[:2], Message("observation", "5\n3", results=results))
    assert ids_of(openai_messages(swapped, Traits())) == (["a", "b"], ["b", "a"])


@pytest.mark.parametrize("content", ["beside\n<tool_call>{}</tool_call>", "beside\n<tool_call>\n{}\n</tool_call>\n"])
def test_a_line_break_before_calls_in_a_text_is_no_part_of_the_text(content):
    call = dump({"name": "weather", "arguments": {"city": "Rome"}})
    message = Message("function", content.replace("{}", call))
    (listed,) = openai_messages([message], Traits())
    assert (listed["content"], len(listed["tool_calls"])) == ("beside", 1)
    (listed,) = openai_messages([Message("function", "beside\n", calls=CALLS)], Traits())
    assert listed["content"] == "beside\n"


def test_results_have_the_names_that_the_data_give():
    result = ToolResult("3", "a", "weather")
    (listed,) = openai_messages([Message("observation", "3", results=(result,))], Traits())
    assert listed == {"role": "tool", "content": "3", "tool_call_id": "a", "name": "weather"}


@pytest.mark.parametrize(
    ("traits", "drops", "message", "given"),
    [
        (Traits("reasoning"), False, Message("assistant", "a", thought="t"), {"content": "a", "reasoning": "t"}),
        (Traits(), False, Message("assistant", "a", thought="t"), {"content": "a", "reasoning_content": "t"}),
        (Traits("thinking"), False, Message("assistant", "<think>t</think>a"), {"content": "a", "thinking": "t"}),
        (Traits("thinking", True), False, Message("assistant", "<think>t</think>a"), {"content": "<think>t</think>a"}),
        (Traits(), False, Message("assistant", "<think>t</think>a"), {"content": "<think>t</think>a"}),
        (Traits("thinking"), False, Message("assistant", "a <think>t</think>"), {"content": "a <think>t</think>"}),
        (Traits("thinking"), True, Message("assistant", "a", thought="t"), {"content": "a"}),
        (Traits(), True, Message("assistant", "<think>t</think>a"), {"content": "a"}),
    ],
)
def test_thoughts_stand_where_the_template_reads_them(traits, drops, message, given):
    assert openai_messages([message], traits, drops_thoughts=drops) == [{"role": "assistant", **given}]
