"""A longer context window: `rope_scaling` stretches the rotary position embedding of a model.

A pair of dimensions i turns by theta_i = b^(-2i/D) per token. With L the window the model was trained with, s the
factor and n the length of the text:

    linear    theta_i / s                                     (https://arxiv.org/abs/2306.15595)
    dynamic   b becomes b (s n / L - (s - 1))^(D / (D - 2))   where n > L; shorter texts are as they were
    yarn      theta_i / s for slow pairs, theta_i for fast ones, a ramp between; attention is scaled by
              0.1 ln s + 1                                    (https://arxiv.org/abs/2309.00071, section 3)
    llama3    the same idea, the ramp between wavelengths L / 1 and L / 4

transformers computes the angles; the numbers below go into the config, so the saved model is loaded alike everywhere.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from luthier.core.errors import ModelError
from luthier.core.log import info
from luthier.model.features import Feature, Purpose

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScalingConfig:
    rope_scaling: Literal["linear", "dynamic", "yarn", "llama3"] | None = None
    """Scale the rotary position embedding: in training to `cutoff_len`, elsewhere to twice the context length."""


INFERENCE_FACTOR = 2
_KEPT = ("rope_theta", "partial_rotary_factor", "mrope_section", "mrope_interleaved")
"""What a config says of the embedding beside how it is stretched."""


def stretch_context(config: "PreTrainedConfig", kind: str, *, cutoff_len: int | None) -> str:
    """Set `config` to `kind`, by ceil(cutoff_len / L), or by 2 if `cutoff_len` is None; what was done, in words.

    A window that holds `cutoff_len`, and for inference one that is stretched already, stays as it is.
    Raises `ModelError` for a model without rotary embeddings, or one that is stretched in another way.
    """
    text = config.get_text_config()
    parameters = _global_parameters(text)
    present = parameters["rope_type"]
    if present not in ("default", kind):
        raise ModelError(
            f"rope_scaling: {kind}: this model is stretched by {present} already, and weights trained for that do not "
            "fit another way -> leave rope_scaling out, or name the way of the model if rope_scaling knows it"
        )
    window = text.max_position_embeddings
    is_stretched = present == kind
    if cutoff_len is None and is_stretched:
        return f"the model is stretched by {kind} already, to {_reach(text, parameters):,} tokens"
    if cutoff_len is not None and cutoff_len <= _reach(text, parameters):
        return f"not applied: the window of {_reach(text, parameters):,} tokens holds cutoff_len {cutoff_len:,}"
    original = _original_window(window, parameters) if is_stretched else window
    factor = float(INFERENCE_FACTOR if cutoff_len is None else math.ceil(cutoff_len / original))
    for key in set(parameters) - set(_KEPT):
        del parameters[key]
    parameters |= {"rope_type": kind, "factor": factor}
    if kind in ("yarn", "llama3"):
        parameters["original_max_position_embeddings"] = original
    if kind == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind != "dynamic":  # which begins to stretch at this length, and reaches as far as its texts
        text.max_position_embeddings = int(original * factor)
    return f"{kind}, factor {factor:g}: the window grows from {original:,} to {int(original * factor):,} tokens"


def _global_parameters(text: "PreTrainedConfig") -> dict[str, Any]:
    """The part of the config to be changed: layers with a sliding window never look further than it."""
    parameters = getattr(text, "rope_parameters", None)
    if not parameters or not hasattr(text, "max_position_embeddings"):
        raise ModelError(
            f"rope_scaling: models of the type {text.model_type} have no rotary position embedding to stretch"
            " -> leave rope_scaling out"
        )
    return parameters.get("full_attention", parameters)


def _original_window(window: int, parameters: dict[str, Any]) -> int:
    """L, the window before it was stretched."""
    if "original_max_position_embeddings" in parameters:
        return parameters["original_max_position_embeddings"]
    return window if parameters["rope_type"] == "dynamic" else round(window / parameters.get("factor", 1.0))


def _reach(text: "PreTrainedConfig", parameters: dict[str, Any]) -> int:
    """How long a text may be."""
    grows = parameters["rope_type"] == "dynamic"
    return int(text.max_position_embeddings * (parameters["factor"] if grows else 1))


def _is_stretched(config: "PreTrainedConfig", kind: str) -> bool:
    """Whether the config asks for it; it does not if the window is long enough already."""
    return bool(_global_parameters(config.get_text_config())["rope_type"] == kind)


def require_stretched(model: "nn.Module", kind: str) -> None:
    """Raises `ModelError` if no rotary embedding of `model` has taken `kind` from the config."""
    if kind not in set(_kinds(model)):
        raise ModelError(
            f"rope_scaling: {kind}: {type(model).__name__} computes its positions without looking at its config"
            " -> leave rope_scaling out"
        )


def _kinds(model: "nn.Module") -> Iterator[str]:
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        yield from kind.values() if isinstance(kind, dict) else [kind] if isinstance(kind, str) else []


# -- adapters ------------------------------------------------------------------------------------

BESIDE_ADAPTER = "rope_scaling.json"
"""The positions an adapter was trained with: the config of its base does not have them, and it is of no use without."""
_FIELDS = ("rope_parameters", "max_position_embeddings")


def save_beside_adapter(folder: Path, config: "PreTrainedConfig") -> None:
    """Write down how the model is stretched, if it is."""
    text = config.get_text_config()
    if getattr(text, "rope_parameters", None) and _global_parameters(text)["rope_type"] != "default":
        positions = {name: getattr(text, name) for name in _FIELDS}
        (folder / BESIDE_ADAPTER).write_text(json.dumps(positions, indent=2) + "\n", encoding="utf-8")


def take_from_adapter(config: "PreTrainedConfig", folder: Path) -> str:
    """Set `config` to the positions that the adapter in `folder` was trained with; what was done, or the empty text.

    Raises `ModelError` if they cannot be read.
    """
    path, text = folder / BESIDE_ADAPTER, config.get_text_config()
    if not path.is_file():
        return ""
    try:
        positions = json.loads(path.read_text(encoding="utf-8"))
        changed = {name: positions[name] for name in _FIELDS if positions[name] != getattr(text, name, None)}
    except (ValueError, KeyError, TypeError) as fault:
        raise ModelError(f"{path}: cannot be read ({fault!r}) -> copy or download the adapter again") from fault
    for name, value in changed.items():
        setattr(text, name, value)
    if not changed:
        return ""
    parameters = _global_parameters(text)
    return f"{parameters['rope_type']}, as adapter {folder} was trained, to {_reach(text, parameters):,} tokens"


# -- the feature ---------------------------------------------------------------------------------


def on_config(keys: RopeScalingConfig, config: "PreTrainedConfig", purpose: Purpose) -> None:
    """Positions as the last adapter was trained with, then as `rope_scaling` asks."""
    if purpose.adapter_folder is not None and (taken := take_from_adapter(config, purpose.adapter_folder)):
        info(f"rope_scaling: {taken}")
    if keys.rope_scaling:
        cutoff_len = None if purpose.training is None else purpose.training.cutoff_len
        info(f"rope_scaling: {stretch_context(config, keys.rope_scaling, cutoff_len=cutoff_len)}")


def on_model(keys: RopeScalingConfig, model: "PreTrainedModel", purpose: Purpose) -> None:
    if keys.rope_scaling and _is_stretched(model.config, keys.rope_scaling):
        require_stretched(model, keys.rope_scaling)


FEATURE = Feature(name="rope_scaling", config=RopeScalingConfig, on_config=on_config, on_model=on_model)
