"""Keys of models that see and hear. Rows with media are refused where they are read; these keys only set them up."""

from dataclasses import dataclass

from luthier.config.fields import no_effect

_TEXT = "this version reads text only"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorConfig:
    image_max_pixels: int = no_effect(589824, _TEXT)
    """Pictures with more pixels are scaled down."""
    image_min_pixels: int = no_effect(1024, _TEXT)
    """Pictures with fewer pixels are scaled up."""
    image_do_pan_and_scan: bool = no_effect(False, _TEXT)
    """Cut long pictures into several (Gemma 3)."""
    crop_to_patches: bool = no_effect(False, _TEXT)
    """Cut pictures into tiles (InternVL)."""
    video_max_pixels: int = no_effect(65536, _TEXT)
    """Frames with more pixels are scaled down."""
    video_min_pixels: int = no_effect(256, _TEXT)
    """Frames with fewer pixels are scaled up."""
    video_fps: float = no_effect(2.0, _TEXT)
    """Frames taken per second of film."""
    video_maxlen: int = no_effect(128, _TEXT)
    """Most frames taken of a film."""
    use_audio_in_video: bool = no_effect(False, _TEXT)
    """Read the sound of a film together with its frames."""
    audio_sampling_rate: int = no_effect(16000, _TEXT)
    """Samples of sound per second."""
