"""The config of a model, read before any weight."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.model.adapters._merge import adapter_path, given_adapters
from luthier.model.classes import adapter_gives_scores, gives_scores, make_scorer, require_kind
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


def fit_task(keys: "ModelConfig", config: "PreTrainedConfig", *, scores: bool | None, starts_score: bool) -> bool:
    """Make `config` that of a reward model if it is to be one. Returns whether its score layer may be fresh.

    `starts_score`: a model that writes becomes one that scores; else it does only if an adapter was trained so.
    `scores`: what is wanted, None for whatever it is. Raises `ModelError` if it is the other.
    """
    given = given_adapters(keys)
    by_adapter = next((name for name in given.names if adapter_gives_scores(adapter_path(name, given))), "")
    if (by_adapter or starts_score) and not gives_scores(config):
        make_scorer(config)
    if scores is not None:
        require_kind(by_adapter or keys.model_name_or_path, config, scores=scores)
    return starts_score or bool(by_adapter)
