"""Tokens in the colors of the terminal."""

import io

from luthier.data.rows.labels import IGNORE_INDEX
from luthier.data.templates import get_template
from luthier.inspection.segments import RoleMarks
from luthier.inspection.terminal import LEARNED, MARK, RESET, colored, shows_colors
from tests.tiny import byte_tokenizer

CHATML = "<|im_start|>user\nhi ☂<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n"


def test_colors_of_labels_and_marks():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode(CHATML, add_special_tokens=False)
    learned = len(tokenizer.encode("yo<|im_end|>\n", add_special_tokens=False))
    row = {"input_ids": ids, "labels": [IGNORE_INDEX] * (len(ids) - learned) + ids[-learned:]}
    assert colored(row, tokenizer, RoleMarks(get_template("chatml"), tokenizer)) == (
        f"{MARK}<|im_start|>user\n{RESET}hi ☂{MARK}<|im_end|>\n<|im_start|>assistant\n{RESET}"
        f"{LEARNED}yo<|im_end|>\n{RESET}"
    )


def test_control_characters_do_not_reach_the_terminal():
    tokenizer = byte_tokenizer()
    ids = tokenizer.encode("a\x1b[2Jb", add_special_tokens=False)
    row = {"input_ids": ids, "labels": [IGNORE_INDEX] * len(ids)}
    assert colored(row, tokenizer, RoleMarks(get_template("chatml"), tokenizer)) == "a\\x1b[2Jb"


def test_colors_only_where_they_are_wanted(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert shows_colors(Terminal()) and not shows_colors(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not shows_colors(Terminal())
