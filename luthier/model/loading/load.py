"""From a name to a model with its weights in place."""

from typing import TYPE_CHECKING, Any

from luthier.core.log import quiet
from luthier.model.classes import auto_class, checkpoint_dtype, gives_scores, is_routed
from luthier.model.compat import aqlm_cpu, bitsandbytes_cpu, gguf_speed, ktransformers, llama4_outputs
from luthier.model.features.mixture_of_depths import add_routers, prepare, routed_model_class
from luthier.model.files.readable import readable
from luthier.model.files.sources import ModelFiles, ModelSource, check_source
from luthier.model.loading.config import load_config
from luthier.model.loading.loaded import (
    SETTINGS_LOGGER,
    check_found,
    check_generation_config,
    keep_use_cache,
    repair_generation_config,
)
from luthier.model.loading.memory_check import placement
from luthier.model.quantization._layers import Quantization
from luthier.model.quantization._prequantized import (
    mark_dequantized,
    prequantized_format_of,
    reader_of,
)
from luthier.model.tensor_parallel import split_layers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def load_model(
    source: ModelSource,
    *,
    config: "PreTrainedConfig | None" = None,
    dtype: "torch.dtype",
    attn_implementation: str = "sdpa",
    device_map: "str | dict[str, Any] | None" = None,
    offload_folder: str | None = None,
    train_from_scratch: bool = False,
    quantization: Quantization | None = None,
    starts_score: bool = False,
    tp_size: int = 1,
) -> "PreTrainedModel":
    """The model in `dtype`, in evaluation mode.

    `config`: from `load_config`, if it is there already. `train_from_scratch`: random weights for the config.
    `quantization`: low-bit linear layers that compute in `dtype`.
    `tp_size`: processes that share each layer; each gets its part of the weights.
    `starts_score`: the score layer of a reward model starts at random if it is not among the weights.
    A GGUF file is de-quantized, so its model can be trained and saved like any other.
    Raises `ModelError` for files that are missing, damaged or do not fill every weight of the model.
    """
    files = source.files
    if config is None:
        config = load_config(source)
    check_source(source, weights=not train_from_scratch)
    auto = auto_class(config)
    common: dict[str, Any] = {"dtype": dtype, "attn_implementation": attn_implementation}
    common["trust_remote_code"] = source.trust_remote_code
    if train_from_scratch:
        return _with_random_weights(files, auto, config, common)
    if files.gguf_file:
        from transformers import GgufConfig

        common |= {"gguf_file": files.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    elif not gives_scores(config):
        check_generation_config(source)
    kind = routed_model_class(config) if is_routed(config) else auto
    is_packed = prequantized_format_of(config) is not None
    is_low_bit = quantization is not None or is_packed
    common |= placement(source, dtype, device_map, offload_folder, is_low_bit=is_low_bit)
    common |= split_layers(files, config, tp_size)
    if quantization is not None:
        common |= quantization.options(dtype, checkpoint_dtype(config), is_gguf=bool(files.gguf_file))
    said_here = ("transformers.modeling_utils", "transformers.distributed")  # `check_found` says what they would
    with readable(files, "weights"), quiet(said_here[0]), quiet(said_here[1]), quiet(SETTINGS_LOGGER):
        model, found = reader_of(config, kind)(files.name, config=config, **common, **source.access.options)
    check_found(files, ktransformers.without_experts(found), starts_score=starts_score and gives_scores(config))
    gguf_speed.forget()
    if quantization is not None:
        quantization.finish(model, dtype, is_gguf=bool(files.gguf_file))
    mark_dequantized(model, was_packed=is_packed)
    _work_around(model)
    # Adapters record the name of their base as the user wrote it.
    model.name_or_path = model.config.name_or_path = source.name
    repair_generation_config(model)
    keep_use_cache(model)
    if is_routed(config):
        prepare(model)
    return model


def _work_around(model: "PreTrainedModel") -> None:
    """Faults of other libraries."""
    bitsandbytes_cpu.prevent_repacking(model)
    aqlm_cpu.use_dequantized_matmul(model)
    llama4_outputs.give_image_outputs(model)


def _with_random_weights(
    files: ModelFiles, auto: Any, config: "PreTrainedConfig", common: dict[str, Any]
) -> "PreTrainedModel":
    with readable(files, "config"):
        model: PreTrainedModel = auto.from_config(config, **common)
    keep_use_cache(model)
    if is_routed(config):
        add_routers(model)
    return model.eval()
