"""What the two libraries share that train with Megatron-core, mcore_adapter and Megatron-Bridge: the model as a local
folder, groups of processes, padded rows, and the files beside the weights."""

from collections.abc import Mapping, Sequence
from math import lcm
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.keys.mcore import SIZES
from luthier.core.errors import InvalidInput, ModelError
from luthier.core.files import require_apart, require_writable
from luthier.core.kinds import STAGES
from luthier.core.log import info
from luthier.data.rows.labels import IGNORE_INDEX
from luthier.model.files.readable import readable
from luthier.workflow.text import load_text_side

if TYPE_CHECKING:
    from luthier.config.keys.mcore import MegatronConfig
    from luthier.config.runs import TrainRun
    from luthier.data.prepare import PreparedData
    from luthier.model.files.sources import ModelSource
    from luthier.workflow.text import TextSide

BLOCK = 64
"""Padded lengths are multiples of this, and of what context and tensor parallelism cut a row into."""


def model_folder(source: "ModelSource", variable: str, library: str) -> str:
    """The folder of the model, which is fetched if it is on a hub. Raises `ModelError` for a GGUF file."""
    from huggingface_hub import snapshot_download

    files = source.files
    if files.gguf_file:
        raise ModelError(
            f"{variable}: {files}: {library} does not read GGUF files"
            " -> write the model with `luthier export` first, and give its folder as model_name_or_path"
        )
    if files.is_local:
        return files.name
    with readable(files, "weights"):
        return str(snapshot_download(files.name, **source.access.options))


def named_checkpoint(run: "TrainRun") -> str | None:
    """The checkpoint that the run file names. Makes `output_dir`, and raises `OutputError` if it cannot be written."""
    asked, output_dir = run.training["resume_from_checkpoint"], Path(run.training["output_dir"])
    require_apart("output_dir", output_dir, [run.model.model_name_or_path])
    require_writable("output_dir", output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    return asked if isinstance(asked, str) and asked not in ("true", "false") else None


def prepared_text(run: "TrainRun", variable: str) -> "tuple[TextSide, PreparedData]":
    """The rows of the run, which must be text alone: else raises `InvalidInput`."""
    from luthier.data.prepare import prepare

    rows = STAGES.get(run.stage).rows
    text = load_text_side(run, reads_chat=rows.reads_chat)
    if text.media is not None:
        raise InvalidInput(f"{variable}: rows of text alone can be trained on -> unset {variable}")
    data = prepare(run, rows, text.encoding)
    for line in data.ledger.summary():
        info(line)
    return text, data


def require_whole_groups(keys: "MegatronConfig", num_processes: int) -> None:
    """Raises `InvalidInput` if the processes cannot form groups that hold one copy of the model each."""
    sizes = {name: getattr(keys, name) for name in SIZES}
    size = 1
    for count in sizes.values():
        size *= count
    if num_processes % size:
        product = " x ".join(f"{name} {count}" for name, count in sizes.items() if count > 1)
        there = "is one process" if num_processes == 1 else f"are {num_processes} processes"
        raise InvalidInput(
            f"{product}: {size} processes hold one copy of the model, and there {there} -> start a multiple of {size},"
            f" for example with NPROC_PER_NODE={size}"
        )


def block_of(keys: "MegatronConfig", cutoff_len: int, *, one_length: bool) -> int:
    """Padded lengths are multiples of this number of tokens; with `one_length` it is the length of all rows.

    A row is cut into 2 parts per process of context parallelism and one per process of tensor parallelism.
    """
    block = lcm(BLOCK, 2 * keys.context_parallel_size, keys.tensor_model_parallel_size)
    return -(-cutoff_len // block) * block if one_length else block


def shifted_batch(rows: Sequence[Mapping[str, Any]], pad_token_id: int, block: int) -> dict[str, Any]:
    """input_ids, labels, attention_mask (B, T): rows padded on the right to a multiple of `block` tokens.

    The label of a position is the token that follows it: Megatron does not shift labels.
    """
    import torch

    length = -(-max(len(row["input_ids"]) - 1 for row in rows) // block) * block
    batch = {
        "input_ids": torch.full((len(rows), length), pad_token_id),
        "labels": torch.full((len(rows), length), IGNORE_INDEX),
        "attention_mask": torch.zeros((len(rows), length), dtype=torch.long),
    }
    for number, row in enumerate(rows):
        ids, labels = torch.as_tensor(row["input_ids"]), torch.as_tensor(row["labels"])
        batch["input_ids"][number, : len(ids) - 1] = ids[:-1]
        batch["labels"][number, : len(ids) - 1] = labels[1:]
        batch["attention_mask"][number, : len(ids) - 1] = 1
    return batch


def describe(run: "TrainRun", trainer: Any, data: "PreparedData", metrics: Mapping[str, Mapping[str, float]]) -> None:
    """Write the metrics, the ledger, and all that describes the weights.

    `trainer` has the `state` of a trainer of transformers, and `save_state`.
    """
    from luthier.data.ledger import LEDGER_FILE
    from luthier.training.report import describing, finish_training, save_metrics, write_json

    output_dir = Path(run.training["output_dir"])
    with describing(output_dir):
        write_json(output_dir / LEDGER_FILE, data.ledger.to_json())
        for split, values in metrics.items():
            save_metrics(output_dir, split, values)
        if run.trains:
            facts = {"seed": run.training["seed"], "data": data.fingerprint, "model": run.model.model_name_or_path}
            finish_training(run, trainer, metrics, run.model.model_name_or_path, facts)
