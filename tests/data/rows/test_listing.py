"""The media of a dataset are those of its examples, wherever rows name them."""

import json
from itertools import chain

import pytest

from luthier.core.errors import RowError
from luthier.data.rows import listing
from luthier.data.rows.listing import media_items
from luthier.data.rows.maker import read_example
from luthier.data.sources.dataset_info import Columns, DatasetSpec, Source
from luthier.data.sources.readers import Row, row_of

ASKED = {"role": "user", "content": "<image>What is this?"}
ANSWER = {"role": "assistant", "content": "It."}
PART = {"role": "user", "content": [{"type": "image", "image": "part.png"}, {"type": "text", "text": "What?"}]}
FLAT = [
    {"messages": [ASKED, ANSWER], "images": ["a.png"]},
    {"messages": [ASKED, ANSWER], "images": "b.png"},
    {"messages": [ASKED, ANSWER], "images": [{"path": "c.png", "bytes": None}]},
    {"messages": [{"role": "user", "content": "No image."}, ANSWER], "images": None, "note": 3},
    {"messages": [{**ASKED, "loss": 0.5}, ANSWER], "images": ["a.png"]},
]
NESTED = [
    {"messages": [PART, ANSWER]},
    {"messages": json.dumps([PART, ANSWER])},
    {"messages": [PART, ANSWER, ASKED, ANSWER], "images": ["a.png"]},
    {"messages": [{**ASKED, "content": [{"type": "image"}]}, ANSWER], "images": ["d.png"]},
]


def spec(**more) -> DatasetSpec:
    columns = Columns(messages="messages", images="images", chosen="chosen", rejected="rejected")
    return DatasetSpec(
        name="see", source=Source("file", "see.json"), formatting="openai", columns=columns, columns_given=True,
        media_dir="/data", **more,
    )  # fmt: skip


def source(rows):
    return [Row("see.json", number, data) for number, data in enumerate(rows, start=1)]


def test_each_item_of_the_examples_once():
    rows = source([*FLAT, *NESTED])
    refused = row_of("see.json", 99, RowError("not JSON"))
    examples = [read_example(row, spec()) for row in rows]
    wanted = dict.fromkeys(chain.from_iterable(example.media.items for example in examples))
    assert list(media_items([*rows, refused], spec())) == list(wanted)
    assert set(wanted) == {f"/data/{name}.png" for name in ("a", "b", "c", "d", "part")}


@pytest.mark.parametrize("data", FLAT)
def test_a_row_without_parts_is_not_made_an_example(data, monkeypatch):
    monkeypatch.delattr(listing, "read_example")
    list(media_items(source([data]), spec()))


def test_pairs_of_answers():
    chosen = {"role": "assistant", "content": [{"type": "text", "text": "A."}]}
    data = {"messages": [PART], "chosen": chosen, "rejected": ANSWER}
    assert list(media_items(source([data]), spec(ranking=True))) == ["/data/part.png"]
