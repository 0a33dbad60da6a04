"""Compares the rows of training with what an inference server sends, token by token.

The server uses the model's own chat template: it sends the ids of the prompt, and the model continues with the answer
and the token that ends it. So for each answer the row must begin with these ids, and the ending token must be a target.
"""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any, Literal

from luthier.core.errors import RowError
from luthier.data.chat.encoder import Encoder
from luthier.data.chat.model_template import ModelChatTemplate, RenderedAnswer
from luthier.data.rows.encoding import Encoding
from luthier.data.rows.labels import Encoded, label_turns
from luthier.data.types import Dialogue, Message

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
    """`refused`: the model's own chat template cannot render the conversation, so no server can send it."""
    num_answers: int = 0
    reason: str = ""
    difference: Difference | None = None

    def to_json(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value not in (None, "")}


def compare(encoding: Encoding, server: ModelChatTemplate, dialogue: Dialogue, stop_ids: Collection[int]) -> Finding:
    """`encoding` makes the rows of training, `server` the prompts of inference. Inference stops at `stop_ids`."""
    try:
        asked = server.asked(dialogue)
    except RowError as fault:
        return Finding("refused", reason=str(fault))
    try:
        rows = _rows(encoding, dialogue)
    except RowError as fault:
        return Finding("differs", reason=f"training drops this conversation: {fault}")
    for number, (answer, row) in enumerate(zip(asked, rows, strict=True), start=1):
        finding = _compare_answer(number, answer, row, server.encoder, stop_ids)
        if finding is not None:
            return replace(finding, num_answers=len(asked), reason=finding.reason or _cause(encoding, server, dialogue))
    return Finding("equal", num_answers=len(asked))


def default_systems(encoding: Encoding, server: ModelChatTemplate) -> tuple[str, str]:
    """The default system texts of training and of the server."""
    theirs = _default_system(server)
    return theirs if encoding.model_template is not None else encoding.template.default_system, theirs


def _default_system(model_template: ModelChatTemplate) -> str:
    """The default system text of a chat template; empty if it has none."""
    question, mark = [Message("user", "⟪user⟫")], "⟪system⟫"
    try:
        marked = model_template.text(question, mark, "", asks=True, thinks=True)
        plain = model_template.text(question, "", "", asks=True, thinks=True)
    except RowError:
        return ""
    before, found, after = marked.partition(mark)
    frames = plain.startswith(before) and plain.endswith(after) and len(plain) > len(before) + len(after)
    return plain[len(before) : len(plain) - len(after)] if found and frames else ""


def _rows(encoding: Encoding, dialogue: Dialogue) -> list[Encoded]:
    """The row with each answer as a target, one per answer."""
    rows = encoding.unlimited().rows(dialogue, keep_past_thinking=True)
    return [label_turns(row, cutoff_len=None, eos_token_id=encoding.closing_eos) for row in rows for _ in row]


def _compare_answer(
    number: int, answer: RenderedAnswer, row: Encoded, encoder: Encoder, stop_ids: Collection[int]
) -> Finding | None:
    """None if the row begins with the tokens that the server has after this answer, and the stop token is a target."""
    prompt, whole = encoder.text(answer.prompt), encoder.text(answer.whole)
    straddles = whole[: len(prompt)] != prompt
    # A server cannot send a token that spans the end of the prompt.
    expected = prompt + encoder.text(answer.answer) if straddles else whole
    # The model never generates anything after the ending token.
    end = next((i for i in range(len(prompt), len(expected)) if expected[i] in stop_ids), len(expected))
    sent = expected[: end + 1]
    pairs = enumerate(zip_longest(row.input_ids[: len(sent)], sent))
    position = next((i for i, (ours, theirs) in pairs if ours != theirs), None)
    if position is not None:
        merged = straddles and row.input_ids[: position + 1] == whole[: position + 1]
        reason = "one token holds the end of the prompt and the beginning of the answer" if merged else ""
        return Finding("differs", 0, reason, _difference(number, position, row.input_ids, sent, encoder))
    learned = row.labels[end] if end < len(row.labels) else None
    if learned in stop_ids:
        return None
    last = encoder.tokenizer.decode(row.input_ids[max(end - 3, 0) : end + 1])
    what = "is not learned" if end < len(expected) else "is missing: nothing there is a token that inference stops at"
    return Finding("differs", reason=f"the end of answer {number} (after {last!r}) {what}")


def _difference(number: int, position: int, ours: Sequence[int], theirs: Sequence[int], encoder: Encoder) -> Difference:
    def decoded(ids: Sequence[int], start: int, end: int) -> str:
        return str(encoder.tokenizer.decode(list(ids[max(start, 0) : end])))

    after = position + NUM_TOKENS_AFTER
    before = decoded(theirs, position - NUM_TOKENS_BEFORE, position)
    return Difference(number, position, before, decoded(ours, position, after), decoded(theirs, position, after))


def _cause(encoding: Encoding, server: ModelChatTemplate, dialogue: Dialogue) -> str:
    """A reason, if only the default system text differs."""
    if dialogue.system or encoding.model_template is not None:
        return ""
    given = replace(dialogue, system="Be brief.")
    try:
        rows, asked = _rows(encoding, given), server.asked(given)
    except RowError:
        return ""
    for answer, row in zip(asked, rows, strict=True):
        sent = server.encoder.text(answer.prompt)
        if row.input_ids[: len(sent)] != sent:
            return ""
    ours, theirs = default_systems(encoding, server)
    return ONLY_DEFAULT_SYSTEM if ours != theirs else ""
