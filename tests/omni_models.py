"""Tiny random models that take several kinds of media. They need torchvision; without it, a test of one is skipped."""

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from tests.hearing_models import RATE, saved
from tests.media_models import TEXT, media_tokenizer
from tests.torchvision_models import FAMILIES as SEEING

_OMNI = {
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "audio_token": "<|AUDIO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}


def in_order(**marks: str) -> str:
    """A chat template that writes each part where it stands: the mark of its `type`, or its text."""
    parts = "".join(f"{{% elif part.type == '{name}' %}}{mark}" for name, mark in marks.items())
    return (
        "{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
        "{% if part.type == 'text' %}{{ part.text }}" + parts + "{% endif %}{% endfor %}{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


def tiny_qwen2_5_omni(folder: Path, *, seed: int = 0) -> Path:
    """The thinker: images, videos and audio with positions on three axes. It hears two seconds."""
    from transformers import (
        Qwen2_5OmniProcessor,
        Qwen2_5OmniThinkerConfig,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
        WhisperFeatureExtractor,
    )

    tokenizer = media_tokenizer(**_OMNI)
    size = {"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16}
    processor = Qwen2_5OmniProcessor(
        Qwen2VLImageProcessor(size=size),
        Qwen2VLVideoProcessor(size=size),
        WhisperFeatureExtractor(feature_size=32, chunk_length=2, sampling_rate=RATE),
        tokenizer,
        chat_template=in_order(
            image="<|vision_bos|><|IMAGE|><|vision_eos|>",
            video="<|vision_bos|><|VIDEO|><|vision_eos|>",
            audio="<|audio_bos|><|AUDIO|><|audio_eos|>",
        ),
    )
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    audio = {"num_mel_bins": 32, "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2,
             "encoder_ffn_dim": 64, "max_source_positions": 100, "n_window": 50, "output_dim": 64}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = Qwen2_5OmniThinkerConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config={**vision, "window_size": 56, "fullatt_block_indexes": [1]},
        audio_config=audio,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        audio_token_id=tokenizer.audio_token_id,
        audio_start_token_id=tokenizer.audio_bos_token_id,
        audio_end_token_id=tokenizer.audio_eos_token_id,
        vision_start_token_id=tokenizer.vision_bos_token_id,
    )
    return saved(folder, config, processor, seed)


def _with_torchvision(make: Callable[..., Path]) -> Callable[..., Path]:
    def made(folder: Path, *, seed: int = 0) -> Path:
        pytest.importorskip("torchvision")
        return make(folder, seed=seed)

    return made


FAMILIES: Mapping[str, Callable[..., Path]] = {**SEEING, "qwen2_5_omni": _with_torchvision(tiny_qwen2_5_omni)}
"""Family -> the function that saves a model of it."""
