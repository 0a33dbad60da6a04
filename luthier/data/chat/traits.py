"""What a model's own chat template expects of messages, found by running it on a few short conversations.

Templates differ in the key they read thoughts from, in the name of the switch for thinking, in whether the arguments of
a call are an object or JSON text, and in what they do with the ids of calls.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError
from luthier.data.chat.parts import in_parts
from luthier.data.chat.program import OpenAIMessage, function_call, run, source
from luthier.data.types import THOUGHT_KEYS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SWITCHES = ("thinking", "enable_reasoning", "reasoning", "enable_think", "think", "thinking_enabled", "use_thinking")
"""Other names that templates have for `enable_thinking`."""
_QUESTION, _ANSWER, _THOUGHT = "Question1", "Answer2", "Thought3"
_ARGUMENTS = {"city": "Rome", "now": True}
_ID = "abcdefgh1"
"""Nine letters and digits, the only form that some templates accept."""
_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "now": {"type": "boolean"}}},
    },
}
_GENERATION_TAGS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
"""Tags of transformers, which plain Jinja does not know."""


@dataclass(frozen=True, slots=True)
class Traits:
    thought_key: str = ""
    """The key that the template reads thoughts from; empty if it reads none."""
    reads_inline: bool = False
    """Whether `<think>` at the beginning of a text is rendered like the thought in that key, up to whitespace."""
    knows_thoughts: bool = False
    """Whether thoughts have a place in the template at all."""
    switches: tuple[str, ...] = ()
    """Its names for `enable_thinking`, besides that one."""
    text_arguments: bool = False
    """Whether the arguments of a call have to be JSON text."""
    needs_ids: bool = False
    """Whether it fails without the ids of calls, or leaves their places empty."""
    writes_ids: bool = False
    """Whether the id of a call is part of the answer."""
    end: str = ""
    """What it writes after an answer."""
    lead: str = ""
    """What it writes before the text of the last answer only: an empty thought."""
    wants_parts: bool = False
    """Whether contents have to be lists of parts: it writes no word of a content that is text."""


def traits_of(tokenizer: "PreTrainedTokenizerBase", *, has_tools: bool) -> Traits:
    """Of the template that runs with or without tools. Raises `RowError` if the model has none for that."""
    return _traits(tokenizer, source(tokenizer, has_tools=has_tools), has_tools)


@lru_cache(maxsize=8)
def _traits(tokenizer: "PreTrainedTokenizerBase", chat_template: str, has_tools: bool) -> Traits:
    """`chat_template` is part of the key of the cache, since that of a tokenizer may be exchanged."""
    switches = _other_switches(chat_template)
    probe = _Probe(tokenizer, has_tools, switches)
    if wants_parts := not probe.shows_question():
        in_lists = _Probe(tokenizer, has_tools, switches, in_lists=True)
        probe, wants_parts = (in_lists, True) if in_lists.shows_question() else (probe, False)
    key = next((key for key in THOUGHT_KEYS if probe.shows_thought(key)), "")
    text_arguments = probe.wants_text_arguments()
    needs_ids, writes_ids = probe.ids(text_arguments)
    return Traits(
        thought_key=key,
        reads_inline=bool(key) and probe.reads_inline(key),
        knows_thoughts=bool(key) or "think" in chat_template,
        switches=probe.switches,
        text_arguments=text_arguments,
        needs_ids=needs_ids,
        writes_ids=writes_ids,
        end=probe.end(),
        lead=probe.lead(),
        wants_parts=wants_parts,
    )


def _other_switches(chat_template: str) -> tuple[str, ...]:
    """The names of `SWITCHES` that the template reads without setting them itself."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    parser = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        free = meta.find_undeclared_variables(parser.parse(_GENERATION_TAGS.sub("", chat_template)))
    except TemplateSyntaxError:  # reported when the template runs
        return ()
    return tuple(name for name in SWITCHES if name in free)


@dataclass(frozen=True, slots=True)
class _Probe:
    tokenizer: "PreTrainedTokenizerBase"
    has_tools: bool
    switches: tuple[str, ...]
    in_lists: bool = False
    """Whether contents are lists of parts."""

    def shows_question(self) -> bool:
        return _QUESTION in (self._text() or "")

    def shows_thought(self, key: str) -> bool:
        """In a last answer, or in one that calls a tool."""
        answer = {"role": "assistant", "content": _ANSWER, key: _THOUGHT}
        call = {"role": "assistant", "content": "", key: _THOUGHT, "tool_calls": [_call(_ARGUMENTS)]}
        return any(_THOUGHT in (self._text(message) or "") for message in (answer, call))

    def reads_inline(self, key: str) -> bool:
        inline = f"<think>\n{_THOUGHT}\n</think>\n\n{_ANSWER}"
        apart = self._text({"role": "assistant", "content": _ANSWER, key: _THOUGHT}) or ""
        within = self._text({"role": "assistant", "content": inline}) or ""
        return "".join(apart.split()) == "".join(within.split())

    def end(self) -> str:
        _, found, end = (self._text({"role": "assistant", "content": _ANSWER}) or "").rpartition(_ANSWER)
        return end if found else ""

    def lead(self) -> str:
        answer = {"role": "assistant", "content": _ANSWER}
        last, found, _ = (self._text(answer) or "").partition(_ANSWER)
        earlier, found_earlier, _ = (self._text(answer, {"role": "user", "content": "Next4"}) or "").partition(_ANSWER)
        return last.removeprefix(earlier) if found and found_earlier and last.startswith(earlier) else ""

    def wants_text_arguments(self) -> bool:
        """Whether objects make the template fail, or come out in Python's notation."""
        given, text = (
            self._text({"role": "assistant", "content": "", "tool_calls": [_call(arguments, _ID)]})
            for arguments in (_ARGUMENTS, json.dumps(_ARGUMENTS))
        )
        return text is not None and (given is None or (str(_ARGUMENTS) in given and str(_ARGUMENTS) not in text))

    def ids(self, text_arguments: bool) -> tuple[bool, bool]:
        """(needed, part of the answer)."""
        arguments = json.dumps(_ARGUMENTS) if text_arguments else _ARGUMENTS
        result = {"role": "tool", "content": "sunny"}
        plain = {"role": "assistant", "content": "", "tool_calls": [_call(arguments)]}
        named = {"role": "assistant", "content": "", "tool_calls": [_call(arguments, _ID)]}
        with_id, without = self._text(named), self._text(plain)
        whole, bare = self._text(named, {**result, "tool_call_id": _ID}), self._text(plain, result)
        needed = (with_id is not None and without is None) or (whole is not None and bare is None)
        gaps = any(text is not None and _ID in text and text.replace(_ID, "") == other
                   for text, other in ((with_id, without), (whole, bare)))  # fmt: skip
        return needed or gaps, _ID in (with_id or "")

    def _text(self, *messages: OpenAIMessage) -> str | None:
        """The text after a question; None if the template fails."""
        switches = dict.fromkeys(("enable_thinking", *self.switches), True)
        tools = [_TOOL] if self.has_tools else None
        listed = [{"role": "user", "content": _QUESTION}, *messages]
        try:
            return run(
                self.tokenizer,
                in_parts(listed, all_contents=True) if self.in_lists else listed,
                tools,
                asks=not messages or messages[-1]["role"] == "tool",
                switches=switches,
            )
        except RowError:
            return None


def _call(arguments: Any, call_id: str = "") -> dict[str, Any]:
    return function_call("weather", arguments, call_id)
