"""Ollama's Modelfile, made of a format. `commands` reads it by the rules of Ollama's parser."""

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from luthier.core.errors import InvalidInput
from luthier.data.chat.modelfile import modelfile
from luthier.data.templates import get_template

LLAMA3_MODELFILE = '''\
# Made by luthier.

FROM .

TEMPLATE """<|begin_of_text|>{{ if .System }}<|start_header_id|>system<|end_header_id|>

{{ .System }}<|eot_id|>{{ end }}{{ range .Messages }}{{ if eq .Role "user" }}<|start_header_id|>user<|end_header_id|>

{{ .Content }}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{{ else if eq .Role "assistant" }}{{ .Content }}<|eot_id|>{{ end }}{{ end }}"""

PARAMETER stop "<|eot_id|>"
PARAMETER stop "<|eom_id|>"
PARAMETER num_ctx 4096
'''


def test_modelfile():
    made = modelfile(get_template("llama3"), bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")
    assert made == LLAMA3_MODELFILE


def test_modelfile_with_system_in_the_first_turn():
    text = modelfile(get_template("gemma"), bos_token="<bos>", eos_token="<end_of_turn>")
    assert "<start_of_turn>user\n{{ if and $first $.System }}{{ $.System }}\n\n{{ end }}{{ $first = false }}" in text
    assert 'SYSTEM """You are a helpful assistant."""' in modelfile(
        get_template("qwen2_vl"), bos_token=None, eos_token="<|im_end|>"
    )


def commands(text: str) -> list[tuple[str, str]]:
    """(name, value) of each command. Ollama drops characters that are not printable. A value ends at the first line
    break at which it is whole: without quotes at its beginning, or with the same quotes at its end."""
    kept = "".join(char for char in text if char.isprintable() or char in "\n\t")
    found = []
    name, value = "", ""
    for line in kept.split("\n"):
        if name:
            value += "\n" + line
        elif not line or line.startswith("#"):
            continue
        else:
            name, value = line.removeprefix("PARAMETER ").split(" ", 1)
            assert name in ("FROM", "TEMPLATE", "SYSTEM", "stop", "num_ctx"), name
        words = value.strip(" \t\n")
        marks = next((marks for marks in ('"""', '"') if words.startswith(marks)), "")
        if len(words) >= 2 * len(marks) and words.endswith(marks):
            found.append((name, words[len(marks) : len(words) - len(marks)]))
            name = ""
    assert not name, "a text without an end"
    return found


def go_text(template: str) -> str:
    """The text that a Go template writes, if all its actions are string literals."""
    return re.sub(r'\{\{ ("(?:\\.|[^"\\])*") \}\}', lambda found: literal(found[1]), template)


def literal(text: str) -> str:
    escapes = {"n": "\n", '"': '"', "\\": "\\"}
    return re.sub(
        r"\\(U[0-9a-f]{8}|.)", lambda e: chr(int(e[1][1:], 16)) if e[1][0] == "U" else escapes[e[1]], text[1:-1]
    )


HARD = st.text(st.sampled_from('"{}\\ \n\t\r\xa0\u200bab😀'), min_size=1, max_size=12)


@given(HARD)
def test_ollama_reads_every_system_text(system):
    template = replace(get_template("chatml"), default_system=system)
    read = dict(commands(modelfile(template, bos_token=None, eos_token="</s>")))
    head = read["TEMPLATE"].partition("{{ end }}")[0]
    if "SYSTEM" in read:
        assert read["SYSTEM"] == system and "$system" not in read["TEMPLATE"]
    else:
        assert literal(head.removeprefix("{{ $system := .System }}{{ if not $system }}{{ $system = ")[:-3]) == system
        assert "{{ .System }}" not in read["TEMPLATE"]


@pytest.mark.parametrize("name", ["chatml", "gemma"])
def test_a_system_text_that_a_modelfile_cannot_hold_stands_in_the_template(name):
    """Triple quotes at the end of a line would end the text there."""
    plain = get_template(name)
    text = modelfile(replace(plain, default_system='Quote """\nso.'), bos_token="<bos>", eos_token="</s>")
    assert "\nSYSTEM" not in text
    given = '{{ $system := .System }}{{ if not $system }}{{ $system = "Quote \\"\\"\\"\\nso." }}{{ end }}'
    ours = dict(commands(text))["TEMPLATE"]
    assert ours.startswith(given)
    whole = dict(commands(modelfile(replace(plain, default_system=""), bos_token="<bos>", eos_token="</s>")))
    assert re.sub(r"\$?\.System", "$system", whole["TEMPLATE"]) == ours.removeprefix(given)
    within = 'Say """so""" or "so"'
    assert f'SYSTEM """{within}"""' in modelfile(replace(plain, default_system=within), bos_token=None, eos_token=None)


@given(HARD, HARD)
def test_ollama_writes_every_slot(before, after):
    template = replace(get_template("chatml"), prefix=(before, after), default_system="")
    read = dict(commands(modelfile(template, bos_token=None, eos_token="</s>")))
    written = go_text(read["TEMPLATE"])
    assert written.startswith(before + after + "{{ if .System }}")


def test_stop_words_are_not_escaped():
    """Ollama would take an escape for a part of the word."""
    words = ('a"b', "back\\slash", "\n\n", "<｜end▁of▁sentence｜>")
    template = replace(get_template("chatml"), stop_words=words, default_system="")
    read = commands(modelfile(template, bos_token=None, eos_token=None))
    assert tuple(value for name, value in read if name == "stop") == words
    with pytest.raises(InvalidInput, match="cannot hold the stop word"):
        modelfile(replace(template, stop_words=("\xa0",)), bos_token=None, eos_token=None)
