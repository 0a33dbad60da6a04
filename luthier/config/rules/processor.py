"""Rules about the limits of images, videos and audio."""

import os
from typing import Any

from luthier.config.rules.engine import Rule, Rules, above, at_least


def _in_order(upper: str, lower: str) -> Rule:
    def is_below(run: Any) -> bool:
        return upper in run.given and lower in run.given and run.given[upper] < run.given[lower]

    return Rule((upper, lower), f"must not be below {lower}", f"raise it, or lower {lower}", is_below)


def _asks_downsample_mode(run: Any) -> bool:
    """LLaMA-Factory reads it for this model."""
    return "DOWNSAMPLE_MODE" in os.environ and run.data.template in (None, "minicpm_v_4_6")


_COUNTS = (
    *("image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels"),
    *("video_maxlen", "audio_sampling_rate"),
)
PROCESSOR_RULES = Rules(
    (
        *(at_least("processor", key, 1) for key in _COUNTS),
        above("processor", "video_fps", 0),
        _in_order("image_max_pixels", "image_min_pixels"),
        _in_order("video_max_pixels", "video_min_pixels"),
        Rule(
            ("DOWNSAMPLE_MODE",),
            "is not read: images of MiniCPM-V 4.6 have as many tokens as the files of the model say",
            "write it as `downsample_mode` into its config.json and into the files of its processor",
            _asks_downsample_mode,
            only_warns=True,
            file="environment",
        ),
    )
)
"""For every command. A limit that contradicts the model's own one is found when its processor is loaded."""
