"""Log-probabilities of the answers under a reference model, computed once before training and cached by content.

The reference is `ref_model`, or the policy at the start of training: the sft model if its adapter is trained further,
the base model if the adapter is new. So no second model is in memory during training. A cache entry belongs to exactly
these rows and these weights.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate.utils import gather_object
from peft import PeftModel

from luthier.core.log import info
from luthier.core.machine import detect
from luthier.data.cache.fingerprint import code_digest, joint_key
from luthier.data.media.kinds import states_of
from luthier.data.prepare import rows_digest
from luthier.data.rows.columns import IMAGES, parts_of
from luthier.data.rows.table import Table
from luthier.model.heads.output_head import inspect_head
from luthier.model.modules import unwrap
from luthier.model.types import Models
from luthier.stages._logps import sequence_logps
from luthier.training.arguments import autocast_of
from luthier.training.distributed.sums import Collate, for_every_row

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import TrainingArguments

    from luthier.data.cache.store import Cache

REFERENCE_COLUMN = "reference_logps"
"""The log-probability of the answer in each part of a row, summed over its tokens."""
LOGPS_FILE = "reference_logps.npy"
LOGPS_CODE = (
    "stages/_logps.py",
    "stages/_segments.py",
    "model/attention.py",
    "model/heads",
    "model/kernels",
    "data/collate.py",
    "data/shared_prefixes.py",
    "data/pixels.py",
    "data/shared_media.py",
    "model/media/towers.py",
    "training/reference_logps.py",
)
"""The code that computes them, as a part of their cache key."""
MAX_DIGEST_THREADS = 8
"""More would wait for memory. Each holds a tensor on the host."""
_SCALING = ("lora_alpha", "r", "use_rslora", "rank_pattern", "alpha_pattern")
"""Fields of an adapter's config that scale its weights."""


@dataclass(frozen=True, slots=True)
class RowsWithReference(torch.utils.data.Dataset):
    """Rows with the reference's log-probabilities as a column."""

    rows: Table
    logps: np.ndarray
    """(rows, parts), float32."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], REFERENCE_COLUMN: self.logps[index].tolist()}

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        return [self[index] for index in indices]


@dataclass(frozen=True, slots=True)
class ReferenceScorer:
    """A reference model, and how to batch its rows."""

    model: "nn.Module"
    collate: Collate
    layout: tuple[bool, ...]
    """What `collate` does: whether it concatenates rows, whether these share tokens, share media, and read stored
    features. Part of the cache key."""
    args: "TrainingArguments"
    cache: "Cache"

    def add_to(self, row_sets: Mapping[str, Table]) -> dict[str, RowsWithReference]:
        """Each set of rows with the column `REFERENCE_COLUMN` added."""
        machine = detect()
        num_threads = machine.num_cpus // (machine.local_world_size or machine.world_size)
        digest = weights_digest(self.model, max(1, min(num_threads, MAX_DIGEST_THREADS)))
        return {name: self._with_reference(rows, digest) for name, rows in row_sets.items()}

    def _with_reference(self, rows: Table, digest: str) -> RowsWithReference:
        # How rows are batched and what computes them changes the rounding, and equal runs have equal bits, whatever the
        # cache holds.
        batches = (*self.layout, self.args.eval_batch_size, self.args.world_size)
        how = (self.args.bf16, self.args.fp16, *batches, *kernels_of(self.model, self.args.device))
        key = joint_key("reference", code_digest(LOGPS_CODE), digest, rows_digest(rows), how, files_state(rows))
        assert key is not None, "all parts of the key are known"
        values = None
        if not all(gather_object([self.cache.holds(key)])):
            info(f"reference: computing the log-probabilities of {len(rows)} rows once")
            values = self._logps(rows)

        def write(folder: Path) -> None:
            assert values is not None, "an entry that every process has found is not written"
            np.save(folder / LOGPS_FILE, values)

        entry = self.cache.entry(key, write)
        return RowsWithReference(rows, np.load(entry / LOGPS_FILE))

    def _logps(self, rows: Table) -> np.ndarray:
        """(rows, parts), float32."""
        model = self.model.to(self.args.device)
        was_training = model.training
        models = Models(model.eval(), inspect_head(model))

        num_parts = len(parts_of(rows.column_names))

        def compute(batch: dict[str, Any]) -> list[list[float]]:
            """A batch holds the parts one after the other: all chosen answers, then all rejected ones."""
            return sequence_logps(models, batch).sums.float().cpu().view(num_parts, -1).T.tolist()

        # That of the run: at the start of training, policy and reference differ in no bit.
        with autocast_of(self.args, unwrap(model)):
            values = for_every_row(rows, self.args, self.collate, compute)
        model.train(was_training)
        return np.array(values, np.float32)


def kernels_of(model: "nn.Module", device: torch.device) -> tuple[Any, ...]:
    """What computes this model: PyTorch, the kind of device, the attention, and how many modules have other code."""
    num_changed = sum("forward" in vars(module) for module in model.modules())
    return torch.__version__, device.type, unwrap(model).config._attn_implementation, num_changed


def files_state(rows: Table) -> str:
    """A hash of the size and the time of change of every image of these rows; empty for rows of text."""
    if IMAGES.name not in rows.column_names:
        return ""
    digest = hashlib.sha256()
    for item in dict.fromkeys(item for items in rows[IMAGES.name] for item in items):
        digest.update(f"{item} {states_of(item)}\n".encode())
    return digest.hexdigest()


def weights_digest(model: "nn.Module", num_threads: int = 1) -> str:
    """Digest of all weights of a model and of its config and adapter scaling, independent of the model's name.

    Two models with the same digest compute the same. SHA-256 reads about 1 GB/s, and a model of 8 billion weights in 16
    bits has 16 GB, so `num_threads` read tensors beside each other.
    """
    config = unwrap(model).config.to_dict() | {"_name_or_path": "", "transformers_version": ""}
    adapters = (
        {name: adapter.to_dict() for name, adapter in model.peft_config.items()} if isinstance(model, PeftModel) else {}
    )
    scaling = {name: {key: adapter.get(key) for key in _SCALING} for name, adapter in adapters.items()}
    digest = hashlib.sha256(json.dumps([config, scaling], sort_keys=True, default=repr).encode())
    weights = model.state_dict()
    with ThreadPoolExecutor(num_threads, "digest") as threads:
        for name, one in zip(weights, threads.map(_tensor_digest, weights.values()), strict=True):
            digest.update(name.encode() + one)
    return digest.hexdigest()


def _tensor_digest(tensor: "Tensor") -> bytes:
    """Other threads run meanwhile: both the copy to the host and the digest of bytes let them."""
    value = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode())
    digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.digest()
