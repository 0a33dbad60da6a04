"""Chat formats: the text around the messages of a conversation. One TOML file per family, one table per format.

A slot is a tuple of pieces. Each piece of text is tokenized separately, so the token ids depend on where one piece ends
and the next begins. `{{content}}` and `{{idx}}` (the number of the turn) are filled in by `luthier.data.chat.render`.

A table lists only what differs from its `base`, or else from the defaults below. Three keys default to another one:
`observation` to `user`, `call_slots` to `assistant`, `call_syntax` to `tool_syntax`. A table whose name begins with `_`
is only a base.
"""

import dataclasses
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from luthier.core.errors import UnknownVariant
from luthier.core.kinds import TOOL_SYNTAXES
from luthier.core.registry import did_you_mean

Kind = Literal["plain", "llama2", "reasoning", "glm47reasoning", "program"]


@dataclass(frozen=True, slots=True)
class Special:
    """The bos or eos token of the tokenizer; nothing if it has none."""

    kind: Literal["bos", "eos"]


@dataclass(frozen=True, slots=True)
class Token:
    """One token, given by its text."""

    text: str


CONTENT = "{{content}}"
"""Stands for the text of a message in a piece."""
Piece = str | Special | Token
Slot = tuple[Piece, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """One chat format."""

    name: str
    kind: Kind = "plain"
    """`llama2`: the system text is part of the first user turn. `reasoning`: answers may begin with a thought.
    `glm47reasoning`: the same, and the empty thought is the closing tag alone. `program`: a model's own chat template
    that slots cannot express; it cannot be rendered with slots."""
    prefix: Slot = ()
    system: Slot = (CONTENT,)
    user: Slot
    """Ends with the text that opens the answer."""
    assistant: Slot
    observation: Slot
    """The result of a tool call. Ends with the text that opens the answer."""
    tool_syntax: str = "default"
    """The syntax of the tool description; a file of `luthier.data.tools`."""
    call_syntax: str
    """The syntax of calls."""
    call_slots: Slot
    """An answer that calls tools."""
    default_system: str = ""
    stop_words: tuple[str, ...] = ()
    thinking_tags: tuple[str, str] = ("<think>\n", "\n</think>\n\n")
    tool_call_words: tuple[str, str] = ("<tool_call>", "</tool_call>")
    """Tags that may enclose the JSON of a call in the data."""
    strips_tools: bool = False
    """Without a system text, the description of the tools begins without its line breaks."""
    efficient_eos: bool = False
    """The slots have no eos; one eos ends the whole conversation."""
    replace_eos: bool = False
    """The first stop word becomes the tokenizer's eos."""
    replace_chat_template: bool = False
    """The chat template of the tokenizer is replaced by one made from these slots."""
    multimodal: str = "base"

    @property
    def reasons(self) -> bool:
        return self.kind in ("reasoning", "glm47reasoning")

    @property
    def empty_thought(self) -> str:
        """The beginning of an answer without a thought, in reasoning formats."""
        return self.thinking_tags[1] if self.kind == "glm47reasoning" else "".join(self.thinking_tags)


_HEADER = re.compile(r'^\[(?:"([^"\n]+)"|([\w-]+))\]$', re.MULTILINE)
_SLOTS = ("prefix", "system", "user", "assistant", "observation", "call_slots")


@cache
def _files() -> dict[str, Path]:
    """Table name -> file, including bases. Only headers are read, since `check` needs the names only."""
    return {
        quoted or bare: file
        for file in sorted(Path(__file__).parent.glob("*.toml"))
        for quoted, bare in _HEADER.findall(file.read_text("utf-8"))
    }


@cache
def template_names() -> tuple[str, ...]:
    return tuple(sorted(name for name in _files() if not name.startswith("_")))


def family_of(name: str) -> str:
    """The file of a format."""
    return _files()[name].stem


@cache
def _tables(file: Path) -> dict[str, dict[str, Any]]:
    return tomllib.loads(file.read_text("utf-8"))


def _keys(name: str) -> dict[str, Any]:
    """The keys of a table, merged over those of its bases."""
    own = dict(_tables(_files()[name])[name])
    base = own.pop("base", None)
    return {**_keys(base), **own} if base else own


def _piece(value: str | dict[str, Any]) -> Piece:
    if isinstance(value, str):
        return value
    return Special(value["special"]) if "special" in value else Token(value["token"])


@cache
def _load(name: str) -> Template:
    keys = _keys(name)
    keys.setdefault("observation", keys["user"])
    keys.setdefault("call_slots", keys["assistant"])
    keys.setdefault("call_syntax", keys.get("tool_syntax", "default"))
    for key, value in keys.items():
        if key in _SLOTS:
            keys[key] = tuple(map(_piece, value))
        elif isinstance(value, list):
            keys[key] = tuple(value)
    return Template(name=name, **keys)


def get_template(name: str, tool_format: str | None = None, default_system: str | None = None) -> Template:
    """The format called `name`, with another tool syntax or default system text if given.

    With another syntax, calls use the slots of ordinary answers, since the call slots may contain text of the format's
    own syntax. Raises `UnknownVariant`, with the nearest name, for an unknown format or syntax.
    """
    if name not in template_names():
        hint = did_you_mean(name, template_names(), repr)
        hint = f"; {hint}" if hint else ""
        raise UnknownVariant(f"template: unknown chat format {name!r}{hint} (`luthier template list` names all)")
    return with_options(_load(name), tool_format, default_system)


def with_options(template: Template, tool_format: str | None, default_system: str | None) -> Template:
    """The format with another tool syntax or default system text, if given."""
    if tool_format is not None:
        TOOL_SYNTAXES.get(tool_format)
        template = dataclasses.replace(
            template, tool_syntax=tool_format, call_syntax=tool_format, call_slots=template.assistant
        )
    if default_system is not None:
        template = dataclasses.replace(template, default_system=default_system)
    return template
