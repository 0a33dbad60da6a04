"""`luthier chat`: the transcript of a piped conversation, the commands, one answer with --once, and every bad input."""

import io

import pytest

from luthier.core import log
from luthier.core.errors import InvalidInput
from luthier.infer.conversation import Conversation
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


def test_a_line_that_only_looks_like_a_command_is_a_question(talk):
    _, _, session = talk("/etc/passwd holds what?\n /system is a command\n", "a", "b")
    assert session.model.prompts[0] == "user: /etc/passwd holds what?"
    assert session.model.prompts[1].endswith("user: /system is a command")


def test_help_lists_the_commands(talk):
    out, _, _ = talk("/help\n")
    assert all(word in out for word in ("clear", "exit", "/system", "/tools", "Ctrl-C"))


def test_an_interrupt_stops_the_answer_and_not_the_chat(talk):
    out, err, session = talk("Count\nGo on\n", "one |two |^C", "three")
    assert "Assistant: one two \n" in out
    assert "(stopped)" in err
    assert session.model.prompts[-1] == "user: Count\nassistant: one two \nuser: Go on"


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
