"""One message of a row in all the ways that data hold it: texts, parts, thoughts, calls, results, names of roles."""

import datetime
import json

import pytest

from luthier.core.errors import RowError
from luthier.data.types import Dialogue, Message, ToolCall, ToolResult
from tests.data.test_formats import OPENAI, SHAREGPT, A, T, U, call, chat, read, said, spec

LOOK = ToolCall("weather", {"city": "Zürich", "days": 2})
ARGUMENTS = {"city": "Zürich", "days": 2}
FUNCTION = {"name": "weather", "arguments": ARGUMENTS}


def both(asked, answer, *more):
    """The messages of the same conversation, read by openai and by sharegpt. Messages are in OpenAI's words."""
    tags = {"user": "human", "assistant": "gpt", "tool": "observation"}
    messages = [asked, answer, *more]
    renamed = [
        {"from": tags[m["role"]], **({"value": m["content"]} if "content" in m else {}),
         **{k: v for k, v in m.items() if k not in ("role", "content")}}
        for m in messages
    ]  # fmt: skip
    return [read(chat(*messages), OPENAI).messages, read({"conversations": renamed}, SHAREGPT).messages]


def answers(message, *more):
    return [messages[1] for messages in both(U, {"role": "assistant", **message}, *more)]


class TestThoughts:
    @pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
    def test_a_thought_in_a_key_of_its_own(self, key):
        for answer in answers({"content": "6", key: "two times three"}):
            assert answer == Message("assistant", "6", thought="two times three")

    def test_a_thought_beside_calls(self):
        for answer in answers({"content": None, "reasoning_content": "hm", "tool_calls": [call()]}, T, A):
            assert answer == Message("function", "", thought="hm", calls=(ToolCall("f", {"x": 1}, "1"),))

    @pytest.mark.parametrize("parts", ["thinking", "reasoning"])
    def test_a_thought_among_the_parts_of_the_content(self, parts):
        content = [{"type": parts, parts: "hm"}, {"type": "text", "text": "6"}]
        nested = [{"type": parts, parts: [{"type": "text", "text": "hm"}]}, {"type": "text", "text": "6"}]
        for held in (content, nested):
            for answer in answers({"content": held}):
                assert answer == Message("assistant", "6", thought="hm")

    @pytest.mark.parametrize("nothing", [None, "", "\n"])
    def test_no_thought(self, nothing):
        for answer in answers({"content": "6", "reasoning_content": nothing, "thinking": None}):
            assert answer == Message("assistant", "6")

    def test_the_same_thought_twice_is_one(self):
        for answer in answers({"content": "6", "reasoning_content": "hm", "reasoning": "hm\n"}):
            assert answer.thought == "hm"
        for answer in answers({"content": "<think>\nhm\n</think>\n\n6", "reasoning_content": "hm"}):
            assert answer == Message("assistant", "<think>\nhm\n</think>\n\n6")

    @pytest.mark.parametrize(
        ("message", "reason"),
        [
            (
                {"content": "<think>x</think>6", "reasoning": "hm"},
                "message 2 has a thought in 'reasoning' and another one in its text -> keep one of them",
            ),
            (
                {"content": "6", "reasoning": "hm", "thinking": "oh"},
                "message 2 has other thoughts in 'reasoning' than in 'thinking' -> keep one of them",
            ),
            (
                {"content": "6", "reasoning_content": {"text": "hm"}},
                "'reasoning_content' of message 2 is an object, not text",
            ),
        ],
    )
    def test_thoughts_that_cannot_be_one(self, message, reason):
        with pytest.raises(RowError) as caught:
            read(chat(U, {"role": "assistant", **message}), OPENAI)
        assert str(caught.value) == reason

    def test_a_question_has_no_thought(self):
        question = {"role": "user", "content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "6"}]}
        with pytest.raises(RowError, match="message 1 of role 'user' has a thought, which only an answer can have"):
            read(chat(question, A), OPENAI)


class TestParts:
    def test_parts_of_text_are_joined_in_every_message(self):
        parts = [{"type": "text", "text": "12"}, {"type": "text", "text": ":00", "image_url": None}]
        ask = {"role": "assistant", "content": parts, "tool_calls": [call()]}
        for messages in both({"role": "user", "content": parts}, ask, {**T, "content": parts}, {**A, "content": parts}):
            assert [message.content for message in messages] == ["12:00"] * 4
        assert read(chat({"role": "system", "content": parts}, U, A), OPENAI).system == "12:00"

    @pytest.mark.parametrize(
        ("what", "plural", "column"),
        [
            ("image_url", "images", "images"),
            ("image", "images", "images"),
            ("input_audio", "audio", "audios"),
            ("video", "videos", "videos"),
            ("file", "", ""),
            (None, "", ""),
        ],
    )
    @pytest.mark.parametrize("place", [0, 1])
    def test_other_parts_are_named(self, what, plural, column, place):
        messages = [dict(U), dict(A)]
        messages[place]["content"] = [{"type": "text", "text": "x"}, {"type": what, "url": "a.png"}]
        with pytest.raises(RowError) as caught:
            read(chat(*messages), OPENAI)
        assert str(caught.value) == (
            f"part 2 of 'content' of message {place + 1} is of type {what!r}, and "
            + (
                f'the description of the data declares no {plural} -> add "{column}": "{column}" to `columns`, whether'
                " or not rows have such a column"
                if column
                else "this version does not train on such a part -> remove it and what the text says of it, or the row"
            )
        )

    def test_parts_that_hold_everything_under_value(self):
        """As the rows of v1 of LLaMA-Factory have it, whatever the type of the part."""
        thought, text = {"type": "reasoning", "value": "hm"}, {"type": "text", "value": "6"}
        for asked, answer in both(
            {"role": "user", "content": [text]}, {"role": "assistant", "content": [thought, text]}
        ):
            assert asked == Message("user", "6") and answer == Message("assistant", "6", thought="hm")

    def test_an_item_that_is_no_part(self):
        with pytest.raises(RowError, match="part 1 of 'content' of message 1 is text, not an object with 'type'"):
            read(chat({"role": "user", "content": ["a"]}, A), OPENAI)


class TestCallsInParts:
    @pytest.mark.parametrize("held", [FUNCTION, json.dumps(FUNCTION)])
    @pytest.mark.parametrize("key", ["tool_call", "value"])
    def test_calls_stand_behind_the_text(self, held, key):
        part, text = {"type": "tool_call", key: held}, {"type": "text", "value": "I look."}
        for answer in answers({"content": [text, part, part]}, T, A):
            assert answer == Message("function", "I look.", calls=(LOOK, LOOK))
        for answer in answers({"content": [part]}, T, A):
            assert answer == Message("function", "", calls=(LOOK,))

    @pytest.mark.parametrize(
        ("message", "reason"),
        [
            (
                {"content": [{"type": "tool_call", "value": FUNCTION}, {"type": "text", "text": "a"}]},
                "part 2 of 'content' of message 2 follows a call -> move it before the calls",
            ),
            (
                {"content": [{"type": "tool_call", "value": FUNCTION}], "tool_calls": [FUNCTION]},
                "message 2 has calls in parts of 'content' and beside it -> keep one of them",
            ),
            ({"content": [{"type": "tool_call", "value": "{"}]}, "part 1 of 'content' of message 2 is not JSON"),
            ({"content": [{"type": "tool_call"}]}, "part 1 of 'content' of message 2 is null, not an object"),
        ],
    )
    def test_calls_that_cannot_be_read(self, message, reason):
        with pytest.raises(RowError) as caught:
            read(chat(U, {"role": "assistant", **message}, T, A), OPENAI)
        assert str(caught.value).startswith(reason)

    def test_a_question_calls_nothing(self):
        with pytest.raises(RowError, match="part 1 of 'content' of message 1 is of type 'tool_call'"):
            read(chat({"role": "user", "content": [{"type": "tool_call", "value": FUNCTION}]}, A), OPENAI)


class TestCalls:
    @pytest.mark.parametrize(
        "keys",
        [
            {"tool_calls": [{"type": "function", "function": FUNCTION}]},
            {"tool_calls": [FUNCTION]},
            {"tool_calls": json.dumps([FUNCTION])},
            {"tool_calls": [{"function": {**FUNCTION, "arguments": json.dumps(ARGUMENTS)}, "name": None}]},
            {"tool_calls": [FUNCTION], "function_call": None},
            {"function_call": FUNCTION},
            {"function_call": {**FUNCTION, "arguments": json.dumps(ARGUMENTS)}},
            {"function_call": json.dumps(FUNCTION), "tool_calls": []},
            {"function_call": FUNCTION, "tool_calls": [FUNCTION]},
        ],
    )
    @pytest.mark.parametrize("content", ["", None, "I look."])
    def test_calls_in_every_key(self, keys, content):
        for answer in answers({"content": content, **keys}, T, A):
            assert answer == Message("function", content or "", calls=(LOOK,))

    @pytest.mark.parametrize("nothing", [None, [], {}, "", "[]", "null"])
    def test_no_calls(self, nothing):
        for answer in answers({"content": "a", "tool_calls": nothing, "function_call": nothing}):
            assert answer == Message("assistant", "a")

    @pytest.mark.parametrize("value", [FUNCTION, [FUNCTION], [{"type": "function", "function": FUNCTION}]])
    def test_a_call_that_is_an_object(self, value):
        row = {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": value}]}
        assert read(row, SHAREGPT).messages[1] == Message("function", "", calls=(LOOK,))

    def test_arguments_are_decoded_once(self):
        row = chat(U, {"role": "assistant", "tool_calls": [call(arguments='{"s": "{\\"a\\": null}", "n": null}')]})
        assert read(row, OPENAI).messages[1].calls[0].arguments == {"s": '{"a": null}', "n": None}
        twice = json.dumps(json.dumps(ARGUMENTS))
        with pytest.raises(RowError, match="the arguments of tool call 1 of message 2 are text, not an object"):
            read(chat(U, {"role": "assistant", "tool_calls": [call(arguments=twice)]}), OPENAI)

    @pytest.mark.parametrize("value", [float("nan"), datetime.date(2026, 1, 2), b"x", {1, 2}, "\ud83d"])
    def test_arguments_without_json_are_refused(self, value):
        with pytest.raises(RowError, match="the arguments of tool call 1 of message 2 are no JSON value"):
            read(chat(U, {"role": "assistant", "tool_calls": [call(arguments={"x": [value]})]}), OPENAI)

    @pytest.mark.parametrize(
        ("text", "fault"),
        [
            ('{"x": NaN}', "NaN is no JSON value"),
            ('{"x": "\\ud83d"}', "it holds an unpaired surrogate"),
            ('{"x": ' + "[" * 101 + "]" * 101 + "}", "it is nested more than 100 levels deep"),
            ('{"x": ' + "[" * 99999, "it is nested more than 100 levels deep"),
        ],
    )
    def test_json_text_that_cannot_be_written_again(self, text, fault):
        with pytest.raises(RowError, match=f"the arguments of tool call 1 of message 2 are not JSON: {fault}"):
            read(chat(U, {"role": "assistant", "tool_calls": [call(arguments=text)]}), OPENAI)
        with pytest.raises(RowError, match=f"column 'tools' is not JSON: {fault}"):
            read({**chat(U, A), "tools": text}, OPENAI)
        with pytest.raises(RowError, match=f"'tool_calls' of message 2 is not JSON: {fault}"):
            read(chat(U, {"role": "assistant", "tool_calls": text}), OPENAI)

    def test_different_calls_in_two_keys(self):
        keys = {"tool_calls": [FUNCTION], "function_call": {"name": "g", "arguments": {}}}
        with pytest.raises(RowError, match="'tool_calls' and 'function_call' of message 2 hold different calls"):
            read(chat(U, {"role": "assistant", **keys}), OPENAI)

    def test_a_legacy_conversation(self):
        """Before `tool`, OpenAI's results had the role `function` and the name of the function."""
        row = chat(U, {"role": "assistant", "content": None, "function_call": FUNCTION},
                   {"role": "function", "name": "weather", "content": "rain"}, A)  # fmt: skip
        for description in (OPENAI, spec("openai")):
            assert read(row, description).messages[1:3] == (
                Message("function", "", calls=(LOOK,)),
                Message("observation", "rain", results=(ToolResult("rain", name="weather"),)),
            )


class TestResults:
    def test_ids_and_names_are_kept(self):
        results = [{**T, "content": text, "tool_call_id": f"id{text}", "name": "f"} for text in ("3", "5")]
        ask = {"role": "assistant", "content": None, "tool_calls": [call(), call()]}
        for messages in both(U, ask, *results, A):
            assert messages[2].results == (ToolResult("3", "id3", "f"), ToolResult("5", "id5", "f"))
            assert messages[2].content == "3\n</tool_response>\n<tool_response>\n5"

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            ({"temp": 21, "stadt": "Zürich"}, '{"temp": 21, "stadt": "Zürich"}'),
            ([1, "a"], '[1, "a"]'),
            (["a", "b"], '["a", "b"]'),
            ([], "[]"),
            ([{"type": "bistro", "text": "x"}], '[{"type": "bistro", "text": "x"}]'),
            ({"type": "text", "text": "x"}, '{"type": "text", "text": "x"}'),
            (3, "3"),
            (2.5, "2.5"),
            (True, "true"),
            ("", ""),
        ],
    )
    def test_a_result_that_is_no_text_is_written_as_json(self, value, text):
        ask = {"role": "assistant", "content": None, "tool_calls": [call()]}
        for messages in both(U, ask, {**T, "content": value}, A):
            assert messages[2] == Message("observation", text)

    def test_a_result_without_json_is_refused(self):
        ask = {"role": "assistant", "tool_calls": [call()]}
        with pytest.raises(RowError, match="'content' of message 3 is no JSON value"):
            read(chat(U, ask, {**T, "content": {"at": datetime.date(2026, 1, 2)}}, A), OPENAI)


class TestRoles:
    def test_a_developer_message_is_a_system_message(self):
        assert read(chat({"role": "developer", "content": "s"}, U, A), OPENAI).system == "s"
        assert read(said(("developer", "s"), ("human", "q"), ("gpt", "a")), SHAREGPT).system == "s"

    @pytest.mark.parametrize("names", [("User", "Assistant"), ("USER", "assistant"), ("user", "ASSISTANT")])
    def test_capitals_do_not_matter(self, names):
        row = chat(*({"role": name, "content": "x"} for name in names))
        assert read(row, OPENAI) == Dialogue((Message("user", "x"), Message("assistant", "x")))
        assert read(said(("Human", "x"), ("GPT", "x")), SHAREGPT) == read(row, OPENAI)

    @pytest.mark.parametrize(
        ("row", "description", "remedy"),
        [
            (said(("user", "q"), ("assistant", "a")), SHAREGPT, "name it in `tags` (`user_tag`)"),
            (said(("human", "q"), ("assistant", "a")), SHAREGPT, "name it in `tags` (`assistant_tag`)"),
            (chat({"role": "usr", "content": "q"}, A), OPENAI, "did you mean 'user'?"),
            (chat(U, {"role": "tool_call", "content": "{}"}), OPENAI, "name it in `tags` (`function_tag`)"),
            (chat(U, A, {"role": "tool_response", "content": "1"}, A), OPENAI, "name it in `tags` (`observation_tag`)"),
            (chat({"role": "narrator", "content": "q"}, A), OPENAI, "name it in `tags`"),
            (chat(U, A, A), OPENAI, "join it with the message before"),
            (chat(U, A, {"role": "developer", "content": "s"}, A), OPENAI, "put one system message at the beginning"),
        ],
    )
    def test_other_roles_are_refused_with_a_remedy(self, row, description, remedy):
        with pytest.raises(RowError) as caught:
            read(row, description)
        assert str(caught.value).rpartition(" -> ")[2] == remedy


@pytest.mark.parametrize("given", ["", "Be brief."])
def test_a_system_message_that_is_empty_is_given(given):
    assert read(chat({"role": "system", "content": given}, U, A), OPENAI).system == given
    assert read({**said(("system", given), ("human", "q"), ("gpt", "a")), "system": "column"}, SHAREGPT).system == given
    assert read({**said(("human", "q"), ("gpt", "a")), "system": ""}, SHAREGPT).system is None
    assert read({"instruction": "q", "output": "a", "system": ""}, spec()).system is None
