"""The 124 chat formats: names, inheritance and overrides."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from luthier.core.errors import UnknownVariant
from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data import templates
from luthier.data.templates import Special, Token, get_template, template_names

FOLDER = Path(templates.__file__).parent
TABLES = {file.name: tomllib.loads(file.read_text("utf-8")) for file in FOLDER.glob("*.toml")}


def test_headers_are_found_without_parsing():
    """Every table of every file, and nothing else, is a name or (with `_`) a base."""
    names = sorted(name for tables in TABLES.values() for name in tables)
    assert len(names) == len(set(names))
    assert tuple(name for name in names if not name.startswith("_")) == template_names()
    assert len(template_names()) == 124


@pytest.mark.parametrize("name", template_names())
def test_every_format_is_whole(name):
    template = get_template(name)
    assert template.tool_syntax in TOOL_SYNTAXES.names and template.call_syntax in TOOL_SYNTAXES.names
    for slot in (template.system, template.user, template.assistant, template.observation, template.call_slots):
        assert sum("{{content}}" in piece for piece in slot if isinstance(piece, str)) == 1
    assert not any("{{" in piece for piece in template.prefix if isinstance(piece, str))
    if template.kind == "llama2":
        assert len(template.system) == 1, "it becomes part of a text"
    if template.replace_eos:
        assert template.stop_words


def test_no_table_repeats_what_it_inherits():
    for tables in TABLES.values():
        for name, own in tables.items():
            inherited = templates._keys(own["base"]) if "base" in own else {}
            repeated = [key for key, value in own.items() if key != "base" and inherited.get(key) == value]
            assert not repeated, f"{name} repeats {repeated}"


def test_reading_names_imports_nothing_heavy():
    code = (
        "import sys; from luthier.data.templates import template_names, get_template;"
        "template_names(); get_template('qwen3');"
        "sys.exit(','.join(m for m in ('torch', 'transformers', 'numpy', 'datasets') if m in sys.modules) or 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_unknown_names_come_with_the_nearest():
    with pytest.raises(UnknownVariant, match="did you mean 'qwen3'"):
        get_template("qwen33")
    with pytest.raises(UnknownVariant, match="did you mean 'mistral'"):
        get_template("qwen3", tool_format="mistrall")
    with pytest.raises(UnknownVariant):
        get_template("_chatml")


def test_overrides():
    """A call in another syntax ends like any other answer of the format."""
    template = get_template("mistral", tool_format="qwen", default_system="Be brief.")
    assert (template.tool_syntax, template.call_syntax, template.default_system) == ("qwen", "qwen", "Be brief.")
    assert template.call_slots == template.assistant == (" {{content}}", Special("eos"))
    assert get_template("mistral").call_slots == ("[TOOL_CALLS] {{content}}", Special("eos"))
    assert get_template("qwen", default_system="").default_system == ""


def test_inheritance_of_derived_keys():
    """Observation follows user and calls follow the answer, unless the table or one of its bases says otherwise."""
    assert get_template("yi").observation == get_template("yi").user
    assert get_template("chatml_de").observation == get_template("chatml").observation != get_template("chatml").user
    assert get_template("qwen3_5").call_syntax == "qwen3_5"
    assert get_template("chatglm3").prefix == (Token("[gMASK]"), Token("sop"))
