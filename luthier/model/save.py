"""Models on disk, in the layout of transformers: sharded safetensors, config, generation config, tokenizer."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.keys.quantization import LOFTQ_FILE
from luthier.model.adapters._loftq import save_record
from luthier.model.adapters._pissa import is_pissa, save_as_lora
from luthier.model.adapters._series import save_series
from luthier.model.features.rope_scaling import BESIDE_ADAPTER
from luthier.model.heads.score_head import VALUE_HEAD_FILE
from luthier.model.loading.loaded import as_it_came
from luthier.model.processor import AS_IT_IS, FittedProcessor, copy_processor

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

VALUE_HEAD_FILES = (VALUE_HEAD_FILE, "value_head.bin")
"""What a reward model has beside a causal model: a layer from hidden states to one number."""
WEIGHT_FILES = (
    "model*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model*.bin*",
    "adapter_*",
    BESIDE_ADAPTER,
    LOFTQ_FILE,
    *VALUE_HEAD_FILES,
)
"""What an earlier model or adapter left in the folder and must not be taken for a part of this one."""


def num_bytes(model: "nn.Module") -> int:
    """What the weights take on disk."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def num_saved_bytes(model: "nn.Module") -> int:
    """Bytes that training will save: of a model with an adapter, only the trainable parameters."""
    from peft import PeftModel

    if not isinstance(model, PeftModel):
        return num_bytes(model)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters() if weight.requires_grad)
    return 2 * size if is_pissa(model) else size


def save_adapter(model: "PeftModel", folder: Path, state: "Mapping[str, Any] | None" = None) -> None:
    """The adapter as plain peft loads it. `state`: the weights, if gathered from several processes."""
    if is_pissa(model):
        save_as_lora(model, folder, state)
    else:
        model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    save_record(model, folder)
    save_series(model, folder)


def write_model(
    folder: Path,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    *,
    max_shard_size: str = "5GB",
    processor: FittedProcessor = AS_IT_IS,
) -> None:
    """Weights in files of at most `max_shard_size`, config, generation config, tokenizer and chat template.

    `processor`: see `copy_processor`.
    The tokenizer pads on the left, as generation wants it. Where the disk fails it raises what the
    libraries raise, which `luthier.core.files.DiskFaults` knows.
    """
    padding_side = tokenizer.padding_side
    tokenizer.padding_side = "left"
    try:
        with as_it_came(model):
            model.save_pretrained(folder, max_shard_size=max_shard_size)
        tokenizer.save_pretrained(folder)
        copy_processor(model, folder, processor)
    finally:
        tokenizer.padding_side = padding_side


def copy_value_head(sources: Iterable[str], target: Path) -> Path | None:
    """The value head of the first of the folders that has one (v_head.summary.weight and .bias) goes beside the model.

    Returns the copy, None if none of them has a value head."""
    for source in sources:
        for name in VALUE_HEAD_FILES:
            file = Path(source).expanduser() / name
            if file.is_file():
                return Path(shutil.copyfile(file, target / name))
    return None
