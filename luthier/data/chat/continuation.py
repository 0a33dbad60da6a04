"""How an answer continues its prompt, for chat templates that render the two inconsistently.

Some render the prompt differently once it is answered: the system text is in the last question only. Others open a
thought in the prompt, or add an empty one, and render answers without any. Inference sees only the prompt, so the
prompt is kept, and the answer is the text after the question in the rendering with the answer.
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
"""The tags around thoughts in the chat templates of models."""


def continuation(prompt: str, whole: str, question: str, answer: str) -> str:
    """The text after `prompt`. `whole` is the rendering with the answer; `question` and `answer` are as in the data.

    Raises `RowError` if the answer cannot be separated from the prompt.
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
    raise RowError("the model's own chat template renders the prompt differently once it has an answer")


def _after(prompt: str, whole: str, question: str) -> str | None:
    """The text after the prompt, or else after the question and the generation prompt; None if neither is found."""
    if whole.startswith(prompt):
        return whole[len(prompt) :]
    start = prompt.rfind(question.strip()) if question.strip() else -1
    place = whole.rfind(prompt[start:]) if start >= 0 else -1
    return None if place < 0 else whole[place + len(prompt) - start :]
