"""Rows of each format become the example that the description asks for, or a reason that names the fault's place."""

import json
from dataclasses import replace

import pytest

from luthier.core.errors import RowError
from luthier.core.kinds import FORMATS
from luthier.data.sources.dataset_info import Columns, DatasetSpec, Source, Tags
from luthier.data.types import Dialogue, Feedback, Media, Message, Preference, Prompt, ToolCall, ToolResult

SOURCE = Source("file", "rows.json")
NO_COLUMNS = dict.fromkeys(Columns.__dataclass_fields__)
NO_TAGS = dict.fromkeys(Tags.__dataclass_fields__)


def columns(**given) -> Columns:
    """As if `columns` was written in the description: what is not listed is absent."""
    return Columns(**{**NO_COLUMNS, **given})


def spec(formatting="alpaca", **given) -> DatasetSpec:
    given.setdefault("columns_given", "columns" in given)
    given.setdefault("tags_given", "tags" in given)
    return DatasetSpec(name="d", source=SOURCE, formatting=formatting, **given)


def read(row, description: DatasetSpec):
    return FORMATS.get(description.formatting).read(row, description)


def user(text):
    return Message("user", text)


def assistant(text):
    return Message("assistant", text)


ALPACA = spec(
    columns=columns(
        prompt="instruction", query="input", response="output", history="history", system="system", tools="tools"
    )
)
ALPACA_RANKED = spec(ranking=True, columns=columns(prompt="instruction", chosen="good", rejected="bad"))
ALPACA_KTO = spec(columns=columns(prompt="instruction", response="output", kto_tag="liked"))
SHAREGPT = spec("sharegpt", columns=columns(messages="conversations", system="system", tools="tools"))
SHAREGPT_RANKED = spec(
    "sharegpt", ranking=True, columns=columns(messages="conversations", chosen="good", rejected="bad")
)
SHAREGPT_KTO = spec("sharegpt", columns=columns(messages="conversations", kto_tag="liked"))
OPENAI_TAGS = Tags(
    **{
        **NO_TAGS,
        "role_tag": "role",
        "content_tag": "content",
        "user_tag": "user",
        "assistant_tag": "assistant",
        "observation_tag": "tool",
        "system_tag": "system",
    }
)
OPENAI = spec("openai", columns=columns(messages="messages", tools="tools"), tags=OPENAI_TAGS)
OPENAI_RANKED = replace(OPENAI, ranking=True, columns=columns(messages="messages", chosen="good", rejected="bad"))


def said(*pairs):
    return {"conversations": [{"from": role, "value": text} for role, text in pairs]}


def chat(*messages):
    return {"messages": list(messages)}


def call(name="f", arguments='{"x": 1}'):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


U = {"role": "user", "content": "q"}
A = {"role": "assistant", "content": "a"}
T = {"role": "tool", "content": "1"}
TOOL = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}


class TestAlpaca:
    def test_prompt_is_instruction_newline_input(self):
        assert read({"instruction": "Add.", "input": "1 2", "output": "3"}, spec()) == Dialogue(
            (user("Add.\n1 2"), assistant("3"))
        )

    @pytest.mark.parametrize(("instruction", "query", "text"), [("a", "", "a"), ("", "b", "b"), ("a", None, "a")])
    def test_empty_parts_leave_no_newline(self, instruction, query, text):
        row = {"instruction": instruction, "input": query, "output": "c"}
        assert read(row, spec()).messages[0] == user(text)

    def test_history_system_and_tools(self):
        row = {
            "instruction": "c",
            "output": "d",
            "history": [["a", "b"]],
            "system": "s",
            "tools": json.dumps([TOOL]),
        }
        example = read(row, ALPACA)
        assert example.messages == (user("a"), assistant("b"), user("c"), assistant("d"))
        assert (example.system, json.loads(example.tools)) == ("s", [TOOL])

    @pytest.mark.parametrize("history", [None, []])
    def test_no_history(self, history):
        assert read({"instruction": "c", "output": "d", "history": history}, ALPACA).messages[0] == user("c")

    def test_ranking(self):
        assert read({"instruction": "q", "good": "g", "bad": "b"}, ALPACA_RANKED) == Preference(
            (user("q"),), assistant("g"), assistant("b")
        )

    @pytest.mark.parametrize(
        ("tag", "liked"),
        [
            *[(tag, True) for tag in (True, 1, 1.0, "true", "True", " TRUE ", "1", "1.0")],
            *[(tag, False) for tag in (False, 0, 0.0, -0.0, "false", "False", "0", "0.0 ")],
        ],
    )
    def test_feedback(self, tag, liked):
        row = {"instruction": "q", "output": "a", "liked": tag}
        assert read(row, ALPACA_KTO) == Feedback((user("q"), assistant("a")), liked)
        assert read({**said(("human", "q"), ("gpt", "a")), "liked": tag}, SHAREGPT_KTO).liked is liked

    @pytest.mark.parametrize("tag", [2, -1, 0.5, float("nan"), "yes", "", "2", "01", [], [1], {}, {"a": 1}, None])
    def test_other_ratings_are_refused(self, tag):
        with pytest.raises(RowError, match=r"^column 'liked' is .*, not true, false, 1 or 0$"):
            read({"instruction": "q", "output": "a", "liked": tag}, ALPACA_KTO)

    @pytest.mark.parametrize("description", [spec(), spec(columns=columns(prompt="instruction"))])
    def test_no_answer_is_a_prompt(self, description):
        assert read({"instruction": "text", "output": None}, description) == Prompt((user("text"),))

    def test_empty_answer_is_still_an_answer(self):
        assert isinstance(read({"instruction": "q", "output": ""}, spec()), Dialogue)


class TestSharegpt:
    def test_roles(self):
        row = said(
            ("human", "q"), ("function_call", '{"name": "f", "arguments": {}}'), ("observation", "1"), ("gpt", "a")
        )
        assert [m.role for m in read(row, SHAREGPT).messages] == ["user", "function", "observation", "assistant"]

    def test_system_message_wins_over_the_column(self):
        row = {**said(("system", "in front"), ("human", "q"), ("gpt", "a")), "system": "column"}
        example = read(row, SHAREGPT)
        assert example.system == "in front" and len(example.messages) == 2
        assert read({**said(("human", "q"), ("gpt", "a")), "system": "column"}, SHAREGPT).system == "column"

    def test_ranking_answers_stand_outside(self):
        row = {**said(("human", "q")), "good": {"from": "gpt", "value": "g"}, "bad": {"from": "gpt", "value": "b"}}
        assert read(row, SHAREGPT_RANKED) == Preference((user("q"),), assistant("g"), assistant("b"))

    def test_feedback(self):
        row = {**said(("human", "q"), ("gpt", "a")), "liked": False}
        assert read(row, SHAREGPT_KTO) == Feedback((user("q"), assistant("a")), liked=False)

    @pytest.mark.parametrize("tools", ["", " \n", "[]", " [ ]", "null", " null\n", None, []])
    def test_no_tools(self, tools):
        assert read({**said(("human", "q"), ("gpt", "a")), "tools": tools}, SHAREGPT).tools == ""
        assert read({"instruction": "q", "output": "a", "tools": tools}, ALPACA).tools == ""
        assert read({**chat(U, A), "tools": tools}, OPENAI).tools == ""

    @pytest.mark.parametrize(
        "tools",
        [json.dumps([TOOL]), [TOOL], TOOL, json.dumps(TOOL), [{"type": "function", "function": TOOL}]],
    )
    def test_tools_become_json_text_of_a_list(self, tools):
        text = read({**said(("human", "q"), ("gpt", "a")), "tools": tools}, SHAREGPT).tools
        (tool,) = json.loads(text)
        assert tool.get("function", tool) == TOOL

    def test_tools_given_as_text_stay_as_written(self):
        text = '[ {"name":"f"} ]'
        assert read({**said(("human", "q"), ("gpt", "a")), "tools": text}, SHAREGPT).tools == text


class TestOpenai:
    @pytest.mark.parametrize("content", [{"content": None}, {"content": ""}, {}])
    def test_tool_calls_become_one_function_message(self, content):
        calls = [call("f", '{"city": "北京"}'), call("g", {"y": None}), call("h", "")]
        row = chat(U, {"role": "assistant", **content, "tool_calls": calls}, T, A)
        assert read(row, OPENAI).messages[1] == Message(
            "function",
            "",
            calls=(ToolCall("f", {"city": "北京"}, "1"), ToolCall("g", {"y": None}, "1"), ToolCall("h", {}, "1")),
        )

    def test_text_beside_the_calls_is_the_content(self):
        row = chat(U, {"role": "assistant", "content": "I look.", "tool_calls": [call()]}, T, A)
        assert read(row, OPENAI).messages[1] == Message("function", "I look.", calls=(ToolCall("f", {"x": 1}, "1"),))

    @pytest.mark.parametrize("tool_calls", [None, []])
    def test_no_calls_is_a_plain_answer(self, tool_calls):
        assert read(chat(U, {**A, "tool_calls": tool_calls}), OPENAI).messages[1] == assistant("a")

    def test_tool_messages_in_a_row_are_joined(self):
        second = {"role": "tool", "content": "2"}
        ask = {"role": "assistant", "tool_calls": [call()]}
        messages = read(chat(U, ask, T, second, A, U, ask, T, A), OPENAI).messages
        joined = "1\n</tool_response>\n<tool_response>\n2"
        assert messages[2] == Message("observation", joined, results=(ToolResult("1"), ToolResult("2")))
        assert messages[6] == Message("observation", "1")

    def test_system_text_is_not_touched(self):
        system = {"role": "system", "content": "Be brief."}
        assert read(chat(system, U, A), OPENAI).system == "Be brief."
        assert read(chat(U, A), OPENAI).system is None

    def test_natural_names_need_no_description(self):
        row = {**chat(U, {"role": "assistant", "tool_calls": [call()]}, T, A), "tools": [TOOL]}
        example = read(row, spec("openai"))
        assert [m.role for m in example.messages] == ["user", "function", "observation", "assistant"]
        assert json.loads(example.tools) == [TOOL]

    def test_sharegpt_names_are_the_default_for_rows_that_have_them(self):
        assert read(said(("human", "q"), ("gpt", "a")), spec("openai")).messages == (user("q"), assistant("a"))

    def test_given_tags_win(self):
        tags = replace(OPENAI_TAGS, user_tag="customer", assistant_tag="agent")
        row = chat({"role": "customer", "content": "q"}, {"role": "agent", "content": "a"})
        assert len(read(row, replace(OPENAI, tags=tags)).messages) == 2
        with pytest.raises(RowError, match="message 1 has role 'user' where 'customer'"):
            read(chat(U, A), replace(OPENAI, tags=tags))

    def test_ranking(self):
        row = {**chat(U), "good": A, "bad": {"role": "assistant", "tool_calls": [call()]}}
        example = read(row, OPENAI_RANKED)
        assert (example.chosen, example.rejected.role) == (assistant("a"), "function")


class TestMedia:
    def test_paths_start_from_media_dir(self, tmp_path):
        (tmp_path / "a.png").touch()
        description = spec(
            columns=columns(prompt="instruction", response="output", images="images"), media_dir=str(tmp_path)
        )
        row = {"instruction": "<image>", "output": "a", "images": ["a.png", "https://example.org/b.png"]}
        assert read(row, description).media == Media((f"{tmp_path}/a.png", "https://example.org/b.png"))
        assert read({**row, "images": "a.png"}, description).media.items == (f"{tmp_path}/a.png",)

    def test_hub_rows_keep_their_paths(self):
        description = replace(
            spec(columns=columns(prompt="instruction", images="images")), source=Source("hf_hub", "o/r")
        )
        assert read({"instruction": "q", "images": ["a.png"]}, description).media.items == ("a.png",)


ASK = {"role": "assistant", "content": None}
BROKEN = [
    # alpaca
    (spec(), {"input": "i", "output": "o"}, "column 'instruction' is missing"),
    (spec(), {"instruction": 1, "output": "o"}, "column 'instruction' is a number, not text"),
    (spec(), {"instruction": ["a"], "output": "o"}, "column 'instruction' is a list, not text"),
    (spec(), {"instruction": "q", "input": {}, "output": "o"}, "column 'input' is an object, not text"),
    (spec(), {"instruction": "q"}, "column 'output' is missing"),
    (spec(), {"instruction": "q", "output": 4.5}, "column 'output' is a number, not text"),
    (spec(), {"instruction": "q", "output": True}, "column 'output' is a boolean, not text"),
    (spec(), {"instruction": "q", "output": ["a"]}, "column 'output' is a list, not text"),
    (spec(), {"instruction": "", "output": None}, "the row has neither a prompt nor an answer"),
    (
        ALPACA,
        {"instruction": "q", "output": "a", "history": "x"},
        "column 'history' is text, not a list of [question, answer] pairs",
    ),
    (
        ALPACA,
        {"instruction": "q", "output": "a", "history": [["a", "b"], "x"]},
        "pair 2 of column 'history' is text, not a [question, answer] list",
    ),
    (
        ALPACA,
        {"instruction": "q", "output": "a", "history": [["a"]]},
        "pair 1 of column 'history' has 1 items, not 2 (question and answer)",
    ),
    (
        ALPACA,
        {"instruction": "q", "output": "a", "history": [["a", None]]},
        "the answer of pair 1 of column 'history' is null, not text",
    ),
    (
        ALPACA,
        {"instruction": "q", "output": "a", "history": [[3, "b"]]},
        "the question of pair 1 of column 'history' is a number, not text",
    ),
    (ALPACA, {"instruction": "q", "output": "a", "system": 1}, "column 'system' is a number, not text"),
    (ALPACA, {"instruction": "q", "output": "a", "tools": 1}, "column 'tools' is a number, not a list of tools"),
    (
        ALPACA,
        {"instruction": "q", "output": "a", "tools": "{'name'"},
        "column 'tools' is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    (ALPACA, {"instruction": "q", "output": "a", "tools": '"f"'}, "column 'tools' is text, not a list of tools"),
    (ALPACA, {"instruction": "q", "output": "a", "tools": '["f"]'}, "tool 1 of column 'tools' is text, not an object"),
    (ALPACA, {"instruction": "q", "output": "a", "tools": "[{}]"}, "tool 1 of column 'tools' has no name"),
    (
        ALPACA,
        {"instruction": "q", "output": "a", "tools": '[{"type": "function", "function": "f"}]'},
        "the function of tool 1 of column 'tools' is text, not an object",
    ),
    (ALPACA_RANKED, {"instruction": "q", "good": "g"}, "column 'bad' is missing"),
    (ALPACA_RANKED, {"instruction": "q", "good": None, "bad": "b"}, "column 'good' is null, not text"),
    (ALPACA_RANKED, {"instruction": "q", "good": "g", "bad": ["b"]}, "column 'bad' is a list, not text"),
    (ALPACA_KTO, {"instruction": "q", "output": "a"}, "column 'liked' is missing"),
    (
        ALPACA_KTO,
        {"instruction": "q", "output": "a", "liked": -1},
        "column 'liked' is a number, not true, false, 1 or 0",
    ),
    (
        ALPACA_KTO,
        {"instruction": "q", "output": "a", "liked": "yes"},
        "column 'liked' is text, not true, false, 1 or 0",
    ),
    (ALPACA_KTO, {"instruction": "q", "output": None, "liked": True}, "column 'output' is null, not text"),
    # sharegpt
    (SHAREGPT, {}, "column 'conversations' is missing"),
    (SHAREGPT, {"conversations": None}, "column 'conversations' is null, not a list of messages"),
    (SHAREGPT, {"conversations": "hi"}, "column 'conversations' is text, not a list of messages"),
    (SHAREGPT, {"conversations": []}, "column 'conversations' has no messages"),
    (SHAREGPT, {"conversations": ["hi"]}, "message 1 is text, not an object"),
    (SHAREGPT, {"conversations": [{"value": "q"}]}, "message 1 has no 'from'"),
    (SHAREGPT, {"conversations": [{"from": "human"}]}, "message 1 has no 'value'"),
    (SHAREGPT, {"conversations": [{"from": 1, "value": "q"}]}, "'from' of message 1 is a number, not text"),
    (SHAREGPT, {"conversations": [{"from": "human", "value": None}]}, "'value' of message 1 is null, not text"),
    (SHAREGPT, said(("system", "s")), "there is only a system message"),
    (
        SHAREGPT,
        said(("gpt", "a"), ("human", "q")),
        "message 1 has role 'gpt' where 'human' or 'observation' is expected",
    ),
    (
        SHAREGPT,
        said(("system", "s"), ("gpt", "a")),
        "message 2 has role 'gpt' where 'human' or 'observation' is expected",
    ),
    (
        SHAREGPT,
        said(("human", "q"), ("human", "q")),
        "message 2 has role 'human' where 'gpt' or 'function_call' is expected -> join it with the message before",
    ),
    (
        SHAREGPT,
        said(("human", "q"), ("gpt", "a"), ("system", "s"), ("gpt", "a")),
        "message 3 has role 'system' where 'human' or 'observation' is expected"
        " -> put one system message at the beginning",
    ),
    (
        SHAREGPT,
        said(("human", "q"), ("bot", "a")),
        "message 2 has role 'bot' where 'gpt' or 'function_call' is expected -> name it in `tags`",
    ),
    (
        SHAREGPT,
        said(("human", "q"), ("observation", "a")),
        "message 2 has role 'observation' where 'gpt' or 'function_call' is expected",
    ),
    (
        SHAREGPT,
        said(("human", "q")),
        "the conversation ends with message 1 of role 'human', not with 'gpt' or 'function_call'",
    ),
    (
        SHAREGPT_RANKED,
        {
            **said(("human", "q"), ("gpt", "a")),
            "good": {"from": "gpt", "value": "g"},
            "bad": {"from": "gpt", "value": "b"},
        },
        "the conversation ends with message 2 of role 'gpt', not with 'human' or 'observation'",
    ),
    (
        SHAREGPT_RANKED,
        {**said(("human", "q")), "good": {"from": "gpt", "value": "g"}},
        "column 'bad' is missing",
    ),
    (SHAREGPT_RANKED, {**said(("human", "q")), "good": "g", "bad": "b"}, "column 'good' is text, not a message"),
    (
        SHAREGPT_RANKED,
        {**said(("human", "q")), "good": {"from": "human", "value": "g"}, "bad": {"from": "gpt", "value": "b"}},
        "the message in column 'good' has role 'human' where 'gpt' or 'function_call' is expected",
    ),
    (
        SHAREGPT_RANKED,
        {**said(("human", "q")), "good": {"from": "gpt"}, "bad": {}},
        "the message in column 'good' has no 'value'",
    ),
    (
        SHAREGPT_KTO,
        {**said(("human", "q"), ("gpt", "a")), "liked": None},
        "column 'liked' is null, not true, false, 1 or 0",
    ),
    # openai
    (OPENAI, chat(U, {"role": "assistant", "content": None}), "'content' of message 2 is null, not text"),
    (
        OPENAI,
        chat({"role": "user", "content": [{"type": "text"}]}),
        "part 1 of 'content' of message 1 has no 'text'",
    ),
    (
        OPENAI,
        chat(U, {"role": "developer", "content": "a"}),
        "message 2 has role 'developer' where 'assistant' is expected -> put one system message at the beginning",
    ),
    (OPENAI, chat(U, {**ASK, "tool_calls": {"a": 1}}), "'tool_calls' of message 2 is an object, not a list"),
    (OPENAI, chat(U, {**ASK, "tool_calls": ["f"]}), "tool call 1 of message 2 is text, not an object"),
    (
        OPENAI,
        chat(U, {**ASK, "tool_calls": [call(), {"id": "1"}]}),
        "the function of tool call 2 of message 2 is null, not an object",
    ),
    (
        OPENAI,
        chat(U, {**ASK, "tool_calls": [call(name=None)]}),
        "the name of tool call 1 of message 2 is null, not text",
    ),
    (
        OPENAI,
        chat(U, {**ASK, "tool_calls": [call(arguments="[1]")]}),
        "the arguments of tool call 1 of message 2 are a list, not an object",
    ),
    (
        OPENAI,
        chat(U, {**ASK, "tool_calls": [call(arguments="{x}")]}),
        "the arguments of tool call 1 of message 2 are not JSON: "
        "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)",
    ),
    (
        OPENAI,
        chat(U, {"role": "assistant", "content": "<tool_call>", "tool_calls": [call()]}),
        "the text of message 2 holds '<tool_call>' beside its tool_calls",
    ),
    (
        OPENAI,
        chat(U, {"role": "assistant", "content": 1, "tool_calls": [call()]}),
        "'content' of message 2 is a number, not text",
    ),
    (OPENAI, chat(T, A, T), "the conversation ends with message 3 of role 'tool', not with 'assistant'"),
    (
        replace(OPENAI, tags=replace(OPENAI_TAGS, observation_tag=None)),
        chat(U, A, T, A),
        "message 3 has role 'tool' where 'user' is expected -> name it in `tags` (`observation_tag`)",
    ),
    # media
    (
        spec(columns=columns(prompt="instruction", response="output", images="images")),
        {"instruction": "q", "output": "a", "images": 5},
        "column 'images' is a number, not a list of paths",
    ),
    (
        spec(columns=columns(prompt="instruction", response="output", videos="videos")),
        {"instruction": "q", "output": "a", "videos": [[5]]},
        "frame 1 of item 1 of column 'videos' is of type int, not a path",
    ),
]


@pytest.mark.parametrize(("description", "row", "reason"), BROKEN, ids=[reason[:60] for *_, reason in BROKEN])
def test_a_row_that_deviates_is_refused_with_the_reason(description, row, reason):
    with pytest.raises(RowError) as caught:
        read(row, description)
    assert str(caught.value) == reason


def test_there_are_forty_kinds_of_broken_rows_and_more():
    assert len(BROKEN) > 60
