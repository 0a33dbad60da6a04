"""Tokenised rows as a person can read them: text in the terminal coloured by what is learned."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from luthier.data.labels import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEARNED, SEEN, RESET = "\x1b[32m", "\x1b[2m", "\x1b[0m"
"""Green for what is learned, dim for what is only seen."""


def spans(input_ids: Sequence[int], labels: Sequence[int]) -> Iterator[tuple[bool, list[int]]]:
    """(is learned, ids) for each run of neighbouring tokens of one kind."""
    pairs = zip(input_ids, labels, strict=True)
    for is_learned, run in groupby(pairs, key=lambda pair: pair[1] != IGNORE_INDEX):
        yield is_learned, [token for token, _ in run]


def coloured(
    row: Mapping[str, Sequence[int]], tokenizer: "PreTrainedTokenizerBase", *, colours: bool, is_prompt: bool = False
) -> str:
    """The text of a row; without colours what is learned stands between ⟦ and ⟧.

    `is_prompt`: a row for generation, whose labels are the answer that follows its ids.
    """
    if is_prompt:
        parts = [(False, list(row["input_ids"])), (True, list(row["labels"]))]
    else:
        parts = list(spans(row["input_ids"], row["labels"]))
    text = []
    for is_learned, ids in parts:
        piece = str(tokenizer.decode(ids, skip_special_tokens=False))
        if colours:
            text.append(f"{LEARNED if is_learned else SEEN}{piece}{RESET}")
        else:
            text.append(f"⟦{piece}⟧" if is_learned else piece)
    return "".join(text)


def as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the stage, with the attention mask that every column set of the reference has."""
    return {"input_ids": row["input_ids"], "attention_mask": [1] * len(row["input_ids"]), "labels": row["labels"]}
