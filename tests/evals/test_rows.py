"""Which rows of a run are evaluated."""

import pytest

from luthier.config.load import load_eval
from luthier.core.errors import DataError
from luthier.data.rows.arrow import TableWriter, table_at
from luthier.data.rows.columns import SEQUENCE, with_media
from luthier.evals.rows import evaluated_rows, refuse_media
from luthier.workflow.text import load_text_side
from tests.small_world import small_world


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    world = small_world(tmp_path_factory.mktemp("world"))
    names = ("model_name_or_path", "dataset_dir", "dataset", "template")
    return {**{name: world[name] for name in names}, "task": "perplexity"}


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, {"numbers": 24}),
        ({"dataset": "numbers,tools"}, {"numbers": 24, "tools": 24}),
        ({"max_samples": 5}, {"numbers": 5}),
        ({"streaming": True, "max_samples": 5, "max_steps": 3}, {"numbers": 5}),
        ({"eval_dataset": "tools"}, {"": 24}),
        ({"eval_dataset": "numbers,tools", "eval_on_each_dataset": True}, {"numbers": 24, "tools": 24}),
        ({"val_size": 6}, {"": 6}),
        ({"stage": "pt", "dataset": "plain", "cutoff_len": 100}, {"plain": 19}),
    ],
    ids=str,
)
def test_the_rows(keys, changes, sizes):
    run = load_eval({**keys, **changes})
    found = evaluated_rows(run, load_text_side(run).encoding)
    assert {name: len(rows) for name, rows in found.eval.items()} == sizes
    assert not found.prompts


def test_with_prompts_for_answers(keys):
    run = load_eval({**keys, "max_samples": 3})
    found = evaluated_rows(run, load_text_side(run).encoding, with_prompts=True)
    assert len(found.prompts["numbers"]) == 3


def test_rows_with_media_are_refused(tmp_path):
    """They would be asked without what they are about."""
    for paths in ([], ["cat.png"]):
        path = tmp_path / f"{len(paths)}.arrow"
        with TableWriter(path, with_media(SEQUENCE)) as writer:
            writer.add(([1, 2], [3], (), paths))
        if not paths:
            refuse_media({"numbers": table_at(path)})
            continue
        with pytest.raises(DataError, match="dataset numbers: has rows with images, videos or audio"):
            refuse_media({"numbers": table_at(path)})
