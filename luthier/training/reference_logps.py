"""How likely a reference model finds the answers, computed once before training and kept by content.

The reference is `ref_model`, or else the model as training begins: the sft model where its adapter is trained on, the
base where a fresh one is. So no second model lies in memory while training. What is kept belongs to exactly these rows
and these weights.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel

from luthier.core.log import info
from luthier.data.cache.fingerprint import joint_key
from luthier.data.prepare import rows_digest
from luthier.data.rows.row_plan import parts_of
from luthier.model.adapters._merge import unwrap
from luthier.model.heads.output_head import inspect_head
from luthier.model.types import Models
from luthier.stages._logps import sequence_logps

if TYPE_CHECKING:
    import datasets
    from torch import nn

    from luthier.data.cache.store import Cache
    from luthier.training.trainer import StageTrainer

REFERENCE_COLUMN = "reference_logps"
"""The summed log-probability of the answer of each part of a row."""
LOGPS_FILE = "reference_logps.npy"
_SCALING = ("lora_alpha", "r", "use_rslora", "rank_pattern", "alpha_pattern")
"""Fields of an adapter's config that change what its weights do."""


@dataclass(frozen=True, slots=True)
class JudgedRows(torch.utils.data.Dataset):
    """Rows with what the reference says of them."""

    rows: "datasets.Dataset"
    logps: np.ndarray
    """(rows, parts), float32."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], REFERENCE_COLUMN: self.logps[index].tolist()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


@dataclass(frozen=True, slots=True)
class Judge:
    """A reference model, and how its batches are made."""

    model: "nn.Module"
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]


def add_reference(trainer: "StageTrainer", judge: Judge, cache: "Cache") -> None:
    """Gives the rows of `trainer` the column `REFERENCE_COLUMN`."""
    digest = weights_digest(judge.model)
    if trainer.train_dataset is not None:
        trainer.train_dataset = _judged(trainer, judge, trainer.train_dataset, digest, cache)
    sets: Any = trainer.eval_dataset
    if isinstance(sets, Mapping):
        trainer.eval_dataset = {name: _judged(trainer, judge, rows, digest, cache) for name, rows in sets.items()}
    elif sets is not None:
        trainer.eval_dataset = _judged(trainer, judge, sets, digest, cache)


def _judged(trainer: "StageTrainer", judge: Judge, rows: Any, digest: str, cache: "Cache") -> JudgedRows:
    precision = (trainer.args.bf16, trainer.args.fp16)
    key = joint_key("reference", digest, rows_digest(rows), precision)
    assert key is not None, "all parts of the key are known"
    values = None
    if not all(gather_object([cache.holds(key)])):
        info(f"reference: computing the log-probabilities of {len(rows)} rows once")
        values = _computed(trainer, judge, rows)

    def write(folder: Path) -> None:
        assert values is not None, "an entry that every process has found is not written"
        np.save(folder / LOGPS_FILE, values)

    entry = cache.entry(key, write)
    return JudgedRows(rows, np.load(entry / LOGPS_FILE))


def _computed(trainer: "StageTrainer", judge: Judge, rows: "datasets.Dataset") -> np.ndarray:
    """(rows, parts), each process its share of the rows."""
    accelerator, size = trainer.accelerator, trainer.args.eval_batch_size
    model = judge.model.to(trainer.args.device)
    was_training = model.training
    models = Models(model.eval(), inspect_head(model))
    mine = range(accelerator.process_index, len(rows), accelerator.num_processes)
    pairs: list[tuple[int, list[float]]] = []
    for start in range(0, len(mine), size):
        indices = list(mine[start : start + size])
        batch = trainer._prepare_inputs(judge.collate([rows[index] for index in indices]))
        with torch.no_grad(), trainer.compute_loss_context_manager():
            sums = sequence_logps(models, batch).sums.float().cpu()
        pairs += zip(indices, sums.view(-1, len(indices)).T.tolist(), strict=True)
    model.train(was_training)
    values = np.empty((len(rows), len(parts_of(rows.column_names))), np.float32)
    for index, logps in gather_object(pairs):
        values[index] = logps
    return values


def weights_digest(model: "nn.Module") -> str:
    """Of every weight of a model and of what scales them (its config, those of its adapters), whatever its name is:

    two models with the same digest compute the same.
    """
    config = unwrap(model).config.to_dict() | {"_name_or_path": "", "transformers_version": ""}
    adapters = (
        {name: adapter.to_dict() for name, adapter in model.peft_config.items()} if isinstance(model, PeftModel) else {}
    )
    scaling = {name: {key: adapter.get(key) for key in _SCALING} for name, adapter in adapters.items()}
    digest = hashlib.sha256(json.dumps([config, scaling], sort_keys=True, default=repr).encode())
    for name, tensor in model.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()
