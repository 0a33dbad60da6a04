"""Tokenized rows for the terminal, colored by targets, weights and marks of the chat format."""

import os
import re
from collections.abc import Mapping
from itertools import accumulate, groupby, pairwise
from typing import IO, TYPE_CHECKING, Any

from luthier.data.media.kinds import by_column
from luthier.data.rows.columns import BLOCKS, IDS, IMAGES, LENGTHS, WEIGHTS, kind_of, numbers_of, part_of, parts_of
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.inspection.images import between, shown_images
from luthier.inspection.segments import RoleMarks, Shown, prompt_and_answer, shown_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEARNED, PARTLY, SEEN, MARK, RESET = "\x1b[32m", "\x1b[33m", "", "\x1b[2m", "\x1b[0m"
"""Green: targets. Yellow: targets with a weight below 1. Plain: input only. Dim: chat format marks, input only."""
LEGEND = (
    f"{LEARNED}learned{RESET}, {PARTLY}learned with a weight below 1{RESET}, only seen,"
    f" {MARK}marks of the chat format, only seen{RESET}"
)
PLAIN_LEGEND = "learned between ⟦ and ⟧, with a weight below 1 between ⟦ and ⟧×weight"

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def shows_colors(stream: IO[str]) -> bool:
    """Whether the stream is a terminal and NO_COLOR is not set (https://no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR")


def without_colors(row: Mapping[str, Any], tokenizer: "PreTrainedTokenizerBase", *, is_prompt: bool = False) -> str:
    """The text of a row with targets between ⟦ and ⟧, followed by their weight if it is below 1.

    `is_prompt`: a row for generation, whose labels are the answer after its ids.
    """
    ids, labels = prompt_and_answer(row) if is_prompt else (row["input_ids"], row["labels"])
    weights = row.get(WEIGHTS.name) or [1.0] * len(ids)
    counts = [0.0 if label == IGNORE_INDEX else weight for label, weight in zip(labels, weights, strict=True)]
    text = []
    for start, stop, name in between(0, len(ids), shown_images(row)):
        if name:
            text.append(name)
            continue
        for weight, run in groupby(zip(ids[start:stop], counts[start:stop], strict=True), key=lambda pair: pair[1]):
            piece = str(tokenizer.decode([token for token, _ in run], skip_special_tokens=False))
            text.append(f"⟦{piece}⟧{f'×{weight:g}' * (weight != 1)}" if weight else piece)
    return "".join(text)


def colored(
    row: Mapping[str, Any],
    tokenizer: "PreTrainedTokenizerBase",
    marks: RoleMarks,
    *,
    is_prompt: bool = False,
) -> str:
    """The text of a row in the colors of `LEGEND`. Control characters of the data are escaped."""
    ids, labels = prompt_and_answer(row) if is_prompt else (row["input_ids"], row["labels"])
    text = []
    shown = shown_tokens(ids, labels, tokenizer, marks, row.get(WEIGHTS.name) or (), shown_images(row))
    for color, tokens in groupby(shown, key=_color):
        piece = _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", "".join(token.text for token in tokens))
        text.append(f"{color}{piece}{RESET}" if color else piece)
    return "".join(text)


def as_json(row: Mapping[str, Any]) -> dict[str, Any]:
    """The columns of the stage, with an attention mask as in LLaMA-Factory."""
    shown: dict[str, Any] = {}
    for part in parts_of(row):
        for name, values in part_of(row, part).items():
            if values or not kind_of(name).is_optional:
                shown[f"{part}{name}"] = values
            if kind_of(name) is IDS:
                shown[f"{part}attention_mask"] = [1] * len(values)
    return shown | by_column(row.get(IMAGES.name) or ()) | {name: bool(row[name][0]) for name in numbers_of(row)}


def sequences_of(row: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(name, columns) of each sequence of a row: the samples of a packed row, or the parts of any other."""
    images = {IMAGES.name: row[IMAGES.name]} if IMAGES.name in row else {}
    if LENGTHS.name not in row:
        parts = parts_of(row)
        return [(part.rstrip("_") if len(parts) > 1 else "", part_of(row, part) | images) for part in parts]
    ends = list(accumulate(row[LENGTHS.name]))
    return [
        (
            f"sample {number} of {len(ends)}" if len(ends) > 1 else "",
            {name: values[start:end] for name, values in part_of(row, "").items() if kind_of(name).per == "token"}
            | (_images_between(row, start, end) if images else {}),
        )
        for number, (start, end) in enumerate(pairwise([0, *ends]), start=1)
    ]


def _images_between(row: Mapping[str, Any], start: int, end: int) -> dict[str, Any]:
    """The images of one sample of a packed row, with their blocks at the places in that sample."""
    blocks = row[BLOCKS.name]
    own = [number for number, first in enumerate(blocks[::2]) if start <= first < end]
    return {
        BLOCKS.name: [place - start for number in own for place in blocks[2 * number : 2 * number + 2]],
        IMAGES.name: [row[IMAGES.name][number] for number in own],
    }


def _color(token: Shown) -> str:
    if token.is_learned:
        return LEARNED if token.weight == 1 else PARTLY
    return MARK if token.is_mark or token.is_special else SEEN
