"""The keys that say which model is loaded and how."""

from dataclasses import dataclass
from typing import Literal

from luthier.config.keys.fields import choice, no_effect, variant

_NAMES_IN_TRANSFORMERS = {
    "eager": "set flash_attn: disabled",
    "flash_attention_2": "set flash_attn: fa2",
    "flash_attention_3": "set flash_attn: fa3",
    "flex_attention": "set flash_attn: flex",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    model_name_or_path: str
    """Base model: a folder, a GGUF file, or a name on a hub (Hugging Face, unless the environment names another)."""
    adapter_name_or_path: tuple[str, ...] = ()
    """Adapters: all but the last are merged, and training continues the last, unless `create_new_adapter`."""
    adapter_folder: str | None = None
    """Subfolder of the adapter inside its repository."""
    cache_dir: str | None = None
    """Folder for downloads from the hub."""
    use_fast_tokenizer: bool = True
    """Use the fast tokenizer, written in Rust, if the model has one."""
    split_special_tokens: bool = False
    """Tokenize special tokens in the text as ordinary characters."""
    model_revision: str = "main"
    """Branch, tag or commit of the model on the hub; `main` is `master` on ModelScope."""
    low_cpu_mem_usage: bool = no_effect(True, "weights are always loaded without a second copy in memory")
    """Load the weights without a second copy in memory."""
    flash_attn: Literal["auto", "disabled", "sdpa", "fa2", "fa3", "flex"] = choice("auto", _NAMES_IN_TRANSFORMERS)
    """Attention kernel: chosen by transformers, plain, PyTorch's own, FlashAttention 2 or 3, FlexAttention."""
    use_unsloth: bool = False
    """Load, adapt and run the model with the library unsloth, on a GPU; rows are padded."""
    use_unsloth_gc: bool = False
    """Gradient checkpointing with the inputs of the layers offloaded to main memory."""
    checkpoint_every: int = 1
    """Recompute one layer in this many in the backward pass, and keep the activations of the others."""
    disable_gradient_checkpointing: bool = False
    """Keep all activations instead of recomputing each layer in the backward pass: faster, more memory. If neither
    this key nor another one about recomputation is given, the free memory decides (`luthier plan`)."""
    use_reentrant_gc: bool = True
    """Recompute layers with PyTorch's reentrant checkpointing."""
    upcast_layernorm: bool = False
    """Keep the weights of normalization layers in float32."""
    upcast_lmhead_output: bool = False
    """Convert the output of the head to float32."""
    train_from_scratch: bool = False
    """Use only the config of the model and start from random weights."""
    infer_backend: str = variant("huggingface")
    """Engine that generates text."""
    offload_folder: str = "offload"
    """Folder for weights that do not fit into memory during generation; without an accelerator only if given."""
    fast_path: bool = True
    """Compute the same numbers, up to rounding, in faster ways where the model allows it; false is for comparison."""
    use_kv_cache: bool = True
    """Use a KV cache for generation."""
    use_v1_kernels: bool | None = no_effect(False, "there is one set of kernels only")
    """Use the second kernel set of the reference."""
    infer_dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Number type of the weights for generation and export."""
    hf_hub_token: str | None = None
    """Token for private models on the Hugging Face hub. Never printed."""
    ms_hub_token: str | None = None
    """Token for private models on ModelScope (environment: USE_MODELSCOPE_HUB=1). Never printed."""
    om_hub_token: str | None = None
    """Token for private models on Modelers (environment: USE_OPENMIND_HUB=1). Never printed."""
    print_param_status: bool = False
    """Print name, number type, device and trainability of every parameter after loading."""
    trust_remote_code: bool = False
    """Run the Python code that ships inside the model's repository."""
