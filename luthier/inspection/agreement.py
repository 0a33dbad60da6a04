"""Compares the rows of training with what an inference server sends, token by token.

The server uses the model's own chat template: it sends the ids of the prompt, and the model continues with the answer
and the token that ends it. So for each answer the row must begin with these ids, and the ending token must be a target.

The answer itself must be what the template writes. Where that lacks a part of what the data give (a thought, or words
that look like one), the row must have it; where it adds an empty thought, the row may leave it out.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any, Literal

from luthier.core.errors import RowError
from luthier.data.chat.answers import split_thought
from luthier.data.chat.completeness import require_complete
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.labels import IGNORE_INDEX, Encoded, label_turns
from luthier.data.types import Dialogue, Message
from luthier.inspection.server import Served, Server

NUM_TOKENS_BEFORE, NUM_TOKENS_AFTER = 12, 8
"""How many tokens around a difference are shown."""

ONLY_DEFAULT_SYSTEM = "only the default system text differs"


@dataclass(frozen=True, slots=True)
class Difference:
    """The first token that differs; the texts are decoded tokens around it."""

    answer: int
    """Counted from 1."""
    position: int
    """Index of the token in the row."""
    before: str
    training: str
    server: str


@dataclass(frozen=True, slots=True)
class Finding:
    """The result for one conversation."""

    status: Literal["equal", "differs", "refused"]
    """`refused`: the model's own chat template cannot render the conversation, or not all of an answer."""
    num_answers: int = 0
    reason: str = ""
    difference: Difference | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}


def compare(encoding: Encoding, server: Server, dialogue: Dialogue, stop_ids: Collection[int]) -> Finding:
    """`encoding` makes the rows of training, `server` the prompts of inference. Inference stops at `stop_ids`."""
    try:
        asked = server.asked(dialogue)
    except RowError as fault:
        return Finding("refused", reason=str(fault))
    answers, drops_thoughts = dialogue.messages[1::2], encoding.enable_thinking is False
    try:
        rows = _rows(encoding, dialogue)
    except RowError as fault:
        if any(_lost(message, answer.text, drops_thoughts) for message, answer in zip(answers, asked, strict=True)):
            return Finding("refused", reason=str(fault))
        return Finding("differs", reason=f"training drops this conversation: {fault}")
    for number, (answer, message, row) in enumerate(zip(asked, answers, rows, strict=True), start=1):
        checked = _Answer(number, message, answer, row, server, stop_ids, drops_thoughts)
        finding = checked.fault()
        if finding is not None:
            return replace(finding, num_answers=len(asked), reason=finding.reason or _cause(encoding, server, dialogue))
    return Finding("equal", num_answers=len(asked))


def default_systems(encoding: Encoding, server: Server) -> tuple[str, str]:
    """The default system texts of training and of the server."""
    theirs = _default_system(server)
    return theirs if encoding.model_template is not None else encoding.template.default_system, theirs


def _default_system(server: Server) -> str:
    """The default system text of a chat template; empty if it has none."""
    question, mark = (Message("user", "⟪user⟫"),), "⟪system⟫"
    try:
        marked = server.text(Dialogue(question, mark), 1, asks=True, thinks=True)
        plain = server.text(Dialogue(question), 1, asks=True, thinks=True)
    except RowError:
        return ""
    before, found, after = marked.partition(mark)
    frames = plain.startswith(before) and plain.endswith(after) and len(plain) > len(before) + len(after)
    return plain[len(before) : len(plain) - len(after)] if found and frames else ""


def _rows(encoding: Encoding, dialogue: Dialogue) -> list[Encoded]:
    """The row with each answer as a target, one per answer."""
    rows = encoding.unlimited().rows(dialogue, keep_past_thinking=True)
    return [label_turns(row, cutoff_len=None, eos_token_id=encoding.closing_eos) for row in rows for _ in row]


@dataclass(frozen=True, slots=True)
class _Answer:
    """An answer with both sides of the comparison."""

    number: int
    message: Message
    served: Served
    row: Encoded
    server: Server
    stop_ids: Collection[int]
    drops_thoughts: bool

    def fault(self) -> Finding | None:
        """None if the row begins with the tokens that the server has after this answer, and its end is a target."""
        prompt, ours = self.server.ids(self.served.prompt), self.row.input_ids
        if (place := _first_difference(ours[: len(prompt)], prompt)) is not None:
            return Finding("differs", 0, self._reason(prompt, place), self._difference(place, prompt))
        answer = self._answer_ids(prompt)
        if answer is None:
            return self._wrong_words(prompt)
        sent = prompt + answer
        if (place := _first_difference(ours[: len(sent)], sent)) is None:
            return self._wrong_end(len(sent) - 1)
        own = self._ended(ours[len(prompt) :])
        if self._leaves_out_an_empty_thought(own, answer):
            return self._wrong_end(len(prompt + own) - 1)
        return Finding("differs", 0, "", self._difference(place, sent))

    def _answer_ids(self, prompt: list[int]) -> list[int] | None:
        """The answer as the template writes it, up to its end; None if it lacks a part of what the data give."""
        answer = self.served.text
        if not self.served.is_continued or _lost(self.message, answer, self.drops_thoughts):
            return None
        return self._ended(self._continued(prompt, answer))

    def _leaves_out_an_empty_thought(self, own: list[int], answer: list[int]) -> bool:
        """Whether the row has all that the data give, and only what stands before it is missing."""
        ours, theirs = (str(self.server.tokenizer.decode(ids)) for ids in (own, answer))
        has_thought = self.message.thought or split_thought(self.message.content)[0]
        return not has_thought and theirs.endswith(ours) and not _lost(self.message, ours, self.drops_thoughts)

    def _continued(self, prompt: list[int], answer: str) -> list[int]:
        """A server cannot send a token that spans the end of the prompt."""
        ids = self.server.ids(self.served.prompt + answer)
        return ids[len(prompt) :] if ids[: len(prompt)] == prompt else self.server.ids(answer)

    def _ended(self, ids: list[int]) -> list[int]:
        """The model generates nothing after the token that ends it."""
        end = next((place for place, token in enumerate(ids) if token in self.stop_ids), len(ids))
        return ids[: end + 1]

    def _wrong_words(self, prompt: list[int]) -> Finding | None:
        """The template does not write the whole answer, so the words of the row count, and its end."""
        learned = self.row.labels[len(prompt) :]
        end = next((i for i, token in enumerate(learned) if token in self.stop_ids), None)
        text = self.server.tokenizer.decode([token for token in learned[:end] if token != IGNORE_INDEX])
        lost = _lost(self.message, str(text), self.drops_thoughts)
        if lost is not None:
            return Finding("differs", reason=str(lost))
        return None if end is not None else self._wrong_end(len(self.row.input_ids) - 1)

    def _wrong_end(self, end: int) -> Finding | None:
        ids, labels = self.row.input_ids, self.row.labels
        stops = ids[end] in self.stop_ids
        # Without a token that ends an answer, the next one teaches to stop.
        learned = labels[end] if stops or end + 1 >= len(labels) else labels[end + 1]
        if learned in self.stop_ids:
            return None
        last = self.server.tokenizer.decode(ids[max(end - 3, 0) : end + 1])
        what = "is not learned" if stops else "is missing: nothing there is a token that inference stops at"
        return Finding("differs", reason=f"the end of answer {self.number} (after {last!r}) {what}")

    def _reason(self, prompt: list[int], place: int) -> str:
        if self.served.whole is None:
            return ""
        whole = self.server.ids(self.served.whole)
        merged = whole[: len(prompt)] != prompt and self.row.input_ids[: place + 1] == whole[: place + 1]
        return "one token holds the end of the prompt and the beginning of the answer" if merged else ""

    def _difference(self, position: int, sent: Sequence[int]) -> Difference:
        def decoded(ids: Sequence[int], start: int, end: int) -> str:
            return str(self.server.tokenizer.decode(list(ids[max(start, 0) : end])))

        ours, after = self.row.input_ids, position + NUM_TOKENS_AFTER
        before = decoded(sent, position - NUM_TOKENS_BEFORE, position)
        return Difference(self.number, position, before, decoded(ours, position, after), decoded(sent, position, after))


def _lost(message: Message, text: str, drops_thoughts: bool) -> RowError | None:
    """What of the answer the text lacks; None if nothing."""
    try:
        require_complete(message, text, thoughts_dropped=drops_thoughts)
    except RowError as fault:
        return fault
    return None


def _first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    pairs = enumerate(zip_longest(ours, theirs))
    return next((place for place, (one, other) in pairs if one != other), None)


def _cause(encoding: Encoding, server: Server, dialogue: Dialogue) -> str:
    """A reason, if only the default system text differs."""
    if dialogue.system is not None or encoding.model_template is not None:
        return ""
    given = replace(dialogue, system="Be brief.")
    try:
        rows, asked = _rows(encoding, given), server.asked(given)
    except RowError:
        return ""
    for answer, row in zip(asked, rows, strict=True):
        sent = server.ids(answer.prompt)
        if row.input_ids[: len(sent)] != sent:
            return ""
    ours, theirs = default_systems(encoding, server)
    return ONLY_DEFAULT_SYSTEM if ours != theirs else ""
