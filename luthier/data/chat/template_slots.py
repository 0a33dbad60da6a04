"""Reads the slots, the stop word and the tool-call syntax off a model's own chat template.

A chat template is Jinja source, which `luthier.data.chat.model_template` renders; a Modelfile needs slots. So the
template is rendered with marks as messages, and the text around the marks gives the slots. The slots are then verified:
they must render other conversations to exactly the text of the template. For a template that does more, no slots are
guessed.
"""

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError
from luthier.core.kinds import TOOL_SYNTAXES
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate
from luthier.data.chat.program import run
from luthier.data.chat.render import as_text, render
from luthier.data.templates import CONTENT, Special, Template, get_template, with_options
from luthier.data.tools import wrapped
from luthier.data.types import Dialogue, Message, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SYSTEM, USER, ANSWER, NEXT = "⟪system⟫", "⟪user⟫", "⟪answer⟫", "⟪next⟫"
WEATHER = {
    "name": "weather",
    "description": "The weather of a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


class _MoreThanSlots(Exception):
    """The chat template does something that slots cannot express."""


def choose_template(
    name: str | None,
    tokenizer: "PreTrainedTokenizerBase",
    tool_format: str | None = None,
    default_system: str | None = None,
) -> Template:
    """The format called `name`, or the model's own for `auto` and None; see `get_template` for the two options."""
    if name in (None, "auto"):
        return with_options(template_from_slots(tokenizer), tool_format, default_system)
    return get_template(name, tool_format, default_system)


def template_from_slots(tokenizer: "PreTrainedTokenizerBase") -> Template:
    """The slots of the tokenizer's chat template. Without one, there are no marks, and each answer ends in the eos.

    A template that slots cannot express gives the kind `program`: only its stop word and its call syntax are known.
    """
    if not tokenizer.chat_template:
        answer = (CONTENT, Special("eos"))
        return replace(get_template("empty"), name="auto", assistant=answer, call_slots=answer)
    try:
        template = _read_off(tokenizer)
        _prove(template, tokenizer)
    except _MoreThanSlots:
        template = replace(get_template("empty"), name="auto", kind="program", stop_words=_stop_words(tokenizer))
    syntax = _call_syntax(tokenizer, template.stop_words)
    end = _after_answer(tokenizer)
    ends_openly = end is not None and not template.stop_words and (tokenizer.eos_token or "") not in end
    return replace(template, tool_syntax=syntax, call_syntax=syntax, efficient_eos=ends_openly)


def _after_answer(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """The text after an answer; None if the template changes the answer."""
    try:
        text = _text(tokenizer, ("user", USER), ("assistant", ANSWER), asks=False)
    except _MoreThanSlots:
        return None
    return text.rpartition(ANSWER)[2] if ANSWER in text else None


def _stop_words(tokenizer: "PreTrainedTokenizerBase") -> tuple[str, ...]:
    stop = _terminator(tokenizer, _after_answer(tokenizer) or "")
    return (stop,) if stop else ()


def _call_syntax(tokenizer: "PreTrainedTokenizerBase", stop_words: tuple[str, ...]) -> str:
    """The syntax that can parse the calls of the template; `default` if none can."""
    calls = [ToolCall("weather", {"city": "Rome"}, "abcdefgh1")]
    messages = (Message("user", "?"), Message("function", "", calls=tuple(calls)))
    try:
        (asked,) = ModelChatTemplate(Encoder(tokenizer)).asked(Dialogue(messages, tools=json.dumps([WEATHER])))
    except RowError:
        return "default"
    answer = asked.answer
    for end in (tokenizer.eos_token, *stop_words):
        answer = answer.partition(end)[0] if end else answer
    reads = (
        name for name in TOOL_SYNTAXES.names if _parsed(name, answer) == [(call.name, call.arguments) for call in calls]
    )
    return next(reads, "default")


def _parsed(syntax: str, answer: str) -> list[tuple[str, Any]]:
    calls = TOOL_SYNTAXES.get(syntax).parse(answer, [WEATHER])
    return [(call.name, call.arguments) for call in calls or ()]


def _text(tokenizer: "PreTrainedTokenizerBase", *messages: tuple[str, str], asks: bool) -> str:
    """The rendering of a conversation. `asks`: with the generation prompt."""
    listed = [{"role": role, "content": content} for role, content in messages]
    only_for_tools = isinstance(tokenizer.chat_template, dict) and "default" not in tokenizer.chat_template
    try:
        return run(tokenizer, listed, [wrapped(WEATHER)] if only_for_tools else None, asks=asks, switches={})
    except RowError as error:
        raise _MoreThanSlots(f"it refuses {', '.join(role for role, _ in messages)}: {error}") from error


def _cut(text: str, mark: str) -> tuple[str, str]:
    if text.count(mark) != 1:
        raise _MoreThanSlots(f"it writes {mark} {text.count(mark)} times")
    before, _, after = text.partition(mark)
    return before, after


def _read_off(tokenizer: "PreTrainedTokenizerBase") -> Template:
    first = ("user", USER)
    opening, after_user = _cut(_text(tokenizer, first, asks=True), USER)
    _, answered = _cut(_text(tokenizer, first, ("assistant", ANSWER), asks=False), USER)
    before_answer, after_answer = _cut(answered, ANSWER)
    whole = _text(tokenizer, first, ("assistant", ANSWER), ("user", NEXT), asks=True)
    _, rest = _cut(whole, ANSWER)
    between, _ = _cut(rest, NEXT)
    if not between.startswith(after_answer):
        raise _MoreThanSlots("an answer ends differently when a question follows")
    before_user = between.removeprefix(after_answer)
    if not opening.endswith(before_user):
        raise _MoreThanSlots("the first question opens differently from the next")
    head = opening.removesuffix(before_user)
    user = (before_user + CONTENT + after_user,)
    slots: dict[str, Any] = {"user": user, "observation": user, "assistant": (CONTENT + after_answer,)}
    slots |= {"call_slots": slots["assistant"], **_system_slots(tokenizer, head, before_user)}
    thought = before_answer.removeprefix(after_user)
    if thought:
        slots |= _thinking(thought)
    stop = _terminator(tokenizer, after_answer)
    return Template(name="auto", stop_words=(stop,) if stop else (), call_syntax="default", **slots)


def _system_slots(tokenizer: "PreTrainedTokenizerBase", head: str, before_user: str) -> dict[str, Any]:
    """`head`: the text before the first question without a system text: a bos, a default system text, or nothing."""
    before, rest = _cut(_text(tokenizer, ("system", SYSTEM), ("user", USER), asks=True), SYSTEM)
    after, _ = _cut(rest, USER)
    after = after.removesuffix(before_user)
    if head.startswith(before) and head.endswith(after) and len(head) > len(before) + len(after):
        default = head[len(before) : len(head) - len(after)]
        return {"system": (before + CONTENT + after,), "default_system": default}
    if not before.startswith(head):
        raise _MoreThanSlots("the text before a system message is not the text before a question")
    prefix = (head,) if head else ()
    return {"prefix": prefix, "system": (before.removeprefix(head) + CONTENT + after,)}


def _thinking(thought: str) -> dict[str, Any]:
    """The thinking tags, from the empty thought before an answer without one."""
    stripped = thought.strip()
    closing = stripped.rfind("</") if "</" in stripped else -1
    if closing <= 0:
        raise _MoreThanSlots(f"it puts {thought!r} before an answer")
    start = thought.index(stripped[closing:])
    opening, close = thought[:start], thought[start:]
    if opening.endswith("\n\n"):
        opening, close = opening[:-1], "\n" + close
    return {"kind": "reasoning", "thinking_tags": (opening, close)}


def _terminator(tokenizer: "PreTrainedTokenizerBase", after_answer: str) -> str | None:
    """The special token that ends an answer, unless it is the tokenizer's eos."""
    if tokenizer.eos_token and tokenizer.eos_token in after_answer:
        return None
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return min((word for word in special if word in after_answer), key=after_answer.index, default=None)


def _prove(template: Template, tokenizer: "PreTrainedTokenizerBase") -> None:
    """The slots must render to the text of the template, with and without a system message."""
    talk = (("user", "How are you?"), ("assistant", "Well."), ("user", "And\nnow?"))
    messages = tuple(Message(role, content) for role, content in talk)  # type: ignore[arg-type]
    for system in ("", "Be brief."):
        opening = (("system", system),) if system else ()
        expected = _text(tokenizer, *opening, *talk, asks=True)
        (turn,) = render(template, messages, system=system or None, purpose="infer")
        found = as_text(turn.prompt, tokenizer.bos_token or "", tokenizer.eos_token or "")
        if found != expected:
            raise _MoreThanSlots("it treats a longer conversation in another way")
