"""Encoders that compute each image of a batch once, though several sequences show it: both answers of a pair, or n
sampled answers.

The models of transformers take features in place of pixels:

    forward(input_ids, mm_encoder_outputs={"image": get_image_features(pixel_values)})

`share_towers` computes the features of the distinct samples within `forward`, where sharded weights are gathered and
several processes expect it, and puts them in the order of the sequences. Gradients flow back from all of them.
"""

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
_NOT_OF_ENCODERS = ("text_config", "use_cache", "dtype", "architectures", "transformers_version", "_name_or_path")
"""Keys of a config that change no features. The format of weights is known from themselves."""


class Sharing(Protocol):
    """See `luthier.data.shared_media`."""

    @property
    def shown(self) -> tuple[int, ...]: ...
    @property
    def vectors(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def stored(self) -> Mapping[str, Any]: ...
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
        return "its encoder has dropout, which is drawn for each row by itself"
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
    if sharing.stored:
        return {
            kind: _restored(shared.media[f"stored_{kind}"], form, _vectors(sharing, kind), sharing.shown)
            for kind, form in sharing.stored.items()
            if f"stored_{kind}" in shared.media
        }
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
    return not any(weight.requires_grad for _, weight in _seeing(owner))


def encoders_learn(base: "PreTrainedModel") -> str | None:
    """The name of a weight between pixels and features that learns; None if there is none."""
    return next((name for name, weight in _seeing(owner_of(base)) if weight.requires_grad), None)


def encoder_digest(base: "PreTrainedModel") -> str:
    """Of all weights between pixels and features, and of their config. Equal digests mean equal features."""
    import torch

    config = {key: value for key, value in base.config.to_dict().items() if key not in _NOT_OF_ENCODERS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=repr).encode())
    for name, weight in _seeing(owner_of(base)):
        value = weight.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()


def _seeing(owner: Any) -> "Iterator[tuple[str, Tensor]]":
    """The weights and buffers that are not those of the language model."""
    text = text_part(owner)
    language = set() if text is owner else {id(one) for one in (*text.parameters(), *text.buffers())}
    yield from (pair for pair in (*owner.named_parameters(), *owner.named_buffers()) if id(pair[1]) not in language)


@dataclass(frozen=True, slots=True)
class Features:
    """What `mm_encoder_outputs` has for a kind, as far as models read it."""

    pooler_output: Any = None
    last_hidden_state: Any = None
    deepstack_features: Any = None

    def to_tuple(self) -> tuple[Any, ...]:
        """Models return it with their own output, and ask for it in this form."""
        found = (self.pooler_output, self.last_hidden_state, self.deepstack_features)
        return tuple(value for value in found if value is not None)


@dataclass(frozen=True, slots=True)
class SampleFeatures:
    """The features of one sample."""

    field: str
    """Of the output that has them."""
    is_list: bool
    vectors: "Tensor"
    """(n, L, D): those that replace the tokens, and those that are added deeper in."""


def features_by_sample(
    base: "PreTrainedModel", media: "Mapping[str, Tensor]", sharing: Sharing
) -> list[dict[str, SampleFeatures]]:
    """Kind -> features, for each of the distinct samples."""
    import torch

    outputs = _encoded(owner_of(base), media)
    found: list[dict[str, SampleFeatures]] = []
    for number in range(max(map(len, sharing.vectors.values()), default=0)):
        found.append({})
        for kind, output in outputs.items():
            vectors = _vectors(sharing, kind)
            if vectors[number]:
                field = _field_of(output)
                layers = [getattr(output, field), *(getattr(output, "deepstack_features", None) or ())]
                flat = [_flat(_chosen(layer, vectors, (number,))) for layer in layers]
                is_list = not isinstance(layers[0], torch.Tensor)
                found[-1][kind] = SampleFeatures(field, is_list, torch.stack(flat, 1))
    return found


def _restored(values: "Tensor", form: Any, vectors: Sequence[int], order: Sequence[int]) -> Features:
    """`values`: (n, L, D) of the distinct samples."""
    import torch

    samples = values.split(list(vectors))
    first, *deeper = [[samples[sample][:, layer] for sample in order] for layer in range(values.shape[1])]
    taken = first if form.is_list else torch.cat(first)[None]
    return Features(**{form.field: taken}, deepstack_features=deeper or None)


def _flat(features: Any) -> "Tensor":
    """(n, D)"""
    import torch

    tensors = [features] if isinstance(features, torch.Tensor) else features
    return torch.cat([one.reshape(-1, one.shape[-1]) for one in tensors])


def _field_of(output: Any) -> str:
    return "last_hidden_state" if getattr(output, "pooler_output", None) is None else "pooler_output"


def _in_order(output: Any, vectors: Sequence[int], order: Sequence[int]) -> Features:
    """The output of an encoder for the samples in this order. `vectors`: how many each of the distinct samples has."""
    field, layers = _field_of(output), getattr(output, "deepstack_features", None)
    chosen = {field: _chosen(getattr(output, field), vectors, order)}
    if layers is not None:
        chosen["deepstack_features"] = [_chosen(layer, vectors, order) for layer in layers]
    return Features(**chosen)


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
