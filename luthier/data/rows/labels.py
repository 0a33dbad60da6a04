"""Token ids with their labels, truncated to a length.

The prompt and the answer of a turn share one budget; both are truncated at their ends. Turns are added in order (from
the last one backwards with `mask_history`) until the budget is used up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, islice

IGNORE_INDEX = -100
"""The label of a token that is not a target."""


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
    weights: list[float] = field(default_factory=list)
    """The weight of each token in the loss; empty if the weight of every target is 1."""

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


def label_turns(
    turns: Sequence[tuple[list[int], list[int]]],
    *,
    cutoff_len: int | None,
    train_on_prompt: bool = False,
    mask_history: bool = False,
    eos_token_id: int | None = None,
) -> Encoded:
    """One row from the (prompt ids, answer ids) of a conversation.

    `train_on_prompt`: prompts are targets too; `mask_history`: only the last answer is. `eos_token_id` is given for
    formats without an eos in their slots: it ends the row, and it is the target at the first prompt token after each
    answer, which teaches to stop there. `cutoff_len` None is no limit.
    """
    closing = [] if eos_token_id is None else [eos_token_id]
    total = sum(len(source) + len(target) for source, target in turns)
    budget = total if cutoff_len is None else cutoff_len - len(closing)
    kept: list[tuple[list[int], list[int]]] = []
    num_kept, num_learned, num_wanted, cut = 0, 0, 0, False
    for order, (source, target) in enumerate(reversed(turns) if mask_history else turns):
        learned = not mask_history or order == 0
        num_wanted += len(target) * learned + len(source) * train_on_prompt
        if budget - num_kept <= 0:
            continue
        source_kept, target_kept = split_budget(len(source), len(target), budget - num_kept)
        num_kept += source_kept + target_kept
        num_learned += target_kept * learned + source_kept * train_on_prompt
        cut = cut or (learned and target_kept < len(target))
        ids, labels = source[:source_kept], [IGNORE_INDEX] * source_kept
        if train_on_prompt:
            labels = list(ids)
        elif closing and order and not mask_history and labels:
            labels[0] = closing[0]
        ids = ids + target[:target_kept]
        kept.append((ids, labels + (target[:target_kept] if learned else [IGNORE_INDEX] * target_kept)))
    if mask_history:
        kept.reverse()
    return Encoded(
        input_ids=_joined([ids for ids, _ in kept]) + closing,
        labels=_joined([labels for _, labels in kept]) + closing,
        lost_tokens=total - num_kept,
        lost_labels=num_wanted - num_learned,
        lost_terminator=cut,
    )


def label_answers(
    answers: Sequence[tuple[list[int], list[int]]], *, cutoff_len: int | None, eos_token_id: int | None = None
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
    return tuple(_cut_answer(prompt, answer, prompt_budget, answer_budget) for prompt, answer in closed)


def _cut_answer(prompt: list[int], answer: list[int], prompt_budget: int, answer_budget: int) -> Encoded:
    kept_prompt, kept_answer = prompt[:prompt_budget], answer[:answer_budget]
    lost_labels = len(answer) - len(kept_answer)
    return Encoded(
        kept_prompt + kept_answer,
        [IGNORE_INDEX] * len(kept_prompt) + kept_answer,
        lost_tokens=len(prompt) - len(kept_prompt) + lost_labels,
        lost_labels=lost_labels,
        lost_terminator=lost_labels > 0,
    )


def _joined(parts: Sequence[list[int]]) -> list[int]:
    return parts[0] if len(parts) == 1 else list(chain.from_iterable(parts))
