"""Encoders that compute each image of a batch once, though several sequences show it: both answers of a pair, or n
sampled answers.

The models of transformers take features in place of pixels:

    forward(input_ids, mm_encoder_outputs={"image": get_image_features(pixel_values)})

`share_towers` computes the features of the distinct samples within `forward`, where sharded weights are gathered and
several processes expect it, and puts them in the order of the sequences. Gradients flow back from all of them.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, Protocol

from luthier.core.errors import ModelError
from luthier.model.attention import can_be_tried
from luthier.model.dropout import has_dropout
from luthier.model.modules import unwrap
from luthier.model.multimodal import find_parts, text_part
from luthier.model.sharded import is_sharded
from luthier.model.trial import are_close, outputs, trying

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

FEATURES = "mm_encoder_outputs"
"""The argument of `forward` that takes features."""
SHARED = "shared_media"
"""The argument with the media of distinct samples, which the model itself does not know."""
_PIXELS = ("pixel_values", "pixel_values_images", "pixel_values_videos", "image_patches")
"""What encoders look at. Their other arguments are sizes and masks."""


class Sharing(Protocol):
    """See `luthier.data.shared_media`."""

    @property
    def shown(self) -> tuple[int, ...]: ...
    @property
    def vectors(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def kept(self) -> dict[Any, Any]: ...


class SharedMedia(Protocol):
    """The inputs of the distinct samples, and which of them each sequence shows."""

    @property
    def media(self) -> "Mapping[str, Tensor]": ...
    @property
    def sharing(self) -> Any: ...


def owner_of(base: "PreTrainedModel") -> Any:
    """The innermost module of `base` whose `forward` takes features; None if there is none."""
    from transformers import PreTrainedModel

    owners = [
        module
        for module in base.modules()
        if isinstance(module, PreTrainedModel)
        and hasattr(module, "get_image_features")
        and FEATURES in inspect.signature(module.forward).parameters
    ]
    return owners[-1] if owners else None


Trial = Callable[["PreTrainedModel"], tuple[Mapping[str, Any], Mapping[str, Any]]]
"""Makes inputs for rows of which two show the same media: each row with media of its own, and with shared ones."""
_FAULTS = (ModelError, ValueError, RuntimeError, TypeError, LookupError, AttributeError)


def sharing_fault(model: "nn.Module", trial: Trial, *, draws: bool) -> str | None:
    """Why each row of this model needs features of its own; None if rows can share them, and the model is ready for it.

    The class is checked first. Then the model is tried: its outputs must be the same with shared features as without.
    `draws`: dropout is active in training.
    """
    base = unwrap(model)
    reason = _reason_against(base, draws=draws)
    if reason is not None:
        return reason
    share_towers(base)
    try:
        with trying(base):
            apart, together = (outputs(base, inputs) for inputs in trial(base))
    except _FAULTS as fault:
        return f"tried on rows with the same media, it failed: {str(fault).partition(chr(10))[0]}"
    if apart.shape != together.shape or not are_close(base, together, apart):
        change = float((together - apart).abs().max() / apart.abs().max())
        return f"tried on rows with the same media, its outputs changed by {change:.0e} of the largest"
    return None


def _reason_against(base: "PreTrainedModel", *, draws: bool) -> str | None:
    """Why each sequence of this model needs its own features, as far as its class tells. `draws`: dropout is active."""
    if owner_of(base) is None:
        return f"{type(base).__name__} takes no features in place of pixels"
    if not can_be_tried(base):
        return "its attention kernels cannot be tried before the model has moved to its accelerator"
    modules = dict(base.named_modules())
    if draws and any(has_dropout(modules[name]) for name in find_parts(base).encoders if name in modules):
        return "its encoder has dropout, which is drawn anew for each row"
    return None


def share_towers(base: "PreTrainedModel") -> None:
    """Make `forward` of the model take `shared_media`. Only for models that have been tried."""
    owner = owner_of(base)
    if not any(hook is _with_features for hook in owner._forward_pre_hooks.values()):
        owner.register_forward_pre_hook(_with_features, with_kwargs=True)


def features_of(base: "PreTrainedModel", shared: SharedMedia) -> dict[str, Any]:
    """`mm_encoder_outputs` for the sequences that share these media."""
    return _features(owner_of(base), shared)


def _with_features(owner: Any, args: Any, given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    shared = given.pop(SHARED, None)
    return args, given if shared is None else {**given, FEATURES: _features(owner, shared)}


def _features(owner: Any, shared: SharedMedia) -> dict[str, Any]:
    sharing: Sharing = shared.sharing
    found = sharing.kept.get(owner)
    if found is None:
        found = _encoded(owner, shared.media)
        if is_frozen(owner) and not is_sharded(owner):  # else all processes have to gather the weights again
            sharing.kept[owner] = found
    return {kind: _in_order(output, _vectors(sharing, kind), sharing.shown) for kind, output in found.items()}


def _vectors(sharing: Sharing, kind: str) -> tuple[int, ...]:
    """Some encoders take videos as images, and the batch has one of the two then."""
    return sharing.vectors[kind] if kind in sharing.vectors else next(iter(sharing.vectors.values()))


def _encoded(owner: Any, media: "Mapping[str, Tensor]") -> dict[str, Any]:
    """Kind -> the output of its encoder."""
    found = {}
    for kind in ("image", "video"):
        encode = getattr(owner, f"get_{kind}_features", None)
        if encode is not None:
            names = inspect.signature(encode).parameters
            given = {name: values for name, values in media.items() if name in names}
            if any(name in given for name in _PIXELS):
                found[kind] = encode(**given, return_dict=True)
    return found


def is_frozen(owner: "PreTrainedModel") -> bool:
    """Whether nothing between pixels and features learns, so that equal pixels have equal features in the whole run."""
    text = text_part(owner)
    if text is owner:
        return False
    language = {id(weight) for weight in text.parameters()}
    return not any(weight.requires_grad and id(weight) not in language for weight in owner.parameters())


def _in_order(output: Any, vectors: Sequence[int], order: Sequence[int]) -> Any:
    """The output of an encoder for the samples in this order. `vectors`: how many each of the distinct samples has."""
    name = "last_hidden_state" if getattr(output, "pooler_output", None) is None else "pooler_output"
    chosen = {name: _chosen(getattr(output, name), vectors, order)}
    layers = getattr(output, "deepstack_features", None)
    if layers is not None:
        chosen["deepstack_features"] = [_chosen(layer, vectors, order) for layer in layers]
    return type(output)(**chosen)


def _chosen(entries: Any, vectors: Sequence[int], order: Sequence[int]) -> Any:
    """Entries are images, tiles or single vectors (n, T, D) or (n, D), or a list of them with different lengths."""
    import torch

    is_tensor = isinstance(entries, torch.Tensor)
    counted = entries[:1] if is_tensor else entries
    lengths = [entry.numel() // entry.shape[-1] for entry in counted] * (len(entries) if is_tensor else 1)
    places = {0: 0} | {end: number for number, end in enumerate(accumulate(lengths), 1)}
    bounds = [0, *accumulate(vectors)]
    if sum(lengths) != bounds[-1] or not all(bound in places for bound in bounds):
        raise ModelError(
            f"its encoder gives {sum(lengths)} vectors for {bounds[-1]} tokens, or vectors of several images in one"
        )
    samples = [entries[places[start] : places[stop]] for start, stop in pairwise(bounds)]
    if is_tensor:
        return torch.cat([samples[sample] for sample in order])
    return [entry for sample in order for entry in samples[sample]]
