"""Checks once the weights are in place: did they fill the model, and can it be trained?"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from luthier.core.errors import ModelError
from luthier.core.log import warn
from luthier.model.files.sources import ModelFiles
from luthier.model.heads.score_head import SCORE_LAYER

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


def repair_generation_config(model: "PreTrainedModel") -> None:
    """Sampling settings without sampling mean that sampling was meant; transformers refuses to save them otherwise."""
    generation = model.generation_config if model.can_generate() else None
    if generation is None or generation.do_sample:
        return
    settings = ((generation.temperature, 1.0), (generation.top_p, 1.0), (generation.typical_p, 1.0))
    if any(value is not None and value != neutral for value, neutral in settings):
        generation.do_sample = True


def resolved_settings(model: "PreTrainedModel") -> dict[str, str]:
    """What `auto` became in this run, for the manifest."""
    facts = {"attention": model.config._attn_implementation, "dtype": str(model.dtype).removeprefix("torch.")}
    parameters = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    kind = parameters.get("full_attention", parameters).get("rope_type", "default")
    return facts if kind == "default" else {**facts, "rope": kind}
