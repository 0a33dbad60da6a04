"""Layers whose weights are shared by the processes of a run (tensor parallelism), by the plan that transformers has for
the model.

P processes. Each holds 1 / P of the rows of some matrices and of the columns of others, so a block computes with its
part and adds up once, in the last matrix (Megatron-LM, https://arxiv.org/abs/1909.08053). Norms are whole everywhere.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.core.log import quiet
from luthier.model.files.sources import ModelFiles

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

HEADS = ("num_attention_heads", "num_key_value_heads")


def split_layers(files: ModelFiles, config: "PreTrainedConfig", tp_size: int) -> dict[str, Any]:
    """Options of `from_pretrained` with which each of `tp_size` processes reads its part of the weights.

    Raises `ModelError` for a model that cannot be split among `tp_size` processes.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    if tp_size == 1:
        return {}
    reason, remedy = _reason_against(files, config, tp_size)
    if reason:
        raise ModelError(
            f"tp_size: the layers of {files} cannot be split over {tp_size} processes: {reason}"
            f" -> {remedy or 'leave tp_size out'}"
        )
    return {"distributed_config": DistributedConfig(tp_size=tp_size)}


def _reason_against(files: ModelFiles, config: "PreTrainedConfig", tp_size: int) -> tuple[str, str]:
    """Reason and remedy, empty if the model can be split."""
    if files.gguf_file:
        return "a GGUF file is read as a whole", "write the model with `luthier export` first, and give its folder"
    if getattr(config, "quantization_config", None):
        return "its weights are quantized", ""
    if config.sub_configs:
        return "it reads more than text", ""
    if not getattr(config, "base_model_tp_plan", None):
        return f"transformers has no plan for {config.model_type}", ""
    for name in HEADS:
        count = getattr(config, name, None) or tp_size
        if count % tp_size:
            what = "attention heads" if name == HEADS[0] else "key and value heads"
            return f"its {count} {what} cannot be shared equally", _fitting(config)
    return "", ""


def _fitting(config: "PreTrainedConfig") -> str:
    """What to do about heads that `tp_size` does not divide."""
    counts = [getattr(config, name, None) or 0 for name in HEADS]
    sizes = [size for size in range(2, max(counts) + 1) if all(count % size == 0 for count in counts)]
    return f"set tp_size to {' or '.join(map(str, sizes))}" if sizes else ""


def whole(weight: Any) -> Any:
    """`weight` as one tensor, gathered if processes share it; the gradient of each process goes to its own part."""
    from torch.distributed.tensor import DTensor

    return weight.full_tensor() if isinstance(weight, DTensor) else weight


def split_like(numbers: "Tensor", weight: "Tensor") -> "Tensor":
    """`numbers`, which every process has as a whole, shared as `weight` is. All processes call it together."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    numbers = numbers.to(weight.device)
    if not isinstance(weight, DTensor):
        return numbers
    # torch cuts in one piece for each process only. Weights of several matrices in one have a piece of each.
    pieces = [Shard(place.dim) if isinstance(place, _StridedShard) else place for place in weight.placements]
    parts = distribute_tensor(numbers, weight.device_mesh, pieces, src_data_rank=None)
    return parts.redistribute(placements=weight.placements)


def read_split(model: "PreTrainedModel", folder: Path) -> "tuple[PreTrainedModel, list[str], list[str]]":
    """The weights that `model`, whose layers are split, has saved to `folder` as a whole, split as in it. With the
    names of those that are missing and of those that are unexpected. Numbers of 16 and 32 bits are read as they are."""
    import torch
    from transformers.distributed.configuration_utils import DistributedConfig

    kind: Any = type(model)
    split = DistributedConfig(tp_size=model.tp_size)
    with quiet("transformers"):
        saved, found = kind.from_pretrained(
            folder, dtype=torch.float32, distributed_config=split, output_loading_info=True
        )
    return saved, sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
