"""The media that a dataset names, found without making examples of its rows where their columns name them all."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from luthier.core.errors import RowError
from luthier.data.formats._columns import looks_like_json, media
from luthier.data.media.items import column_of, declared_kinds
from luthier.data.rows.maker import read_example

if TYPE_CHECKING:
    from luthier.data.sources.dataset_info import DatasetSpec
    from luthier.data.sources.readers import Row

_PLAIN = (str, int, float, bool, type(None))


def media_items(source: "Iterable[Row]", spec: "DatasetSpec") -> Iterator[str]:
    """The items of all rows that can be read, each once. There may be some of rows that turn out to be unusable."""
    known = set()
    columns = {column_of(spec, kind) for kind in declared_kinds(spec)}
    for row in source:
        try:
            data = row.usable()
            items = (media(data, spec) if _is_flat(data, columns) else read_example(row, spec).media).items
        except RowError:
            continue
        for item in items:
            if item not in known:
                known.add(item)
                yield item


def _is_flat(data: Mapping[str, Any], columns: Collection[str | None]) -> bool:
    """Whether no message of a row can have parts, which may bring media of their own. `columns`: those of media."""
    return all(name in columns or _has_no_parts(value) for name, value in data.items())


def _has_no_parts(value: Any) -> bool:
    """Whether a value is plain, or a list of objects with plain values: messages whose contents are texts."""
    if type(value) in _PLAIN:
        return not looks_like_json(value)
    return type(value) is list and all(
        type(one) is dict and all(type(inner) in _PLAIN for inner in one.values()) for one in value
    )
