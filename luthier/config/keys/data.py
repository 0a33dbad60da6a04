"""The keys that say which rows are read and how they become tokens."""

import os
from dataclasses import dataclass
from typing import Any, Literal

from luthier.config.keys.fields import no_effect


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    template: str | None = None
    """Chat format (`luthier template list`); unset or `auto` takes the model's own."""
    dataset: tuple[str, ...] = ()
    """Datasets to train on, by their names in `dataset_info.json`."""
    eval_dataset: tuple[str, ...] = ()
    """Datasets to evaluate on, by their names in `dataset_info.json`."""
    dataset_dir: dict[str, Any] | str = "data"
    """Folder with `dataset_info.json`; `ONLINE` or `REMOTE:<repository>` (hub); or the descriptions themselves."""
    media_dir: str | None = None
    """Folder that paths of images are relative to; the folder of the datasets if not given."""
    cutoff_len: int = 2048
    """Longest row, in tokens."""
    streaming: bool = False
    """Read and tokenize rows during training instead of before it."""
    buffer_size: int = 16384
    """With `streaming`: rows held in memory, to be shuffled and packed together."""
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = "concat"
    """How several datasets are mixed: concatenated, or interleaved until the first, or every one, is used up."""
    interleave_probs: tuple[float, ...] = ()
    """Sampling share of each dataset when they are interleaved, one number per dataset."""
    overwrite_cache: bool = False
    """Tokenize again even if the same rows have been tokenized before."""
    preprocessing_batch_size: int = 1000
    """Rows tokenized together. Does not change the result."""
    preprocessing_num_workers: int | None = no_effect(None, "the tokenizer works in threads on all cores by itself")
    """Number of processes that tokenize."""
    max_samples: int | None = None
    """Use only this many rows of every dataset, counted from its start."""
    eval_num_beams: int | None = None
    """Beams for `predict_with_generate`; takes precedence over `generation_num_beams`."""
    ignore_pad_token_for_loss: bool = no_effect(True, "padding never counts in the loss")
    """Leave padding out of the loss."""
    val_size: float = 0.0
    """Training rows set aside for evaluation: a share below 1, or a number of rows."""
    eval_on_each_dataset: bool = False
    """Report the evaluation of each dataset separately."""
    packing: bool | None = None
    """Join rows into longer ones of `cutoff_len` tokens: texts into blocks (pt, where unset means yes), conversations
    into packs without attention across samples (sft)."""
    neat_packing: bool = False
    """As `packing`, and refuse models that would attend across the samples of a pack."""
    tool_format: str | None = None
    """Syntax of tool calls; unset takes the one of the template."""
    default_system: str | None = None
    """System prompt for rows that have none; unset takes the one of the template."""
    enable_thinking: bool | None = True
    """For templates with a thinking part: on, off, or (null) as the row has it."""
    preserve_thinking: bool = False
    """Keep the thinking of earlier answers in the prompt."""
    tokenized_path: str | None = None
    """Folder for tokenized rows: if it holds some they replace all datasets, otherwise they are written there."""
    data_shared_file_system: bool = False
    """All machines share one cache folder, so only one of them tokenizes; otherwise one process per machine does."""
    on_overlong: Literal["truncate", "drop", "split", "error"] = "truncate"
    """What to do with a row longer than `cutoff_len`: truncate, drop or split it, or stop with an error."""


def are_probabilities(shares: tuple[float, ...]) -> bool:
    return min(shares) >= 0 and abs(sum(shares) - 1) <= 1e-8


def holds_tokenized_rows(data: DataConfig) -> bool:
    """Whether rows are read from `tokenized_path` instead of datasets."""
    path = data.tokenized_path
    return path is not None and os.path.isdir(path) and any(not name.startswith(".") for name in os.listdir(path))
