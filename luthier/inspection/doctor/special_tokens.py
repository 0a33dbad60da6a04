"""Texts that the tokenizer reads as special tokens: they let a message end its turn or take another role."""

from collections.abc import Iterator

from luthier.data.chat.answers import flat_text
from luthier.data.types import ANSWERING, Example, Message, Preference
from luthier.inspection.doctor import Check, CheckContext, Finding, Sample, finding

REMEDY = "set split_special_tokens: true to have it read as plain text, or remove it from the data"
ESCAPED = "nothing to do, unless it was meant as the special token"


def find(sample: Sample, context: CheckContext) -> Iterator[Finding]:
    if sample.example is None:
        return
    for where, text, is_answer in _texts(sample.example):
        words = dict.fromkeys(context.special_words.findall(text))
        if is_answer:
            words = {word: None for word in words if word not in context.answer_words}
        if not words:
            continue
        held = f"{where} holds {', '.join(words)}"
        if context.split_special_tokens:
            what = f"{held}, read as plain text (split_special_tokens)"
            yield finding(sample, "special_tokens", "info", what, ESCAPED)
        else:
            what = f"{held}, not escaped: the model sees the special token"
            yield finding(sample, "special_tokens", "warning", what, REMEDY)


def _texts(example: Example) -> Iterator[tuple[str, str, bool]]:
    """(name, text, whether the model is trained to write it)."""
    yield "the system text", example.system or "", False
    yield "the list of tools", example.tools, False
    messages: tuple[Message, ...] = example.prompt if isinstance(example, Preference) else example.messages
    for number, message in enumerate(messages, start=1):
        is_answer = message.role in ANSWERING
        yield f"{message.role} message {number}", flat_text(message, with_thought=True), is_answer
    if isinstance(example, Preference):
        yield "the chosen answer", flat_text(example.chosen, with_thought=True), True
        yield "the rejected answer", flat_text(example.rejected, with_thought=True), True


CHECK = Check("special_tokens", find)
