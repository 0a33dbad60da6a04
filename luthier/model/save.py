"""Models on disk, in the layout of transformers: sharded safetensors, config, generation config, tokenizer."""

from pathlib import Path
from typing import TYPE_CHECKING

from luthier.core.files import save_folder_atomically

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WEIGHT_FILES = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin*", "adapter_*")
"""What an earlier model or adapter left in the folder and must not be taken for a part of this one."""


def save_model(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, *, max_shard_gigabytes: float = 5
) -> None:
    """Write model and tokenizer to `folder`, whole or not at all.

    The tokenizer pads on the left, as generation wants it. Raises `OutputError` and `RunFailed`, see
    `luthier.core.files.save_folder_atomically`.
    """
    with save_folder_atomically(folder, needed_bytes=num_bytes(model), replaces=WEIGHT_FILES) as temporary:
        write_model(model, tokenizer, temporary, max_shard_gigabytes=max_shard_gigabytes)


def num_bytes(model: "PreTrainedModel") -> int:
    """What the weights take on disk."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def write_model(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", folder: Path, *, max_shard_gigabytes: float = 5
) -> None:
    """The same into the folder of `save_folder_atomically`, for those who add files of their own. Raises `OSError`."""
    from safetensors import SafetensorError

    use_cache, padding_side = model.config.use_cache, tokenizer.padding_side
    model.config.use_cache, tokenizer.padding_side = True, "left"
    try:
        model.save_pretrained(folder, max_shard_size=f"{max_shard_gigabytes}GB")
        tokenizer.save_pretrained(folder)
    except SafetensorError as fault:  # a full disk, as safetensors tells it
        raise OSError(str(fault)) from fault
    finally:
        model.config.use_cache, tokenizer.padding_side = use_cache, padding_side
