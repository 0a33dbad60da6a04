"""The adapter that a server program is given beside the model. What it cannot apply exactly is refused.

The limits are those of vLLM 0.33 (`vllm/lora/peft_helper.py`) and SGLang 0.5.23 (`sglang/srt/lora/lora.py`).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.model.files.sources import ADAPTER_WEIGHTS, read_json, read_safetensors_header

if TYPE_CHECKING:
    from luthier.config.keys.model import ModelConfig

_PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base weights as they are."""
_EXTRAS = {
    "use_dora": "DoRA",
    "lora_bias": "biases",
    "modules_to_save": "whole modules (modules_to_save)",
    "trainable_token_indices": "rows of new tokens",
    "target_parameters": "adapted parameters (target_parameters)",
    "layer_replication": "repeated layers",
    "alora_invocation_tokens": "an activated LoRA",
    "use_qalora": "QA-LoRA",
    "use_bdlora": "BD-LoRA",
    "exclude_modules": "excluded modules",
}
"""Key of adapter_config.json -> what it brings along."""
_ONE_SCALE = {
    "use_rslora": "rsLoRA",
    "rank_pattern": "ranks of single layers",
    "alpha_pattern": "scales of single layers",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes."""

    server: str
    max_rank: int | None
    """None: any."""
    rank_key: str = ""
    """The key of the run file that sets it."""
    one_scale: bool = False
    """Every layer is scaled by alpha / r."""


def adapter_folder(keys: "ModelConfig", limits: Limits) -> Path | None:
    """The folder of the run's one adapter; None without. Raises `ModelError` for one that the server cannot apply."""
    from luthier.model.adapters._merge import adapter_path, given_adapters

    if not keys.adapter_name_or_path:
        return None
    (name,) = keys.adapter_name_or_path
    folder = adapter_path(name, given_adapters(keys))
    config = read_json(folder / "adapter_config.json")
    extras = [*_extras(config, limits), *_whole_weights(folder)]
    if extras:
        raise ModelError(
            f"adapter_name_or_path: {name}: this adapter has {' and '.join(extras)}, which {limits.server} cannot apply"
            " -> merge it with `luthier export`, and give the folder as model_name_or_path"
        )
    rank = max([int(config["r"]), *(config.get("rank_pattern") or {}).values()])
    if limits.max_rank is not None and rank > limits.max_rank:
        raise ModelError(
            f"adapter_name_or_path: {name}: this adapter has the rank {rank}, and {limits.rank_key} is"
            f" {limits.max_rank} -> set {limits.rank_key} to {rank} or more"
        )
    return folder.resolve()


def require_plain_lora(folder: Path, server: str) -> None:
    """Raises `ModelError` if the adapter in `folder` has what the server cannot apply."""
    extras = [*_extras(read_json(folder / "adapter_config.json"), Limits(server, None)), *_whole_weights(folder)]
    if extras:
        raise ModelError(
            f"rollout_backend: the adapter has {' and '.join(extras)}, which {server} cannot apply"
            " -> leave rollout_backend out"
        )


def _extras(config: Mapping[str, Any], limits: Limits) -> Iterator[str]:
    method = str(config.get("peft_type"))
    if method.upper() != "LORA":
        yield f"the method {method}"
        return
    for key, words in (_EXTRAS | (_ONE_SCALE if limits.one_scale else {})).items():
        if config.get(key):
            yield words
    if config.get("bias", "none") != "none":
        yield "biases"
    if config.get("init_lora_weights", True) not in _PLAIN_STARTS:
        yield f"changed base weights (init_lora_weights: {config['init_lora_weights']})"


def _whole_weights(folder: Path) -> Iterator[str]:
    """Weights beside those of the adapter, such as the embedding of new tokens."""
    file = folder / ADAPTER_WEIGHTS[0]
    if not file.is_file():
        return
    names = [name for name in read_safetensors_header(file) if name != "__metadata__"]
    others = [name for name in names if ".lora_A." not in name and ".lora_B." not in name]
    if others:
        yield f"weights that are no LoRA ({others[0].removeprefix('base_model.model.')})"
