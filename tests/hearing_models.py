"""Tiny random models that hear, and sounds for them.

The window of the real ones is 30 seconds. Here it is two seconds, so that a batch is small.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.media_models import TEXT, media_tokenizer

RATE = 16_000
WINDOW_SECONDS = 2


def tiny_qwen2_audio(folder: Path, *, seed: int = 0, text: Mapping[str, Any] | None = None) -> Path:
    """A second is 25 tokens, and a file without content of 0.02 seconds has none."""
    from transformers import Qwen2AudioConfig, Qwen2AudioProcessor, WhisperFeatureExtractor

    tokenizer = media_tokenizer(
        audio_token="<|AUDIO|>", audio_bos_token="<|audio_bos|>", audio_eos_token="<|audio_eos|>"
    )
    part = WhisperFeatureExtractor(feature_size=32, chunk_length=WINDOW_SECONDS, sampling_rate=RATE)
    processor = Qwen2AudioProcessor(feature_extractor=part, tokenizer=tokenizer, chat_template=numbered())
    config = Qwen2AudioConfig(
        text_config={**TEXT, "model_type": "qwen2", **(text or {})},
        audio_config=AUDIO,
        audio_token_index=processor.audio_token_id,
    )
    return saved(folder, config, processor, seed)


def gemma3n_without_weights(folder: Path) -> Path:
    """The config and the processor of Gemma 3n, which writes six tokens for each file here, and 188 as it is published.
    Its model needs timm."""
    from transformers import Gemma3nAudioFeatureExtractor, Gemma3nConfig, Gemma3nProcessor, SiglipImageProcessorPil

    names = {"image": "image", "boi": "image_begin", "eoi": "image_end"}
    names |= {"audio": "audio", "boa": "audio_begin", "eoa": "audio_end"}
    tokenizer = media_tokenizer(**{f"{name}_token": f"<{word}>" for name, word in names.items()})
    parts = "{% if part.type == 'audio' %}<audio>{% else %}{{ part.text }}{% endif %}"
    processor = Gemma3nProcessor(
        Gemma3nAudioFeatureExtractor(),
        SiglipImageProcessorPil(),
        tokenizer,
        chat_template=(
            "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
            "{{ message.content }}{% else %}{% for part in message.content %}"
            + parts
            + "{% endfor %}{% endif %}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
        ),
        audio_seq_length=6,
    )
    processor.save_pretrained(folder)
    Gemma3nConfig(text_config={"vocab_size": 320}, audio_soft_tokens_per_image=6).save_pretrained(folder)
    return folder


AUDIO = {
    "model_type": "qwen2_audio_encoder",
    "num_mel_bins": 32,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "max_source_positions": WINDOW_SECONDS * 50,
}


def numbered() -> str:
    """As that of Qwen2-Audio: it numbers what it hears."""
    audio = "{% set count.value = count.value + 1 %}Audio {{ count.value }}: <|audio_bos|><|AUDIO|><|audio_eos|>\n"
    parts = (
        "{% for part in message.content %}{% if part.type == 'audio' %}"
        + audio
        + "{% else %}{{ part.text }}{% endif %}"
        "{% endfor %}"
    )
    return (
        "{% set count = namespace(value=0) %}{% for message in messages %}<|im_start|>{{ message.role }}\n"
        "{% if message.content is string %}{{ message.content }}{% else %}" + parts + "{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )


FAMILIES: Mapping[str, Callable[..., Path]] = {"qwen2_audio": tiny_qwen2_audio}
"""`model_type` -> the function that saves a model of it, of those that need no torchvision."""


def tone(path: Path, *, seconds: float = 1.0, rate: int = RATE, start: float = 300.0, end: float = 600.0) -> Path:
    """A sound whose pitch goes from `start` to `end`, in Hz."""
    import soundfile

    soundfile.write(str(path), wave_of(seconds, rate, start, end), rate)
    return path


def wave_of(seconds: float, rate: int, start: float, end: float):
    import numpy as np

    times = np.arange(round(seconds * rate)) / rate
    pitch = start + (end - start) * times / (2 * seconds)
    return (0.5 * np.sin(2 * np.pi * pitch * times)).astype(np.float32)


def saved(folder: Path, config: Any, processor: Any, seed: int) -> Path:
    import torch
    from transformers import AutoModelForMultimodalLM

    processor.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForMultimodalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return Path(folder)


def talk(question: str, answer: str, files: Sequence[Path]) -> list[dict[str, Any]]:
    """A conversation as processors take it, the sounds before the question."""
    parts = [{"type": "audio", "path": str(path)} for path in files]
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
