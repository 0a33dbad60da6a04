"""Checks once the weights are in place: did they fill the model, and can it be trained?"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.core.log import quiet, warn
from luthier.model.files.readable import UNREADABLE
from luthier.model.files.sources import ModelFiles, ModelSource
from luthier.model.heads.score_head import SCORE_LAYER

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel


SETTINGS_LOGGER = "transformers.generation.configuration_utils"
"""What warns of settings without effect; `repair_generation_config` says what becomes of them."""
_MOST_IDS = 1 << 31


def check_found(source: ModelFiles, found: Mapping[str, Any], *, starts_score: bool = False) -> None:
    """`found`: the loading info of transformers. Raises `ModelError` for weights that no file has.

    `starts_score`: the model becomes a reward model, whose score layer starts at random and which needs no output head.
    """
    missing = sorted(found["missing_keys"])
    if starts_score and missing == [f"{SCORE_LAYER}.weight"]:
        return
    if missing:
        raise ModelError(
            f"{source}: {len(missing)} weights of the model are not in its files ({', '.join(missing[:3])}, ...); the "
            "files belong to another model or are incomplete"
        )
    if found["unexpected_keys"]:
        unused = sorted(found["unexpected_keys"])
        warn(f"{source}: {len(unused)} tensors of its files have no place in the model ({', '.join(unused[:3])}, ...)")


def require_causal(model: "PreTrainedModel") -> None:
    """Raises `ModelError` for a model with an encoder, which would read the answer that the decoder is trained on."""
    if model.config.is_encoder_decoder:
        raise ModelError(
            f"{model.name_or_path}: this model has an encoder and a decoder, and rows of prompt and answer train "
            "a decoder alone -> take a causal language model; chat and export work with this one"
        )


def check_generation_config(source: ModelSource) -> None:
    """Raises `ModelError` for generation settings that cannot be read, or that transformers refuses as they are."""
    from transformers import GenerationConfig

    files = source.files
    try:
        with quiet(SETTINGS_LOGGER):
            _check_ids(GenerationConfig.from_pretrained(files.name, **source.access.options))
    except OSError as fault:
        if (Path(files.name) / "generation_config.json").is_file():
            raise _refused(files, fault) from fault
    except UNREADABLE as fault:
        raise _refused(files, fault) from fault


def _check_ids(generation: "GenerationConfig") -> None:
    """Raises `ValueError` for ends that are no ids or texts; transformers looks at them during an answer."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value: Any = getattr(generation, name)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(type(index) is int and -1 <= index < _MOST_IDS for index in ids):
            raise ValueError(f"{name}: {value!r} is no token id")
    stops = generation.stop_strings or []
    if not isinstance(stops, str) and not (
        isinstance(stops, list) and all(isinstance(stop, str) and stop for stop in stops)
    ):
        raise ValueError(f"stop_strings: {stops!r} is no list of texts")


def _refused(files: ModelFiles, fault: Exception) -> ModelError:
    reason = str(fault).strip().splitlines()[0].rstrip(".")
    return ModelError(
        f"{files}: its generation_config.json cannot be used ({reason}) -> correct it, or remove it to generate with"
        " default settings"
    )


def repair_generation_config(model: "PreTrainedModel") -> None:
    """Makes the generation settings ones that transformers saves; it refuses those that contradict each other.

    Settings of sampling without `do_sample` mean that sampling was meant. What transformers still refuses is left out,
    with a warning: it would have no effect on an answer.
    """
    generation = model.generation_config if model.can_generate() else None
    if generation is None:
        return
    kind = type(generation)
    defaults = vars(kind())
    given = {
        name: value
        for name, value in vars(generation).items()
        if not name.startswith("_") and (name not in defaults or value != defaults[name])
    }
    if given.get("temperature") == 0 and not given.get("do_sample"):
        given.pop("temperature")  # asks for the likeliest token, which is what generation without sampling takes
        generation.temperature = defaults["temperature"]
    if _is_valid(kind, given):
        return
    choices = (_valid_part(kind, given), _valid_part(kind, {**given, "do_sample": True}))
    kept = max(choices, key=lambda settings: len(settings.keys() - {"do_sample"}))
    dropped = sorted(given.keys() - kept.keys())
    for name in dropped:
        if name in defaults:
            setattr(generation, name, defaults[name])
        else:
            delattr(generation, name)
    generation.do_sample = kept.get("do_sample", generation.do_sample)
    if dropped:
        told = ", ".join(f"{name}: {given[name]!r}" for name in dropped)
        warn(f"generation_config.json: without effect beside its other settings and left out of what is saved: {told}")


def _valid_part(kind: "type[GenerationConfig]", given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that transformers accepts together, in their order; one may become valid through a later one."""
    kept: dict[str, Any] = {}
    is_growing = True
    while is_growing:
        more = [name for name in given if name not in kept]
        for name in more:
            if _is_valid(kind, {**kept, name: given[name]}):
                kept[name] = given[name]
        is_growing = any(name in kept for name in more)
    return kept


def _is_valid(kind: "type[GenerationConfig]", settings: Mapping[str, Any]) -> bool:
    try:
        with quiet(SETTINGS_LOGGER):
            kind(**settings).validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True


def keep_use_cache(model: "PreTrainedModel") -> None:
    """Notes `use_cache` of the config that the model came with, since training and inference set their own."""
    model.config_use_cache = vars(model.config).get("use_cache")  # type: ignore[assignment]


@contextmanager
def as_it_came(model: "PreTrainedModel") -> Iterator[None]:
    """While the model is saved: `use_cache` as in the config it came with, and valid generation settings."""
    repair_generation_config(model)
    config = model.config
    current = vars(config).pop("use_cache", None)
    wanted = getattr(model, "config_use_cache", current)
    if wanted is not None:
        config.use_cache = wanted
    try:
        yield
    finally:
        vars(config).pop("use_cache", None)
        if current is not None:
            config.use_cache = current


def resolved_settings(model: "PreTrainedModel") -> dict[str, str]:
    """What `auto` became in this run, for the manifest."""
    facts = {"attention": model.config._attn_implementation, "dtype": str(model.dtype).removeprefix("torch.")}
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kind = parameters.get("full_attention", parameters).get("rope_type", "default")
    return facts if kind == "default" else {**facts, "rope": kind}
