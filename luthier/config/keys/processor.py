"""Limits of images, videos and audio. The model's own processor keeps its value for each limit that is not given.

They are set on the parts of the processor (`luthier.model.media.limits`) and saved with the weights.
"""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorConfig:
    image_max_pixels: int = 589824
    """Images with more pixels (height times width) are scaled down; the model's own limit if not given."""
    image_min_pixels: int = 1024
    """Images with fewer pixels are scaled up; the model's own limit if not given."""
    image_do_pan_and_scan: bool = False
    """Also show the model crops of long images (Gemma 3); the processor's own setting if not given."""
    crop_to_patches: bool = False
    """Cut images into tiles, plus a thumbnail (InternVL); the processor's own setting if not given."""
    video_max_pixels: int = 65536
    """Frames with more pixels (height times width) are scaled down; the model's own limit if not given."""
    video_min_pixels: int = 256
    """Frames with fewer pixels are scaled up; the model's own limit if not given."""
    video_fps: float = 2.0
    """Frames sampled per second of video; the model's own number if not given."""
    video_maxlen: int = 128
    """Most frames sampled from a video; the model's own number if not given."""
    use_audio_in_video: bool = False
    """Read the audio track of a video together with its frames (Qwen Omni)."""
    audio_sampling_rate: int = 16000
    """Audio samples per second; the model's own rate if not given."""


def given_limits(run: Any) -> dict[str, Any]:
    """Key -> value of those limits that the user gave."""
    names = (field.name for field in fields(ProcessorConfig))
    return {name: run.given[name] for name in names if name in run.given}
