"""`luthier template`: render, list and show."""

import json
import re

import pytest

from luthier.core.errors import DataError, InvalidInput, UnknownVariant
from luthier.data.templates import template_names
from luthier.run import template as command
from tests.data.chat.test_render import EXPECTED, FACTS, corrected
from tests.deep import deep_list, deep_tools


def test_command_renders_a_file(capsys):
    assert command.main(["render", "phi_small", str(FACTS / "conversations.json")]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows == [corrected(row) for row in EXPECTED if row["template"] == "phi_small"]
    assert list(rows[0]) == list(EXPECTED[0])


def test_command_lists_and_shows(capsys):
    assert command.main(["list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(template_names())
    assert command.main(["show", "yuan"]) == 0
    assert 'user = ["{{content}}", { token = "<sep>" }]\n' in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"[", "not JSON"),
        (deep_list(100_000).encode(), "not JSON"),
        (b"\xff", "not UTF-8"),
        (b"{}", "holds dict"),
    ],
)
def test_command_names_what_is_wrong_with_a_file(tmp_path, content, reason):
    file = tmp_path / "chats.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=reason) as caught:
        command.main(["render", "qwen3", str(file)])
    assert str(file) in str(caught.value)


GOOD = {"id": "good", "messages": [{"role": "user", "content": "q"}]}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (rb'[{"id": "a", "messages": [{"role": "user", "content": "\ud83d"}]}]', "conversation 'a': .*surrogates"),
        (b"[1]", "conversation 1: not an object"),
        (json.dumps([{**GOOD, "id": "a", "tools": deep_tools(5000)}]).encode(), "'a': .*more than 100 levels deep"),
        (b'[{"id": "a", "messages": [], "sytem": ""}]', "unknown key 'sytem'; did you mean 'system'"),
        (b'[{"id": "a"}]', "'messages' is missing"),
        (b'[{"id": "a", "messages": []}]', "not a list of messages"),
        (b'[{"id": "a", "messages": [{"role": "user"}]}]', "message 1 is not an object with the texts"),
        (b'[{"id": "a", "messages": [{"role": "human", "content": ""}]}]', "unknown role 'human'"),
        (b'[{"id": "a", "messages": [{"role": "assistant", "content": ""}]}]', "must be user or observation"),
        (b'[{"id": "a", "tools": [], "messages": [{"role": "user", "content": ""}]}]', "JSON inside a text"),
        (b'[{"id": "a", "tools": "x", "messages": [{"role": "user", "content": ""}]}]', "conversation 'a': the tools"),
        (b'[{"id": "a", "enable_thinking": 1, "messages": [{"role": "user", "content": ""}]}]', "true, false or null"),
    ],
)
def test_a_conversation_that_cannot_be_written_does_not_hide_the_others(tmp_path, capsys, content, reason):
    file = tmp_path / "chats.json"
    file.write_text(json.dumps([*json.loads(content), GOOD]))
    assert command.main(["render", "qwen3", str(file)]) == 2
    out, err = capsys.readouterr()
    assert [json.loads(line)["conversation"] for line in out.splitlines()] == ["good"]
    assert re.search(reason, err) and str(file) in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("tools", ["null", "[]", "", " ", " null\n"])
def test_tools_that_say_that_there_are_none(tmp_path, capsys, tools):
    file = tmp_path / "chats.json"
    file.write_text(json.dumps([GOOD, {**GOOD, "tools": tools}]), encoding="utf-8-sig")  # as editors of Windows save it
    assert command.main(["render", "qwen3", str(file)]) == 0
    without, with_none = map(json.loads, capsys.readouterr().out.splitlines())
    assert with_none == without


def test_command_names_what_is_wrong_with_a_name():
    with pytest.raises(UnknownVariant, match="did you mean 'llama3'"):
        command.main(["render", "lama3", "absent.json"])
    with pytest.raises(InvalidInput, match="at least 1"):
        command.main(["check", "some/model", "--rows", "0"])
    with pytest.raises(SystemExit) as caught:
        command.main(["frobnicate"])
    assert caught.value.code == 2
