"""The rows of a run's datasets that an evaluation reads, made by the code that makes them for training."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

from luthier.config.keys.data import holds_tokenized_rows
from luthier.config.keys.training import TrainingKeys
from luthier.core.errors import DataError
from luthier.core.kinds import STAGES
from luthier.data.rows.columns import IMAGES

if TYPE_CHECKING:
    from luthier.config.keys.data import DataConfig
    from luthier.config.runs import EvalRun
    from luthier.data.prepare import PreparedData
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.table import Table


def evaluated_rows(run: "EvalRun", encoding: "Encoding", *, with_prompts: bool = False) -> "PreparedData":
    """`eval` holds the rows by dataset. `with_prompts`: `prompts` holds the prompts and answers of the same examples.

    They are those of eval_dataset, else the ones that val_size sets aside, else all rows of dataset.
    Raises `DataError` for datasets that cannot be read.
    """
    from luthier.data.prepare import prepare

    keys = MappingProxyType({**run.training.given, "predict_with_generate": with_prompts})
    run = replace(run, data=evaluated_data(run.data), training=TrainingKeys(keys))
    data = prepare(run, STAGES.get(run.stage).rows, encoding)
    refuse_media({**data.eval, **data.prompts})
    if data.eval:
        return data
    if data.table is None or with_prompts:
        raise DataError(f"tokenized_path: {run.data.tokenized_path} holds no evaluation rows -> name a dataset")
    return replace(data, eval={"": data.table})


def refuse_media(tables: "Mapping[str, Table]") -> None:
    """Raises `DataError` for rows with media: a task shows its model token ids alone."""
    for name, rows in tables.items():
        if IMAGES.name in rows.column_names and any(rows[IMAGES.name]):
            raise DataError(
                f"dataset {name}: has rows with images, videos or audio, which `luthier eval` does not show to the"
                " model -> name a dataset without them in eval_dataset"
            )


def evaluated_data(data: "DataConfig") -> "DataConfig":
    """The data keys under which only the rows to evaluate are made."""
    if holds_tokenized_rows(data) or data.val_size:
        return data
    if data.eval_dataset:
        return replace(data, dataset=(), interleave_probs=(), tokenized_path=None)
    return replace(
        data,
        dataset=(),
        eval_dataset=data.dataset,
        interleave_probs=(),
        eval_on_each_dataset=True,
        streaming=False,
        tokenized_path=None,
    )
