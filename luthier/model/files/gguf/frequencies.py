"""The rotary frequencies of a model, and by how much Llama 3 slows each of them down."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig


def rope_parameters(config: "PreTrainedConfig") -> dict[str, Any]:
    """Of the layers that attend to everything, where a model has others as well."""
    parameters = config.rope_parameters or {}
    return dict(parameters.get("full_attention", parameters))


def head_dim(config: "PreTrainedConfig") -> int:
    own = getattr(config, "head_dim", None)  # not every model type has the key
    return own or config.hidden_size // config.num_attention_heads


def llama3_factors(config: "PreTrainedConfig") -> "torch.Tensor":
    """By how much a model that is stretched in the way of Llama 3 slows each frequency down."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    return plain_frequencies(config) / stretched


def plain_frequencies(config: "PreTrainedConfig") -> "torch.Tensor":
    """theta^(-2i/d) for i < d/2."""
    import torch

    d = head_dim(config)
    return rope_parameters(config)["rope_theta"] ** -(torch.arange(0, d, 2, dtype=torch.float32) / d)
