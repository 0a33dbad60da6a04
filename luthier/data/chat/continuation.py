"""How an answer goes on from its prompt, where a chat template writes the two in ways that do not fit.

Some write the prompt otherwise once it is answered: the system text stands in the question only as long as that waits.
Others open a thought in the prompt, or put an empty one there, and write answers without any. At inference there is
only the prompt, so that is kept, and the answer is what follows the question in the rendering that has it.
"""

import re

from luthier.core.errors import RowError
from luthier.data.chat.answers import THINKING_TAGS, between, without_thought

THOUGHTS = (
    THINKING_TAGS,
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
    ("◁think▷", "◁/think▷"),
)
"""The words that enclose thoughts in the chat templates of models."""


def continuation(prompt: str, whole: str, question: str, answer: str) -> str:
    """What stands after `prompt`. `whole` is the rendering with the answer; `question` and `answer` are as in the data.

    Raises `RowError` if the answer cannot be told from what stands before it.
    """
    words = _after(prompt, whole, question)
    if words is not None:
        return words
    for opening, closing in THOUGHTS:
        thought = re.search(rf"{re.escape(opening)}\s*({re.escape(closing)}\s*)?$", prompt)
        words = _after(prompt[: thought.start()], whole, question) if thought else None
        if thought is None or words is None:
            continue
        words = without_thought(words, (opening, closing))
        if thought[1]:
            return words
        own = between((opening, closing)).search(answer)
        inner = own[1].strip("\n") if own else ""
        return f"{inner}\n{closing}\n\n{words}"
    raise RowError("the model's own chat template writes an answer in another way than it asks for it")


def _after(prompt: str, whole: str, question: str) -> str | None:
    """What follows the prompt, or else the question and what asks for the answer; None if neither is there."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    start = prompt.rfind(question.strip()) if question.strip() else -1
    place = whole.rfind(prompt[start:]) if start >= 0 else -1
    return None if place < 0 else whole[place + len(prompt) - start :]
