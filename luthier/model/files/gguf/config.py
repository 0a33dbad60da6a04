"""What a GGUF file says about a model and transformers 5.23 does not read: put into the config that it made.

Without it a model loads and answers wrongly: stretched contexts as if they were not, soft caps and head sizes of
another model. What transformers reads stands in
https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/integrations/ggml.py
"""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.model.files.gguf.header import GgufHeader

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
_WINDOW_OF_LLAMA3 = 8192
"""Of all Llama 3 models; the file has the frequencies that came out, and only the factor differs between models.

Another model that was stretched in this way (`rope_scaling: llama3`) began with its context length / factor."""
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
"""These two scale queries by hidden size / heads, all others by the head size. GGUF has no key for it."""


def repair_config(config: "PreTrainedConfig", header: GgufHeader) -> None:
    """In place. Raises `ModelError` for rotary frequencies that no known formula gives."""
    architecture = header.architecture

    def found(name: str) -> Any:
        return header.keys.get(f"{architecture}.{name}")

    if architecture in ("qwen3", "gemma2", "gemma3") and (head_dim := found("attention.key_length")):
        config.head_dim = head_dim
    if architecture in _LAYERS_OF_27B:
        config.attn_logit_softcapping = found("attn_logit_softcapping")
        config.final_logit_softcapping = found("final_logit_softcapping")
        is_27b = config.num_hidden_layers == _LAYERS_OF_27B[architecture]
        scale = config.hidden_size // config.num_attention_heads if is_27b else config.head_dim
        config.query_pre_attn_scalar = scale
    if architecture == "phi3" and (window := found("attention.sliding_window")):
        config.sliding_window = window
    if architecture == "llama" and any(tensor.name == "blk.0.attn_q.bias" for tensor in header.tensors):
        config.attention_bias = True
    kind = found("rope.scaling.type")
    if kind in ("linear", "yarn"):
        stretched: dict[str, Any] = {"rope_type": kind, "factor": found("rope.scaling.factor")}
        if (original := found("rope.scaling.original_context_length")) is not None:
            stretched["original_max_position_embeddings"] = original
        for bound in ("beta_fast", "beta_slow"):
            if (value := found(f"rope.scaling.yarn_{bound}")) is not None:
                stretched[bound] = value
        _set_rope(config, stretched)
    elif architecture == "llama" and any(tensor.name == "rope_freqs.weight" for tensor in header.tensors):
        _set_rope(config, _llama3_parameters(config, header))


def _set_rope(config: "PreTrainedConfig", parameters: dict[str, Any]) -> None:
    whole = config.rope_parameters
    if "full_attention" in whole:
        config.rope_parameters = whole | {"full_attention": whole["full_attention"] | parameters}
    else:
        config.rope_parameters = whole | parameters


def _llama3_parameters(config: "PreTrainedConfig", header: GgufHeader) -> dict[str, Any]:
    """The lowest frequency is divided by the factor itself."""
    import torch

    from luthier.model.files.gguf.frequencies import llama3_factors

    factors = _rope_factors(header)
    factor = round(float(factors.max()), 4)
    for window in (_WINDOW_OF_LLAMA3, round(config.max_position_embeddings / factor)):
        whole = {"rope_type": "llama3", "factor": factor, **_LLAMA3, "original_max_position_embeddings": window}
        stretched = deepcopy(config)
        _set_rope(stretched, whole)
        if torch.allclose(llama3_factors(stretched), factors, rtol=1e-3):
            return whole
    raise ModelError(
        f"{header.path}: its rotary frequencies are not those of Llama 3 -> use the model's safetensors folder"
    )


def _rope_factors(header: GgufHeader) -> "torch.Tensor":
    import torch

    tensor = next(tensor for tensor in header.tensors if tensor.name == "rope_freqs.weight")
    with header.path.open("rb") as file:
        file.seek(header.data_start_bytes + tensor.offset_bytes)
        data = bytearray(file.read(4 * tensor.num_elements))
    return torch.frombuffer(data, dtype=torch.float32)
