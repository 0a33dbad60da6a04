"""How an answer continues its prompt, for chat templates that render the two inconsistently.

Some render the prompt differently once it is answered: the system text is in the last question only. Others open a
thought in the prompt, or add an empty one, and render answers without any. Inference sees only the prompt, so the
prompt is kept, and the answer is the text after the question in the rendering with the answer.
"""

import re
from bisect import bisect_left
from dataclasses import dataclass

from luthier.core.errors import RowError
from luthier.data.chat.answers import THINKING_TAGS

THOUGHTS = (
    THINKING_TAGS,
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
    ("◁think▷", "◁/think▷"),
    ("[THINK]", "[/THINK]"),
)
"""The tags around thoughts in the chat templates of models."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """A thought at the end of a prompt, which the answer continues."""

    start: int
    """Where it begins in the prompt."""
    opening: str
    closing: str
    is_closed: bool
    gap: str
    """The whitespace after the opening tag."""

    def close(self, words: str) -> str:
        """The end of an empty thought, then the words."""
        line = "\n" if "\n" in self.gap else ""
        return f"{line}{self.closing}{2 * line}{words}"


def continuation(prompt: str, whole: str, question: str) -> str:
    """The text after `prompt`. `whole` is the rendering with the answer; `question` is as in the data.

    A thought that the prompt has opened is closed. Raises `RowError` if the answer cannot be separated from the prompt.
    """
    thought = _opened(prompt)
    end = thought.start if thought else len(prompt)
    words = _after(prompt, whole, question, end)
    if words is not None:
        return words
    words = _after(prompt[:end], whole, question, end) if thought else None
    if thought is None or words is None:
        raise RowError("the model's own chat template renders the prompt differently once it has an answer")
    begun = words.lstrip()
    if thought.is_closed:
        return without_empty_thought(words)
    if begun.startswith(thought.opening):
        return begun.removeprefix(thought.opening).lstrip("\n" if thought.gap else "")
    return words if begun.startswith(thought.closing) else thought.close(words)


def without_empty_thought(words: str) -> str:
    """The answer without the empty thought that it begins with, if it does."""
    for opening, closing in THOUGHTS:
        if opening not in words:
            continue
        empty = re.match(rf"\s*{re.escape(opening)}\s*{re.escape(closing)}\n{{0,2}}", words)
        if empty:
            return words[empty.end() :]
    return words


def without_frame(prompt: str, words: str, end: str) -> str:
    """The answer without what the template puts around every answer: an empty thought, or the end of the one that the
    prompt opens, and `end`."""
    opened = _opened(prompt)
    inner = without_empty_thought(words.removesuffix(end))
    closed = re.match(rf"\s*{re.escape(opened.closing)}", inner) if opened and not opened.is_closed else None
    return inner[closed.end() :] if closed else inner


def with_thought(prompt: str, words: str, thought: str, inline: str = "") -> str:
    """An answer that the template writes without its thought, with it.

    `words` is the text after the prompt; `inline` is the thought between `<think>` tags as the data write it, if they
    do. The thought fills the place of an empty one, or it stands before the words.
    """
    opened = _opened(prompt)
    if opened and not opened.is_closed:
        line = "\n" if "\n" in opened.gap else ""
        closed = re.match(rf"\s*(?={re.escape(opened.closing)})", words)
        rest = words[closed.end() :] if closed else opened.close(words).removeprefix(line)
        return f"{thought}{line}{rest}"
    for opening, closing in THOUGHTS:
        empty = re.match(rf"(\s*{re.escape(opening)})(\s*)(?={re.escape(closing)})", words)
        if empty:
            middle = (len(empty[2]) + 1) // 2
            return f"{empty[1]}{empty[2][:middle]}{thought}{empty[2][middle:]}{words[empty.end() :]}"
    return (inline or f"{THINKING_TAGS[0]}\n{thought}\n{THINKING_TAGS[1]}\n\n") + words


def _opened(prompt: str) -> _Opened | None:
    """The thought at the end of a prompt, open or empty."""
    for opening, closing in THOUGHTS:
        if opening not in prompt:
            continue
        found = re.search(rf"{re.escape(opening)}(\s*)(({re.escape(closing)})\s*)?$", prompt)
        if found:
            return _Opened(found.start(), opening, closing, found[2] is not None, found[1])
    return None


def _after(prompt: str, whole: str, question: str, end: int) -> str | None:
    """The text after the prompt, or else after the question and the generation prompt; None if neither is found.

    `end`: where the question has ended in the prompt, at the latest.
    """
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    words = question.strip()
    starts = [found.start() for found in re.finditer(re.escape(words), prompt[:end])] if words else []
    # A short question may stand anywhere, even in the generation prompt. The longest end of the prompt is the surest,
    # and if one is in `whole`, so are all shorter ones.
    first = bisect_left(starts, True, key=lambda start: prompt[start:] in whole)
    if first == len(starts):
        return None
    tail = prompt[starts[first] :]
    return whole[whole.rfind(tail) + len(tail) :]
