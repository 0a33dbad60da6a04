"""`luthier chat`: the transcript of a piped conversation, the commands, one answer with --once, and every bad input."""

import io
import json
import sys

import pytest

from luthier.core import log
from luthier.core.errors import DeviceFailed, InvalidInput
from luthier.infer.conversation import Conversation
from luthier.infer.reading import AnswerFormat
from luthier.infer.session import ChatSession
from luthier.infer.types import Settings
from luthier.run.chat import Terminal, print_answer, split_once
from tests.infer.fakes import PlainPrompting, ScriptedModel

CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
TOOLS = '[{"name": "weather"}]'


@pytest.fixture
def talk(monkeypatch, capsys):
    """(lines typed, answers) -> (stdout, stderr, the session)."""
    log.set_up()

    def run(typed: str, *answers: str):
        session = ChatSession(ScriptedModel(*answers), Conversation(PlainPrompting()), Settings())
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        Terminal(session).talk()
        return *capsys.readouterr(), session

    return run


def test_a_piped_conversation_is_a_transcript(talk):
    out, _, session = talk("Hi\nAnd you?\nexit\nnever read\n", "Hel|lo.", "Fine.")
    assert out == "\nUser: Hi\nAssistant: Hello.\n\nUser: And you?\nAssistant: Fine.\n\nUser: exit\n"
    assert len(session.conversation.history) == 4


def test_the_end_of_input_ends_the_chat(talk):
    out, _, _ = talk("Hi\n", "Hello.")
    assert out.endswith("Assistant: Hello.\n\nUser: \n")


def test_clear_forgets(talk):
    _, err, session = talk("Hi\nclear\nHo\n", "Hello.", "Hey.")
    assert session.model.prompts[-1] == "user: Ho"
    assert "forgotten" in err


def test_empty_lines_are_not_questions(talk):
    _, _, session = talk("\n   \nHi\n", "Hello.")
    assert session.model.prompts == ["user: Hi"]


def test_system_text_is_set_and_taken_away(talk):
    _, _, session = talk("/system Be brief.\nHi\n/system\nHo\n", "a", "b")
    assert session.model.prompts[0].startswith("system: Be brief.\n")
    assert "system:" not in session.model.prompts[1]


def test_tools_are_called_and_answered(talk, tmp_path):
    file = tmp_path / "tools.json"
    file.write_text(TOOLS)
    out, _, session = talk(f"/tools {file}\nRain?\nyes\n/tools\nBye\n", CALL, "It rains.", CALL)
    assert "-> weather(city='Oslo')\n\nTool: yes\nAssistant: It rains." in out
    assert [message.role for message in session.conversation.history][:3] == ["user", "function", "observation"]
    assert session.conversation.history[-1].role == "assistant"  # without tools nothing is a call


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("/tools {folder}/absent.json", "cannot be read as a text file"),
        ("/tools {folder}/bad.json", "not valid JSON"),
        ("/sytem x", "did you mean /system?"),
    ],
)
def test_a_wrong_command_is_said_and_the_chat_goes_on(talk, tmp_path, command, message):
    (tmp_path / "bad.json").write_text("{")
    out, err, _ = talk(command.format(folder=tmp_path) + "\nHi\n", "Hello.")
    assert err.startswith("error: ")
    assert message in err
    assert "Assistant: Hello." in out


def test_a_failed_device_ends_the_chat(monkeypatch):
    model = ScriptedModel()

    def fails(*_):
        raise DeviceFailed("cuda:0 has failed")
        yield

    monkeypatch.setattr(model, "stream", fails)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hi\nHi again\n"))
    with pytest.raises(DeviceFailed):
        Terminal(ChatSession(model, Conversation(PlainPrompting()), Settings())).talk()
    assert sys.stdin.read() == "Hi again\n"


def test_a_line_that_only_looks_like_a_command_is_a_question(talk):
    _, _, session = talk("/etc/passwd holds what?\n /system is a command\n", "a", "b")
    assert session.model.prompts[0] == "user: /etc/passwd holds what?"
    assert session.model.prompts[1].endswith("user: /system is a command")


def test_help_lists_the_commands(talk):
    out, _, _ = talk("/help\n")
    words = ("/clear", "exit", "/system", "/tools", "/retry", "/save", 'A line """', "ends with \\ goes on", "Ctrl-C")
    assert all(word in out for word in words)


def test_retry_asks_the_last_question_again(talk):
    out, _, session = talk("Hi\nAnd?\n/retry\n", "Hello.", "One.", "Two.")
    assert session.model.prompts[1] == session.model.prompts[2]
    assert [message.content for message in session.conversation.history] == ["Hi", "Hello.", "And?", "Two."]
    assert out.endswith("Assistant: Two.\n\nUser: \n")


def test_retry_gives_a_result_to_the_same_call_again(talk, tmp_path):
    (tmp_path / "tools.json").write_text(TOOLS)
    _, _, session = talk(f"/tools {tmp_path}/tools.json\nRain?\nyes\n/retry\n", CALL, "It rains.", "Rain.")
    assert [message.role for message in session.conversation.history] == [
        "user",
        "function",
        "observation",
        "assistant",
    ]
    assert session.model.prompts[1] == session.model.prompts[2]


def test_a_saved_conversation_is_a_row_of_training_data(talk, tmp_path):
    from luthier.data.formats.openai import read
    from tests.data.test_formats import spec

    (tmp_path / "tools.json").write_text(TOOLS)
    file = tmp_path / "rows.jsonl"
    typed = f"/system Be kind.\n/tools {tmp_path}/tools.json\nRain?\nyes\n/save {file}\n/clear\nHi\n/save {file}\n"
    talk(typed, CALL, "It rains.", "Hello.")
    first, second = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    example = read(first, spec("openai"))
    assert [message.role for message in example.messages] == ["user", "function", "observation", "assistant"]
    assert example.system == "Be kind." and json.loads(example.tools) == json.loads(TOOLS)
    assert "Oslo" in json.dumps(first["messages"][2]["tool_calls"])
    assert [message["content"] for message in second["messages"]] == ["Be kind.", "Hi", "Hello."]


@pytest.mark.parametrize(
    ("command", "message"),
    [("/save", "the file is missing"), ("/retry", "no answer yet"), ("/save x", "nothing to save")],
)
def test_what_cannot_be_saved_or_retried_is_said(talk, command, message):
    _, err, _ = talk(command + "\n")
    assert message in err


def test_a_file_that_cannot_be_written_is_said(talk, tmp_path):
    _, err, _ = talk(f"Hi\n/save {tmp_path}/absent/rows.jsonl\n", "Hello.")
    assert "cannot be written" in err


@pytest.mark.parametrize("typed", ["one\\\ntwo\\\nthree\n", '"""\none\ntwo\nthree\n"""\n'])
def test_a_question_may_have_several_lines(talk, typed):
    _, _, session = talk(typed, "Yes.")
    assert session.model.prompts == ["user: one\ntwo\nthree"]


def test_an_interrupt_stops_the_answer_and_not_the_chat(talk):
    out, err, session = talk("Count\nGo on\n", "one |two |^C", "three")
    assert "Assistant: one two \n" in out
    assert "(stopped)" in err
    assert session.model.prompts[-1] == "user: Count\nassistant: one two \nuser: Go on"


def test_thoughts_and_calls_stand_apart(monkeypatch, capsys, tmp_path):
    (tmp_path / "tools.json").write_text(TOOLS)
    model = ScriptedModel(f"<th|ink>It ra|ins?</think>Let me |look.{CALL}", "<think>Yes.</think>It rains.")
    decode = lambda ids: "".join(map(chr, ids))  # noqa: E731
    answers = AnswerFormat(("<think>", "</think>"), "qwen")
    session = ChatSession(model, Conversation(PlainPrompting()), Settings(), answers, decode)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"/tools {tmp_path}/tools.json\nRain?\nyes\n"))
    Terminal(session).talk()
    out = capsys.readouterr().out
    assert "Thought: It rains?\nAssistant: Let me look.\n-> weather(city='Oslo')\n\nTool: yes\n" in out
    assert out.endswith("Thought: Yes.\nAssistant: It rains.\n\nUser: \n")


def test_once_prints_the_answer_and_nothing_else(capsys):
    print_answer(ChatSession(ScriptedModel("It |is."), Conversation(PlainPrompting()), Settings()), "Is it?")
    assert capsys.readouterr().out == "It is.\n"


def test_once_is_taken_out_of_the_words():
    assert split_once(["run.yaml", "--once", "Hi", "top_p=1"]) == (["run.yaml", "top_p=1"], "Hi")
    assert split_once(["--template", "default", "--once=a=b"]) == (["--template", "default"], "a=b")
    assert split_once(["run.yaml"]) == (["run.yaml"], None)


@pytest.mark.parametrize("words", [["--once"], ["--once", " "], ["--once="]])
def test_once_needs_a_question(words):
    with pytest.raises(InvalidInput, match="the question is missing"):
        split_once(words)


@pytest.mark.parametrize("name", ["~nobody-here/a", "a\0b", "a" * 300])
def test_a_name_that_no_file_can_have_is_said_and_the_chat_goes_on(talk, name):
    out, err, _ = talk(f"Hi\n/save {name}\n/tools {name}\n/image {name}\nHo\n", "a", "b")
    assert out.endswith("User: Ho\nAssistant: b\n\nUser: \n")
    assert err.count("cannot be") == 2 and err.count("no such file") == 1


def test_a_line_that_is_not_utf8_is_said_and_the_chat_goes_on(monkeypatch, capsys):
    log.set_up()
    session = ChatSession(ScriptedModel("Hello."), Conversation(PlainPrompting()), Settings())
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\nHi\n"), encoding="utf-8"))
    Terminal(session).talk()
    out, err = capsys.readouterr()
    assert "not UTF-8" in err and out == "\nUser: caf?\nAssistant: \n\nUser: Hi\nAssistant: Hello.\n\nUser: \n"
