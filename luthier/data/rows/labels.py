"""Token ids with their labels, truncated to a length.

The prompt and the answer of a turn share one budget. An answer is truncated at its end; a prompt loses text, but keeps
its closing marks, which end the turn of the user and open the answer. Turns are added in order (from the last one
backwards with `mask_history`) until the budget is used up.

The block of an image is whole or absent: text around it goes first. A turn with images that has no room for a token of
its answer is left out, with all that would follow.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice

from luthier.data.media.tokens import blocks_in, first_around, first_whole, num_block_tokens

IGNORE_INDEX = -100
"""The label of a token that is not a target."""

NumMarks = Callable[[Sequence[int]], int]
"""The number of tokens at the end of a prompt that are its closing marks."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row: `labels[i]` is `input_ids[i]` if that token is a target, else `IGNORE_INDEX`."""

    input_ids: list[int]
    labels: list[int]
    lost_tokens: int = 0
    """Tokens that truncation removed."""
    lost_labels: int = 0
    """Those among them that would have been targets."""
    lost_terminator: bool = False
    """Whether an answer lost its end, so that the row teaches not to stop there."""
    shortened_prompts: int = 0
    """Prompts that lost text before their closing marks."""
    weights: list[float] = field(default_factory=list)
    """The weight of each token in the loss; empty if the weight of every target is 1."""
    blocks: list[int] = field(default_factory=list)
    """Where the blocks of images lie: start, stop, start, stop, ..."""
    items: list[int] = field(default_factory=list)
    """The image of each block, counted from 0 in the example."""

    @property
    def num_tokens(self) -> int:
        """Before truncation."""
        return len(self.input_ids) + self.lost_tokens

    @property
    def num_labels(self) -> int:
        """The number of targets."""
        return len(self.labels) - self.labels.count(IGNORE_INDEX)

    @property
    def has_target(self) -> bool:
        """Whether any token is a target. The first token has no predecessor that could predict it."""
        return any(label != IGNORE_INDEX for label in islice(reversed(self.labels), max(len(self.labels) - 1, 0)))


def split_budget(source: int, target: int, cutoff: int) -> tuple[int, int]:
    """(prompt, answer) tokens to keep, `cutoff` in total.

    The shorter part is kept whole if it takes less than half; otherwise both are truncated in proportion.
    """
    if 2 * target < cutoff:
        most = target
    elif 2 * source < cutoff:
        most = cutoff - source
    else:
        most = cutoff * target // (source + target)
    kept_target = min(target, most)
    return min(source, max(cutoff - kept_target, 0)), kept_target


def no_marks(prompt: Sequence[int]) -> int:
    """For prompts without closing marks."""
    return 0


def with_blocks_apart(row: Encoded) -> Encoded:
    """The row with the places of its blocks, and without a label in any of them."""
    ids, labels, weights = list(map(int, row.input_ids)), list(row.labels), list(row.weights)
    found = list(blocks_in(row.input_ids))
    for _, start, stop in found:
        labels[start:stop] = [IGNORE_INDEX] * (stop - start)
        if weights:
            weights[start:stop] = [0.0] * (stop - start)
    places = [border for _, *block in found for border in block]
    return replace(
        row, input_ids=ids, labels=labels, weights=weights, blocks=places, items=[item for item, _, _ in found]
    )


def cut_prompt(prompt: list[int], budget: int, num_marks: int) -> list[int]:
    """The first `budget` tokens of a prompt, the last `num_marks` of which are its closing marks if they fit.

    It keeps all blocks of images; without room for them and the marks, nothing is kept.
    """
    if len(prompt) <= budget:
        return prompt
    if num_blocks := num_block_tokens(prompt):
        room, end = budget - num_marks - num_blocks, len(prompt) - num_marks
        return first_around(prompt[:end], room) + prompt[end:] if room >= 0 else []
    if num_marks > budget:
        return prompt[:budget]
    return prompt[: budget - num_marks] + prompt[len(prompt) - num_marks :]


def cut_turn(
    source: list[int], target: list[int], budget: int, num_marks: NumMarks = no_marks
) -> tuple[list[int], list[int]]:
    """(prompt, answer) of a turn within `budget` tokens.

    Without room for the closing marks of the prompt and its blocks of images, nothing is kept of the answer: it would
    follow no marks.
    """
    num_source, num_target = split_budget(len(source), len(target), budget)
    if num_source == len(source):
        return source, first_whole(target, num_target)
    marks = num_marks(source)
    fixed = marks + num_block_tokens(source)
    if fixed > num_source:
        num_source, num_target = min(fixed, budget), min(len(target), max(budget - fixed, 0))
    return cut_prompt(source, num_source, marks), first_whole(target, num_target)


def _is_left_out(turn: tuple[list[int], list[int]], prompt: list[int], answer: list[int]) -> bool:
    """Whether nothing of a turn with images is kept: its answer has no room, or its prompt none for its blocks."""
    source, target = turn
    if (answer or not target) and (prompt or not source):
        return False
    return num_block_tokens(source) + num_block_tokens(target) > 0


def label_turns(
    turns: Sequence[tuple[list[int], list[int]]],
    *,
    cutoff_len: int | None,
    train_on_prompt: bool = False,
    mask_history: bool = False,
    eos_token_id: int | None = None,
    num_marks: NumMarks = no_marks,
) -> Encoded:
    """One row from the (prompt ids, answer ids) of a conversation.

    `train_on_prompt`: prompts are targets too; `mask_history`: only the last answer is. `eos_token_id` is given for
    formats without an eos in their slots: it ends the row, and it is the target at the first prompt token after each
    answer, which teaches to stop there; after an answer that is cut it is no target. `cutoff_len` None is no limit.
    `num_marks`: of the prompts.
    """
    closing = [] if eos_token_id is None else [eos_token_id]
    total = sum(len(source) + len(target) for source, target in turns)
    budget = total if cutoff_len is None else cutoff_len - len(closing)
    kept: list[tuple[list[int], list[int]]] = []
    num_kept, num_learned, num_wanted, num_shortened, cut = 0, 0, 0, 0, False
    ends_in_answer = True
    for order, (source, target) in enumerate(reversed(turns) if mask_history else turns):
        learned = not mask_history or order == 0
        num_wanted += len(target) * learned + len(source) * train_on_prompt
        if budget - num_kept <= 0:
            continue
        prompt, answer = cut_turn(source, target, budget - num_kept, num_marks)
        if _is_left_out((source, target), prompt, answer):
            budget = num_kept
            continue
        num_kept += len(prompt) + len(answer)
        num_learned += len(answer) * learned + len(prompt) * train_on_prompt
        num_shortened += len(prompt) < len(source) and bool(answer)
        cut = cut or (learned and len(answer) < len(target))
        if learned:
            ends_in_answer = len(answer) == len(target) and (bool(answer) or len(prompt) >= num_marks(source))
        labels = list(prompt) if train_on_prompt else [IGNORE_INDEX] * len(prompt)
        if closing and order and not mask_history and not train_on_prompt and labels:
            labels[0] = closing[0]
        kept.append((prompt + answer, labels + (answer if learned else [IGNORE_INDEX] * len(answer))))
        if len(prompt) + len(answer) < len(source) + len(target):
            budget = num_kept  # a block that had no room may leave some, but what follows must not join half a turn
    if mask_history:
        kept.reverse()
    return Encoded(
        input_ids=_joined([ids for ids, _ in kept]) + closing,
        labels=_joined([labels for _, labels in kept]) + (closing if ends_in_answer else [IGNORE_INDEX] * len(closing)),
        lost_tokens=total - num_kept,
        lost_labels=num_wanted - num_learned,
        lost_terminator=cut,
        shortened_prompts=num_shortened,
    )


def label_answers(
    answers: Sequence[tuple[list[int], list[int]]],
    *,
    cutoff_len: int | None,
    eos_token_id: int | None = None,
    num_marks: NumMarks = no_marks,
) -> tuple[Encoded, ...]:
    """Rows that are compared with each other: one (prompt ids, answer ids) for each. The answers are the targets.

    They share one budget, that of the longest prompt and the longest answer, so that the prompt is truncated in the
    same way before every answer. `eos_token_id` is given for formats without an eos in their slots: it ends each
    answer.
    """
    closing = [] if eos_token_id is None else [eos_token_id]
    closed = [(prompt, answer + closing) for prompt, answer in answers]
    longest = (max(len(prompt) for prompt, _ in closed), max(len(answer) for _, answer in closed))
    prompt_budget, answer_budget = longest if cutoff_len is None else split_budget(*longest, cutoff_len)
    marks = [num_marks(prompt) if len(prompt) > prompt_budget else 0 for prompt, _ in closed]
    fixed = max(n + num_block_tokens(p) * (len(p) > prompt_budget) for n, (p, _) in zip(marks, closed, strict=True))
    if cutoff_len is not None and fixed > prompt_budget:
        prompt_budget = min(fixed, cutoff_len)
        answer_budget = cutoff_len - prompt_budget
    return tuple(
        _cut_answer(cut_prompt(prompt, prompt_budget, number), len(prompt), answer, answer_budget)
        for (prompt, answer), number in zip(closed, marks, strict=True)
    )


def _cut_answer(kept_prompt: list[int], num_prompt: int, answer: list[int], answer_budget: int) -> Encoded:
    """`num_prompt`: tokens of the prompt before it was cut."""
    kept_answer = first_whole(answer, answer_budget)
    lost_labels = len(answer) - len(kept_answer)
    return Encoded(
        kept_prompt + kept_answer,
        [IGNORE_INDEX] * len(kept_prompt) + kept_answer,
        lost_tokens=num_prompt - len(kept_prompt) + lost_labels,
        lost_labels=lost_labels,
        lost_terminator=lost_labels > 0,
        shortened_prompts=int(len(kept_prompt) < num_prompt),
    )


def _joined(parts: Sequence[list[int]]) -> list[int]:
    return parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))
