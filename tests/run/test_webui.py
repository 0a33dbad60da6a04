"""The command `luthier webui`: what it refuses before it serves. tests/webui has the pages."""

import sys

import pytest

from luthier.cli import main
from luthier.core import versions


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "many"], "should be a whole number"),
        (["--root", "/nowhere"], "is not a folder"),
        (["--root", "/proc"], "webui: --root: /proc"),  # nobody can write there, not even root
        (["x"], "webui:"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(words, said, capsys):
    assert main(["webui", *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_a_missing_library_is_named_with_the_command_that_installs_it(monkeypatch, capsys):
    monkeypatch.setattr("luthier.run.webui.is_installed", lambda module: module != "nicegui")
    assert main(["webui"]) == 2
    assert "pip install 'luthier[board]'" in capsys.readouterr().err
    assert versions.is_installed("luthier")


def test_help_names_every_option(capsys):
    assert main(["webui", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("--host", "--port", "--root", "GRADIO_SERVER_NAME", "token"))
    assert "nicegui" not in sys.modules
