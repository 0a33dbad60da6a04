"""The config of a model, read before any weight."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.model.adapters._merge import adapter_path, given_adapters
from luthier.model.classes import adapter_gives_scores, gives_scores, make_scorer, require_kind
from luthier.model.features.mixture_of_depths import register
from luthier.model.files.gguf.config import repair_config
from luthier.model.files.gguf.header import check_loadable
from luthier.model.files.readable import readable
from luthier.model.files.sources import ModelFiles, ModelSource, check_architectures, check_hub
from luthier.model.quantization._prequantized import note_qmodel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from luthier.config.keys.model import ModelConfig


def load_config(source: ModelSource) -> "PreTrainedConfig":
    """The config of a model. Raises `ModelError`."""
    from transformers import AutoConfig

    files = source.files
    options: dict[str, Any] = {"gguf_file": files.gguf_file} if files.gguf_file else {}
    header = check_loadable(Path(files.name) / files.gguf_file) if files.gguf_file else None
    register()
    if not files.is_local:
        check_hub(files.name, source.access)
    with readable(files, "config"):
        config = AutoConfig.from_pretrained(files.name, **source.options, **options)
    check_architectures(files.name, config.architectures)
    if header is not None:
        with readable(files, "config"):
            repair_config(config, header)
    _check_sizes(files, config)
    note_qmodel(config, Path(files.name))
    # Of a model that also speaks (Qwen Omni), the part that reads and writes.
    return getattr(config, "thinker_config", config)


def _check_sizes(files: ModelFiles, config: "PreTrainedConfig") -> None:
    """Raises `ModelError` for sizes that libraries divide by and are 0, and for dropout that is no probability."""
    text = config.get_text_config()
    for name in ("hidden_size", "vocab_size"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value < 1:
            raise ModelError(f"{files}: {name}: {value}: must be above 0 -> copy or download its config again")
    for name, value in vars(text).items():
        if name.endswith(("dropout", "_pdrop")) and isinstance(value, int | float) and not 0 <= value <= 1:
            raise ModelError(f"{files}: {name}: {value}: must be from 0 to 1 -> copy or download its config again")


def embedding_rows(source: ModelSource) -> int:
    """The rows of the embedding by config.json. Raises `ModelError`.

    That of a language model of a type that transformers knows is read without its class, which imports torch.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if not source.files.gguf_file:
        config = source.config
        check_architectures(source.files.name, config.get("architectures"))
        is_known = str(config.get("model_type")) in CONFIG_MAPPING_NAMES and "auto_map" not in config
        is_plain = all(str(name).endswith("ForCausalLM") for name in config.get("architectures") or [""])
        has_parts = any(isinstance(value, dict) and "model_type" in value for value in config.values())
        rows = config.get("vocab_size")
        if is_known and is_plain and not has_parts and isinstance(rows, int):
            return rows
    return int(load_config(source).get_text_config().vocab_size)


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
