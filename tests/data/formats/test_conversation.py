"""From messages to an example: messages that are one, whole conversations as answers, columns of JSON text."""

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import RowError
from luthier.data.types import Message, Preference, Span, ToolCall, ToolResult
from tests.data.test_formats import (
    ALPACA,
    OPENAI,
    OPENAI_RANKED,
    SHAREGPT,
    SHAREGPT_RANKED,
    A,
    T,
    U,
    assistant,
    call,
    chat,
    columns,
    read,
    said,
    spec,
    user,
)

CALLS = (ToolCall("w", {"city": "Oslo"}), ToolCall("w", {"city": "Bergen"}))
OSLO, BERGEN = (json.dumps({"name": made.name, "arguments": made.arguments}) for made in CALLS)


class TestMessagesThatAreOne:
    @pytest.mark.parametrize(
        ("said_calls", "content"),
        [
            ([("function_call", OSLO), ("function_call", BERGEN)], ""),
            ([("gpt", "I look."), ("function_call", f"[{OSLO}, {BERGEN}]")], "I look."),
            ([("gpt", "I look."), ("function_call", OSLO), ("function_call", BERGEN)], "I look."),
            (
                [("function_call", f"<think>\nhm\n</think>\n\n{OSLO}"), ("function_call", BERGEN)],
                "<think>\nhm\n</think>\n\n",
            ),
            ([("function_call", f"I look.\n<tool_call>{OSLO}</tool_call>"), ("function_call", BERGEN)], "I look."),
        ],
    )
    def test_calls_in_a_row_are_one_answer(self, said_calls, content):
        row = said(("human", "q"), *said_calls, ("observation", "3"), ("observation", "5"), ("gpt", "3 and 5."))
        assert read(row, SHAREGPT).messages == (
            user("q"),
            Message("function", content, calls=CALLS),
            Message(
                "observation", "3\n</tool_response>\n<tool_response>\n5", results=(ToolResult("3"), ToolResult("5"))
            ),
            assistant("3 and 5."),
        )

    def test_one_message_of_calls_stays_as_it_is_written(self):
        row = said(("human", "q"), ("function_call", f"[{OSLO}, {BERGEN}]"), ("observation", "3"), ("gpt", "a"))
        assert read(row, SHAREGPT).messages[1:3] == (
            Message("function", f"[{OSLO}, {BERGEN}]"),
            Message("observation", "3"),
        )

    def test_a_thought_in_the_first_of_them(self):
        row = said(("human", "q"), ("function_call", OSLO), ("function_call", BERGEN))
        row["conversations"][1]["reasoning"] = "hm"
        assert read(row, SHAREGPT).messages[1] == Message("function", "", thought="hm", calls=CALLS)

    def test_weights_of_results_that_are_joined(self):
        row = said(("human", "q"), ("function_call", OSLO), ("observation", "33"), ("observation", "5"), ("gpt", "a"))
        row["conversations"][3]["loss"] = 0.5
        message = read(row, SHAREGPT).messages[2]
        assert message.loss == (Span(len(message.content) - 1, len(message.content), 0.5),)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"loss": 0}, "message 2 and message 3 are one answer, and each has a 'loss' of its own"),
            ({"thinking": "hm"}, "message 3 has a thought after the beginning of its answer, message 2"),
            ({"value": "no call"}, "a function message is not JSON of a call: 'no call'"),
        ],
    )
    def test_calls_that_cannot_be_one_answer(self, change, reason):
        row = said(
            ("human", "q"), ("function_call", OSLO), ("function_call", BERGEN), ("observation", "3"), ("gpt", "a")
        )
        row["conversations"][2] |= change
        with pytest.raises(RowError) as caught:
            read(row, SHAREGPT)
        assert str(caught.value) == reason


S, B = {"role": "system", "content": "s"}, {"role": "assistant", "content": "b"}
WHOLE = replace(OPENAI_RANKED, columns=columns(chosen="good", rejected="bad"))


class TestWholeConversations:
    @pytest.mark.parametrize(
        ("description", "prompt"),
        [
            (OPENAI_RANKED, [U]),
            (OPENAI_RANKED, []),
            (OPENAI_RANKED, None),
            (OPENAI_RANKED, "q"),
            (OPENAI_RANKED, json.dumps([U])),
            (WHOLE, [U]),
        ],
    )
    def test_the_shared_beginning_is_the_prompt(self, description, prompt):
        row = {"messages": prompt, "good": [U, A], "bad": [U, B]}
        assert read(row, description) == Preference((user("q"),), assistant("a"), assistant("b"))

    @pytest.mark.parametrize("as_text", [False, True])
    def test_a_longer_beginning_with_a_system_text_and_tools(self, as_text):
        ask = {"role": "assistant", "tool_calls": [call()]}
        begin = [S, U, ask, T]
        held = [json.dumps(v) if as_text else v for v in ([*begin, A], [*begin, B])]
        example = read({"good": held[0], "bad": held[1]}, WHOLE)
        assert (example.system, len(example.prompt)) == ("s", 3)
        assert (example.chosen, example.rejected) == (assistant("a"), assistant("b"))

    def test_equal_conversations_are_equal_answers(self):
        """The doctor names the pair; that all messages are shared is no reason to refuse the row."""
        example = read({"good": [U, A], "bad": [U, A]}, WHOLE)
        assert example.chosen == example.rejected == assistant("a")

    def test_lists_of_the_answer_alone(self):
        assert read({"messages": [S, U], "good": [A], "bad": [B]}, OPENAI_RANKED) == Preference(
            (user("q"),), assistant("a"), assistant("b"), system="s"
        )
        assert read({"messages": [U], "good": json.dumps(A), "bad": B}, OPENAI_RANKED).chosen == assistant("a")

    def test_a_prompt_with_the_rest_of_the_conversation_in_the_answers(self):
        row = {"messages": [U, A], "good": [U, B], "bad": [U, A]}
        assert read(row, OPENAI_RANKED).prompt == (user("q"), assistant("a"), user("q"))

    def test_sharegpt(self):
        good, bad = (said(("human", "q"), ("gpt", text))["conversations"] for text in ("a", "b"))
        wanted = Preference((user("q"),), assistant("a"), assistant("b"))
        for prompt in ({}, {"conversations": [{"from": "human", "value": "q"}]}):
            assert read({**prompt, "good": good, "bad": bad}, SHAREGPT_RANKED) == wanted

    def test_natural_names(self):
        description = spec("openai", ranking=True, columns=columns(chosen="good", rejected="bad"))
        assert read({"good": [U, A], "bad": [U, B]}, description).chosen == assistant("a")

    @pytest.mark.parametrize(
        ("row", "reason"),
        [
            (
                {"good": [U, A, U, A], "bad": [U, B]},
                "column 'good' has 3 messages after the beginning that both answers share, not one message "
                "-> let the two conversations differ in their last message alone",
            ),
            (
                {"good": [U, A], "bad": [U, B, U]},
                "column 'bad' has 2 messages after the beginning that both answers share, not one message "
                "-> let the two conversations differ in their last message alone",
            ),
            ({"good": [S, U, A], "bad": [U, B]}, "column 'good' has 3 messages after the beginning"),
            (
                {"good": [U, A, U], "bad": [U, A, {**U, "content": "x"}]},
                "the conversation ends with message 2 of column",
            ),
            ({"good": [U, A, A], "bad": [U, A, B]}, "the conversation ends with message 2 of column 'good' of role"),
            ({"good": [A], "bad": [B]}, "column 'messages' is missing"),
            ({"good": [], "bad": [B]}, "column 'good' has no messages"),
            ({"good": "[{]", "bad": [B]}, "column 'good' is not JSON"),
            ({"good": ["a", A], "bad": [U, B]}, "message 1 of column 'good' is text, not an object"),
            ({"good": [U, {**U, "content": "x"}], "bad": [U, B]}, "message 2 of column 'good' has role 'user' where"),
        ],
    )
    def test_what_does_not_fit_is_named(self, row, reason):
        with pytest.raises(RowError) as caught:
            read(row, OPENAI_RANKED)
        assert str(caught.value).startswith(reason)

    def test_answers_alone_without_a_column_of_the_prompt(self):
        with pytest.raises(
            RowError, match="the answers are not whole conversations, and `columns` names no `messages`"
        ):
            read({"good": [A], "bad": [B]}, WHOLE)

    def test_alpaca_names_the_format_that_reads_them(self):
        description = spec(ranking=True, columns=columns(prompt="prompt", chosen="good", rejected="bad"))
        with pytest.raises(
            RowError, match=r'column .good. is a list of messages, not text -> .*"formatting": "openai"'
        ):
            read({"prompt": "q", "good": [U, A], "bad": [U, B]}, description)


class TestJsonText:
    def test_conversations_in_a_column_of_text(self):
        row = chat(U, {"role": "assistant", "content": None, "tool_calls": [call()]}, T, A)
        assert read({"messages": json.dumps(row["messages"])}, OPENAI) == read(row, OPENAI)
        assert read({"messages": json.dumps(row["messages"])}, spec("openai")) == read(row, spec("openai"))
        row = said(("human", "q"), ("gpt", "a"))
        assert read({"conversations": f" {json.dumps(row['conversations'])}\n"}, SHAREGPT) == read(row, SHAREGPT)

    def test_history(self):
        row = {"instruction": "c", "output": "d", "history": [["a", "b"]]}
        assert read({**row, "history": json.dumps(row["history"])}, ALPACA) == read(row, ALPACA)
        assert read({**row, "history": ""}, ALPACA) == read({**row, "history": None}, ALPACA)

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("[{'role': 'user'}]", "column 'messages' is not JSON: Expecting property name enclosed in double quotes"),
            ("{}", "column 'messages' is an object, not a list of messages"),
            ("hello", "column 'messages' is text, not a list of messages"),
            ("", "column 'messages' is text, not a list of messages"),
        ],
    )
    def test_other_text_is_refused(self, text, reason):
        with pytest.raises(RowError) as caught:
            read({"messages": text}, OPENAI)
        assert str(caught.value).startswith(reason)


texts = st.text(max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
anything = json_values | st.floats() | st.binary(max_size=2) | st.dates()
roles = st.sampled_from(["user", "assistant", "tool", "system", "developer", "function", "User", "x"])
keys = st.sampled_from(
    ["role", "content", "tool_calls", "function_call", "reasoning", "thinking", "tool_call_id", "name", "loss", "train"]
)
messages = st.fixed_dictionaries({"role": roles, "content": texts | anything}) | st.dictionaries(keys, anything)


@given(st.lists(messages, max_size=4), st.sampled_from([OPENAI, SHAREGPT, OPENAI_RANKED, WHOLE, spec("openai")]))
def test_any_row_is_read_or_refused_with_a_reason(listed, description):
    renamed = [{{"role": "from", "content": "value"}.get(key, key): value for key, value in m.items()} for m in listed]
    row = {"messages": listed, "conversations": renamed, "good": listed, "bad": listed[::-1]}
    try:
        read(row, description)
    except RowError as refusal:
        assert str(refusal) and refusal.kind


texts_of_one = st.text(min_size=1, max_size=4)
called = st.tuples(texts_of_one, st.dictionaries(texts, json_values, max_size=2))
turns = st.lists(st.tuples(texts, st.none() | texts_of_one, st.lists(called, max_size=3)), min_size=1, max_size=3)


@given(turns)
def test_nothing_of_a_conversation_is_lost(talk):
    """Texts, thoughts, calls with their ids and results come out as they went in, from objects and from JSON text."""
    listed, wanted = [], []
    for text, thought, called in talk:
        listed.append({"role": "user", "content": text})
        wanted.append(user(text))
        made = [
            {"id": str(i), "function": {"name": name, "arguments": given}} for i, (name, given) in enumerate(called)
        ]
        listed.append({"role": "assistant", "content": "I look.", "reasoning_content": thought, "tool_calls": made})
        inside = tuple(ToolCall(name, given, str(i)) for i, (name, given) in enumerate(called))
        told = (thought or "") if (thought or "").strip() else ""
        wanted.append(Message("function" if made else "assistant", "I look.", thought=told, calls=inside))
    assert read(chat(*listed), OPENAI).messages == tuple(wanted)
    assert read({"messages": json.dumps(listed)}, OPENAI).messages == tuple(wanted)
