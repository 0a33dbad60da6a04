"""The columns of a row. Each has a kind: its type in storage, and what one of its values belongs to.

A row has one sequence of tokens (pt, sft), or two that belong together (a better and a worse answer). Each is a *part*;
the columns of a part carry its prefix, e.g. `chosen_input_ids` and `chosen_labels`.

A new kind of column goes into `KINDS`; `luthier.data.collate` turns it into tensors.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Kind:
    """What the values of a column are."""

    name: str
    """The name of the column, without the prefix of its part."""
    dtype: Literal["int32", "float32", "string"]
    """How values are stored."""
    per: Literal["token", "sample", "item", "row"]
    """What each value belongs to: a token of a part, a sample of a packed row, an image, or the whole row."""
    is_optional: bool = False
    """Whether the list of a row may be empty. Saved rows may lack such a column."""


IDS = Kind("input_ids", "int32", per="token")
LABELS = Kind("labels", "int32", per="token")
WEIGHTS = Kind("weights", "float32", per="token", is_optional=True)
"""The weight of each token in the loss; empty if the weight of every target of the row is 1."""
LENGTHS = Kind("sample_lengths", "int32", per="sample")
"""The number of tokens of each sample of a packed row."""
BLOCKS = Kind("blocks", "int32", per="item", is_optional=True)
"""Where the tokens of images lie: start, stop, start, stop, ...; `stop` is one past the last token.
Only runs with a dataset that declares images have this column and the next one."""
KINDS = (IDS, LABELS, WEIGHTS, LENGTHS, BLOCKS)
"""The kinds of columns that a part has."""
IMAGES = Kind("images", "string", per="row")
"""The paths of the images, in the order of the blocks of each part: the parts of a row have the same ones."""
NUMBER = Kind("", "int32", per="row")
"""One number of the whole row, under any other name, e.g. whether an answer was liked."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table of rows."""

    name: str
    kind: Kind


def columns_of_part(prefix: str, *kinds: Kind) -> tuple[Column, ...]:
    return tuple(Column(prefix + kind.name, kind) for kind in kinds)


SEQUENCE = columns_of_part("", IDS, LABELS)
"""The columns of a row that is one sequence."""


def kind_of(name: str) -> Kind:
    """The kind of the column with this name."""
    return next((kind for kind in (*KINDS, IMAGES) if name.endswith(kind.name)), NUMBER)


def with_media(columns: tuple[Column, ...]) -> tuple[Column, ...]:
    """The columns, and those of images: the blocks of each part, then the paths."""
    parts = parts_of(column.name for column in columns)
    return (*columns, *(Column(part + BLOCKS.name, BLOCKS) for part in parts), Column(IMAGES.name, IMAGES))


def parts_of(names: Iterable[str]) -> tuple[str, ...]:
    """The prefixes of the parts of a row with these columns."""
    return tuple(name.removesuffix(IDS.name) for name in names if kind_of(name) is IDS)


def part_of(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """One part of a row under the plain names of its columns."""
    return {kind.name: row[prefix + kind.name] for kind in KINDS if prefix + kind.name in row}


def numbers_of(names: Iterable[str]) -> tuple[str, ...]:
    """The columns with one number for the whole row."""
    return tuple(name for name in names if kind_of(name) is NUMBER)
