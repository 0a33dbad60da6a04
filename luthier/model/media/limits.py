"""Limits of images, videos and audio, set on the parts of a processor of transformers.

Which attribute of which part holds a limit is found from the part, not from the name of the model:

- an area in pixels is `min_pixels` and `max_pixels`, as attributes or in `size`, or it is `shortest_edge` and
  `longest_edge` in `size` where these count pixels of the whole image (Qwen2-VL) and not along an edge (DETR);
- where the function that chooses the size counts frames too (Qwen3-VL, GLM-4V), the same numbers mean a whole video;
- frames are `fps` and `max_frames`, or the fixed `num_frames`, as far as `sample_frames` takes them.

A class may pass values to its parts with each call (`images_kwargs` and the like of `ProcessorMixin`). They take
precedence over those of the part and are not saved, so both are set, and a log line says so.
"""

import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from luthier.config.keys.processor import ProcessorConfig
from luthier.core.errors import ModelError

_LONGEST_EDGE = 2**15
"""No image is longer, in pixels; no model allows fewer pixels in all."""
_HANDED_BY = {"image": "images_kwargs", "video": "videos_kwargs", "audio": "audio_kwargs"}
_AREAS = {"image": ("image_min_pixels", "image_max_pixels"), "video": ("video_min_pixels", "video_max_pixels")}
_FRAME_LIMITS = ("max_frames", "max_num_frames")


@dataclass(slots=True)
class Outcome:
    """Which limits were set, and what a log line must say."""

    changes: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Name of a part -> attribute -> value, as JSON holds it."""
    read: set[str] = field(default_factory=set)
    """The keys that some part reads."""
    unsaved: set[str] = field(default_factory=set)
    """The keys that the class of the processor decides with each call, so that saved files alone do not carry them."""
    notes: list[str] = field(default_factory=list)
    """What a user should know, one sentence each."""


def set_limits(processor: Any, limits: Mapping[str, Any]) -> Outcome:
    """Set `limits` (key of a run -> value) on the parts of `processor`, in place.

    Raises `ModelError` where a limit contradicts one that the processor has.
    """
    outcome = Outcome()
    for name, sense, part in parts_of(processor):
        if sense == "audio":
            _set_sampling_rate(processor, name, part, limits, outcome)
            continue
        for key, values in _wanted(part, sense, limits, outcome):
            for attribute, value in values.items():
                _set(processor, name, part, sense, attribute, value, key, outcome)
    sounding = limits.get("use_audio_in_video")
    if sounding is not None and hasattr(processor, "load_audio_from_video"):
        processor.load_audio_from_video = sounding
        outcome.read.add("use_audio_in_video")
        if sounding:
            outcome.unsaved.add("use_audio_in_video")
    return outcome


def parts_of(processor: Any) -> Iterator[tuple[str, str, Any]]:
    """(name of the attribute, "image", "video" or "audio", part) of all but the tokenizers."""
    from transformers import ProcessorMixin

    if not isinstance(processor, ProcessorMixin):
        return  # what AutoProcessor gives for a model of text is its tokenizer
    for name in processor.get_attributes():
        part = getattr(processor, name, None)
        senses = {"video": "video", "image": "image", "audio": "audio", "feature_extractor": "audio"}
        sense = next((sense for word, sense in senses.items() if word in name), None)
        if part is not None and sense is not None and "tokenizer" not in name:
            yield name, sense, part


def _wanted(part: Any, sense: str, limits: Mapping[str, Any], outcome: Outcome) -> Iterator[tuple[str, dict[str, Any]]]:
    """(key, attribute -> value) of what a part for images or videos reads."""
    if sense == "image":
        for key, attribute in (("image_do_pan_and_scan", "do_pan_and_scan"), ("crop_to_patches", "crop_to_patches")):
            if key in limits and hasattr(part, attribute):
                yield key, {attribute: limits[key]}
    else:
        yield from _frames(part, limits, outcome)
    lower, upper = _AREAS[sense]
    for key in (lower, upper):
        if key in limits and (area := _area(part, key, limits[key], outcome, is_upper=key == upper)):
            yield key, area
    for key, other in ((upper, lower), (lower, upper)):
        if key in outcome.read:
            _require_order(part, key, other)


def _frames(part: Any, limits: Mapping[str, Any], outcome: Outcome) -> Iterator[tuple[str, dict[str, Any]]]:
    taken = _sampling(part)
    if "video_fps" in limits and "fps" in taken:
        # Both at once are refused by most.
        fixed = {"num_frames": None} if getattr(part, "num_frames", None) is not None else {}
        yield "video_fps", {"fps": limits["video_fps"], "do_sample_frames": True, **fixed}
    if "video_maxlen" not in limits:
        return
    most = next((name for name in _FRAME_LIMITS if getattr(part, name, None) is not None), None)
    if most is None and "num_frames" in taken and getattr(part, "num_frames", None) is not None:
        most = "num_frames"
    if most is not None:
        yield "video_maxlen", {most: limits["video_maxlen"]}
        if not getattr(part, "do_sample_frames", False):
            outcome.notes.append("video_maxlen: this processor takes all frames of a video unless video_fps is given")


def _area(part: Any, key: str, num_pixels: int, outcome: Outcome, *, is_upper: bool) -> dict[str, Any]:
    """Attribute -> value that makes `num_pixels` a limit of one image or frame; empty if the part has none."""
    ends = _ends_of(part)
    attribute = ("min_pixels", "max_pixels")[is_upper]
    own = isinstance(getattr(part, attribute, None), int)
    if ends is None and not own:
        return {}
    factor = _num_frames(part, is_upper=is_upper) if _counts_frames(part) else 1
    if factor > 1 and key.startswith("video"):
        outcome.notes.append(
            f"{key}: this processor limits whole videos, so {num_pixels:,} pixels times {factor} frames are its limit"
        )
    values: dict[str, Any] = {attribute: num_pixels * factor} if own else {}
    if ends is not None:
        values["size"] = {**_size_of(part), ends[is_upper]: num_pixels * factor}
    return values


def _size_of(part: Any) -> dict[str, int]:
    return {end: value for end, value in dict(getattr(part, "size", None) or {}).items() if value is not None}


def _ends_of(part: Any) -> tuple[str, str] | None:
    """What the least and the largest area are called in `size`, None if it holds no areas."""
    size = _size_of(part)
    if {"min_pixels", "max_pixels"} <= set(size):
        return "min_pixels", "max_pixels"
    if not {"shortest_edge", "longest_edge"} <= set(size):
        return None
    usual = dict(getattr(type(part), "size", None) or {}).get("longest_edge") or 0
    takes = getattr(getattr(part, "valid_kwargs", None), "__annotations__", {})
    are_areas = max(size["longest_edge"], usual) > _LONGEST_EDGE or {"min_pixels", "max_pixels"} <= set(takes)
    return ("shortest_edge", "longest_edge") if are_areas else None


def _counts_frames(part: Any) -> bool:
    """Whether the size of a frame is chosen by the pixels of all frames together."""
    for owner in type(part).__mro__:
        choose = getattr(sys.modules.get(owner.__module__), "smart_resize", None)
        if choose is not None:
            return "num_frames" in inspect.signature(choose).parameters
    return False


def _num_frames(part: Any, *, is_upper: bool) -> int:
    """The most frames of a video for this part, or the fewest. An image is a video of `temporal_patch_size`."""
    least: int = getattr(part, "temporal_patch_size", None) or 1
    if not hasattr(part, "sample_frames"):
        return least
    if not is_upper:
        return max(least, getattr(part, "min_frames", None) or least)
    return max(least, _most_frames(part) or ProcessorConfig().video_maxlen)


def _most_frames(part: Any) -> int | None:
    names = [*_FRAME_LIMITS, *(("num_frames",) if "num_frames" in _sampling(part) else ())]
    return next((value for name in names if (value := getattr(part, name, None)) is not None), None)


def _sampling(part: Any) -> Mapping[str, inspect.Parameter]:
    """What the function that samples frames of a video takes."""
    sampler = getattr(part, "sample_frames", None)
    return inspect.signature(sampler).parameters if sampler is not None else {}


def _require_order(part: Any, key: str, other: str) -> None:
    ends, size = _ends_of(part), _size_of(part)
    low, high = (size[end] for end in ends) if ends else (part.min_pixels, part.max_pixels)
    if high < low:
        raise ModelError(
            f"{key}: the processor of this model has {low:,} pixels as its least and would have {high:,} as its most"
            f" -> give {other} too"
        )


def _set(
    processor: Any, name: str, part: Any, sense: str, attribute: str, value: Any, key: str, outcome: Outcome
) -> None:
    present = getattr(part, attribute, None)
    has_own_kind = isinstance(value, dict) and present is not None and not isinstance(present, dict)
    kind: Any = type(present)
    setattr(part, attribute, kind(**value) if has_own_kind else value)
    outcome.changes.setdefault(name, {})[attribute] = value
    outcome.read.add(key)
    _take_over(processor, sense, attribute, value, key, outcome)


def _take_over(processor: Any, sense: str, attribute: str, value: Any, key: str, outcome: Outcome) -> None:
    """A value that the class of the processor passes to the part with each call is replaced on this processor."""
    handed = getattr(processor, _HANDED_BY[sense], {})
    if attribute in handed:
        if handed[attribute] != value:
            outcome.unsaved.add(key)
        setattr(processor, _HANDED_BY[sense], {**handed, attribute: value})


def _set_sampling_rate(processor: Any, name: str, part: Any, limits: Mapping[str, Any], outcome: Outcome) -> None:
    """The part is rebuilt, since filters and window lengths come from the rate."""
    key = "audio_sampling_rate"
    present = getattr(part, "sampling_rate", None)
    if key not in limits or present is None:
        return
    outcome.read.add(key)
    if limits[key] == present:
        return
    before = part.to_dict()
    made = type(part).from_dict({**before, "sampling_rate": limits[key]})
    setattr(processor, name, made)
    outcome.changes[name] = {k: v for k, v in made.to_dict().items() if k not in before or before[k] != v}
    outcome.notes.append(f"{key}: the model was trained on audio of {present:,} samples a second, not {limits[key]:,}")
    _take_over(processor, "audio", "sampling_rate", limits[key], key, outcome)
