"""The config of a model, read before any weight."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.model.features.mixture_of_depths import register
from luthier.model.files.gguf.config import repair_config
from luthier.model.files.gguf.header import check_loadable
from luthier.model.files.hubs import fetching
from luthier.model.files.readable import readable
from luthier.model.files.sources import check_hub, locate
from luthier.model.quantization._prequantized import note_qmodel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from luthier.config.keys.model import ModelConfig


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

    source = locate(name_or_path, revision=revision, cache_dir=cache_dir, token=token)
    options: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    header = check_loadable(Path(source.name) / source.gguf_file) if source.gguf_file else None
    register()
    if not source.is_local:
        check_hub(source.name, cache_dir)
    with readable(source, "config"):
        config = AutoConfig.from_pretrained(
            source.name,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            trust_remote_code=trust_remote_code,
            **options,
        )
    if header is not None:
        repair_config(config, header)
    note_qmodel(config, Path(source.name))
    # Of a model that also speaks (Qwen Omni), the part that reads and writes.
    return getattr(config, "thinker_config", config)


def config_of(keys: "ModelConfig") -> "PreTrainedConfig":
    """As `load_config`, for the model that a run names."""
    return load_config(keys.model_name_or_path, trust_remote_code=keys.trust_remote_code, **fetching(keys))
