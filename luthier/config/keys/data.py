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
    """Names from `dataset_info.json` to learn from."""
    eval_dataset: tuple[str, ...] = ()
    """Names from `dataset_info.json` to evaluate on."""
    dataset_dir: dict[str, Any] | str = "data"
    """Folder with `dataset_info.json`; `ONLINE` or `REMOTE:<repository>` (hub); or the descriptions themselves."""
    media_dir: str | None = no_effect(None, "this version reads text only")
    """Folder that paths of pictures, films and sounds start from."""
    cutoff_len: int = 2048
    """Longest row, in tokens."""
    streaming: bool = False
    """Read rows while training instead of before."""
    buffer_size: int = 16384
    """With `streaming`: rows held ready to draw from at random, and packed together."""
    mix_strategy: Literal["concat", "interleave_under", "interleave_over", "interleave_once"] = "concat"
    """How several datasets become one: one after the other, or in turns until the first, or every one, is used up."""
    interleave_probs: tuple[float, ...] = ()
    """Share of each dataset when they are taken in turns, one number per dataset."""
    overwrite_cache: bool = False
    """Tokenize again even if the same rows have been tokenized before."""
    preprocessing_batch_size: int = 1000
    """Rows tokenized together; the rows do not depend on it."""
    preprocessing_num_workers: int | None = no_effect(None, "the tokenizer works in threads on all cores by itself")
    """Processes that tokenize."""
    max_samples: int | None = None
    """Use only this many rows of every dataset, counted from its start."""
    eval_num_beams: int | None = None
    """Beams for `predict_with_generate`; goes before `generation_num_beams`."""
    ignore_pad_token_for_loss: bool = no_effect(True, "padding is never learned")
    """Leave padding out of the loss."""
    val_size: float = 0.0
    """Part of the training rows set aside for evaluation: a share below 1, or a number of rows."""
    eval_on_each_dataset: bool = False
    """Report the evaluation of each dataset by itself."""
    packing: bool | None = None
    """Join rows into longer ones of `cutoff_len` tokens: texts into blocks (pt, where unset means yes), conversations
    into packs whose samples do not see each other (sft)."""
    neat_packing: bool = False
    """As `packing`, and refuse models whose attention cannot keep the samples of a pack apart."""
    tool_format: str | None = None
    """Syntax of tool calls; unset takes that of the template."""
    default_system: str | None = None
    """System text for rows that have none; unset takes that of the template."""
    enable_thinking: bool | None = True
    """For templates with a thinking part: on, off, or (null) as the row has it."""
    preserve_thinking: bool = False
    """Keep the thinking parts of earlier answers in the prompt."""
    tokenized_path: str | None = None
    """Folder with tokenized rows: read in the place of all datasets if it holds some, else written."""
    data_shared_file_system: bool = False
    """The cache of all machines is one folder, so only one of them tokenizes; otherwise one process of each does."""
    on_overlong: Literal["truncate", "drop", "split", "error"] = "truncate"
    """What becomes of a row longer than `cutoff_len`: cut, left out, cut into several rows, or an error."""


def holds_tokenized_rows(data: DataConfig) -> bool:
    """Whether rows come from `tokenized_path`, and so from no dataset."""
    path = data.tokenized_path
    return path is not None and os.path.isdir(path) and any(not name.startswith(".") for name in os.listdir(path))
