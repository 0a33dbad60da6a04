"""From a name to a model with its weights in place."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.model.gguf import check_loadable
from luthier.model.sources import Source, check_source, locate
from luthier.model.tokenizer import unusable

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


@contextlib.contextmanager
def _readable(source: Source, part: str) -> Iterator[None]:
    """What transformers raises for files it cannot use becomes a `ModelError`."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as fault:
        raise unusable(source, part, fault) from fault


def load_config(
    name_or_path: str,
    *,
    revision: str = "main",
    cache_dir: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedConfig":
    """The config of a folder, a GGUF file or a hub id. Raises `ModelError`."""
    from transformers import AutoConfig

    source = locate(name_or_path)
    options: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    if source.gguf_file:
        check_loadable(Path(source.name) / source.gguf_file)
    with _readable(source, "config"):
        return AutoConfig.from_pretrained(
            source.name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            trust_remote_code=trust_remote_code,
            **options,
        )


def auto_class(config: "PreTrainedConfig") -> Any:
    """The class of transformers that builds the model of this config."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    for auto in (AutoModelForImageTextToText, AutoModelForSeq2SeqLM):
        if type(config) in auto._model_mapping:
            return auto
    return AutoModelForCausalLM


def model_class(config: "PreTrainedConfig") -> type | None:
    """The class of the model itself, or None if it comes with the checkpoint (remote code)."""
    mapping = auto_class(config)._model_mapping
    if type(config) not in mapping:
        return None
    found = mapping[type(config)]
    return found[0] if isinstance(found, (list, tuple)) else found


def load_model(
    name_or_path: str,
    *,
    config: "PreTrainedConfig | None" = None,
    dtype: "torch.dtype",
    attn_implementation: str = "sdpa",
    device_map: "str | dict[str, Any] | None" = None,
    offload_folder: str | None = None,
    train_from_scratch: bool = False,
    revision: str = "main",
    cache_dir: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> "PreTrainedModel":
    """The model of a folder, a GGUF file or a hub id, in `dtype`, in evaluation mode.

    `config`: from `load_config`, if it is there already. `train_from_scratch`: random weights for the config.
    A GGUF file is de-quantised, so its model can be trained and saved like any other.
    Raises `ModelError` for files that are missing, damaged or do not fill every weight of the model.
    """
    source = locate(name_or_path)
    hub: dict[str, Any] = {"revision": revision, "cache_dir": cache_dir, "token": token}
    if config is None:
        config = load_config(name_or_path, trust_remote_code=trust_remote_code, **hub)
    check_source(name_or_path, weights=not train_from_scratch)
    auto = auto_class(config)
    common: dict[str, Any] = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "trust_remote_code": trust_remote_code,
    }
    if train_from_scratch:
        with _readable(source, "config"):
            model = auto.from_config(config, **common)
        return model.eval()
    if source.gguf_file:
        from transformers import GgufConfig

        common |= {"gguf_file": source.gguf_file, "quantization_config": GgufConfig(dequantize=True)}
    if device_map is not None:
        common |= {"device_map": device_map, "offload_folder": offload_folder}
    with _readable(source, "weights"):
        model, found = auto.from_pretrained(source.name, config=config, output_loading_info=True, **common, **hub)
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ModelError(
            f"{source}: {len(missing)} weights of the model are not in its files ({', '.join(missing[:3])}, ...); the "
            "files belong to another model or are incomplete"
        )
    return model
