"""Processors of transformers with the byte tokenizer in them, saved as in the folder of a model."""

import json
from pathlib import Path
from typing import Any

from tests.tiny import byte_tokenizer

ROLES = {
    "image_token": "<image>",
    "video_token": "<video>",
    "audio_token": "<audio>",
    "audio_bos_token": "<sound>",
    "audio_eos_token": "</sound>",
    "boi_token": "<boi>",
    "eoi_token": "<eoi>",
    "start_image_token": "<img>",
    "end_image_token": "</img>",
    "context_image_token": "<context>",
}


def media_tokenizer():
    """The byte tokenizer with the tokens that processors ask for."""
    return byte_tokenizer(extra_special_tokens=ROLES)


def save_processor(folder: Path, kind: str, **parts: Any) -> Path:
    """The processor of the class `kind`, made of `parts` and a tokenizer, in the layout of transformers 5."""
    import transformers

    getattr(transformers, kind)(tokenizer=media_tokenizer(), **parts).save_pretrained(folder)
    return folder


def areas(folder: Path) -> Path:
    """One whose pictures are patches of 14 by 14 pixels, four of them a token, and areas are limited (PaddleOCR-VL)."""
    from transformers import PaddleOCRVLImageProcessorPil

    return save_processor(folder, "PaddleOCRVLProcessor", image_processor=PaddleOCRVLImageProcessorPil())


def fixed(folder: Path) -> Path:
    """One that makes all pictures the same size (LLaVA)."""
    from transformers import CLIPImageProcessorPil

    return save_processor(folder, "LlavaProcessor", image_processor=CLIPImageProcessorPil(), patch_size=14)


def as_two_files(folder: Path) -> None:
    """From the layout of transformers 5 to the former one, with `min_pixels` and `max_pixels` for the area."""
    whole = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").unlink()
    part = whole["image_processor"] | {"processor_class": whole["processor_class"]}
    size = part["size"]
    part |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(part))


def picture(height: int, width: int):
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8))
