"""Tiny random models that see, one for each family whose processor loads without torchvision.

Each function saves a model, its processor, a byte tokenizer and a chat template in a folder, and nothing is downloaded.
Images are small, so that a block has few tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.tiny import byte_tokenizer

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": 256,
    "bos_token_id": 259,
    "eos_token_id": 258,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_TURN, _AFTER = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n",
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
)
IMAGES_FIRST = (
    _TURN + "{% for part in message.content if part.type == 'image' %}<image>\n{% endfor %}"
    "{% for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}" + _AFTER
)
"""As that of LLaVA 1.5: it writes nothing for a content that is a string, and images before the text."""


def in_order(mark: str) -> str:
    """A chat template that takes texts and parts, and writes `mark` for each image where it stands."""
    image = f"{{% if part.type == 'image' %}}{mark}{{% else %}}{{{{ part.text }}}}{{% endif %}}"
    parts = f"{{% for part in message.content %}}{image}{{% endfor %}}"
    return (
        f"{_TURN}{{% if message.content is string %}}{{{{ message.content }}}}{{% else %}}{parts}{{% endif %}}{_AFTER}"
    )


def tiny_llava(folder: Path, *, seed: int = 0) -> Path:
    """All images become 28x28 pixels, four tokens."""
    from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaProcessor

    tokenizer = media_tokenizer(image_token="<image>")
    part = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(
        image_processor=part, tokenizer=tokenizer, patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=IMAGES_FIRST,
    )  # fmt: skip
    config = LlavaConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=tokenizer.image_token_id,
        image_seq_length=4,
    )
    return saved(folder, config, processor, seed)


def tiny_llava_next(folder: Path, *, seed: int = 0) -> Path:
    """An image is seen whole in 28x28 pixels, and in tiles of this size."""
    from transformers import LlavaNextConfig, LlavaNextImageProcessorPil, LlavaNextProcessor

    tokenizer = media_tokenizer(image_token="<image>")
    grid = [[28, 56], [56, 28], [56, 56]]
    part = LlavaNextImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=grid
    )
    processor = LlavaNextProcessor(
        image_processor=part, tokenizer=tokenizer, patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=IMAGES_FIRST,
    )  # fmt: skip
    config = LlavaNextConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**VISION, "model_type": "clip_vision_model"},
        image_token_index=tokenizer.image_token_id,
        image_seq_length=4,
        image_grid_pinpoints=grid,
    )
    return saved(folder, config, processor, seed)


def tiny_paddleocr_vl(folder: Path, *, seed: int = 0) -> Path:
    """Images keep their shape; 28x28 pixels are a token. Positions have three axes."""
    from transformers import PaddleOCRVLConfig, PaddleOCRVLImageProcessorPil, PaddleOCRVLProcessor

    tokenizer = media_tokenizer(
        image_token="<|IMAGE_PLACEHOLDER|>",
        video_token="<|video_pad|>",
        vision_start_token="<|IMAGE_START|>",
        vision_end_token="<|IMAGE_END|>",
    )
    part = PaddleOCRVLImageProcessorPil(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16})
    slot = in_order("<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    processor = PaddleOCRVLProcessor(image_processor=part, tokenizer=tokenizer, chat_template=slot)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    config = PaddleOCRVLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=VISION,
        image_token_id=tokenizer.image_token_id,
        video_token_id=tokenizer.video_token_id,
        vision_start_token_id=tokenizer.vision_start_token_id,
        vision_end_token_id=tokenizer.vision_end_token_id,
    )
    return saved(folder, config, processor, seed)


def tiny_idefics3(folder: Path, *, seed: int = 0) -> Path:
    """Tiles of 28x28 pixels, one token each, with the number of row and column before them, and the whole image."""
    from transformers import Idefics3Config, Idefics3ImageProcessorPil, Idefics3Processor

    places = {f"place_{row}_{column}": f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)}
    tokenizer = media_tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
        **places,
    )
    part = Idefics3ImageProcessorPil(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = Idefics3Processor(
        image_processor=part, tokenizer=tokenizer, image_seq_len=1, chat_template=in_order("<image>")
    )
    config = Idefics3Config(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=VISION,
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        pad_token_id=256,
    )
    return saved(folder, config, processor, seed)


def tiny_gemma3(folder: Path, *, seed: int = 0) -> Path:
    """All images become 28x28 pixels, four tokens, which see each other in both directions."""
    from transformers import Gemma3Config, Gemma3ImageProcessorPil, Gemma3Processor

    tokenizer = media_tokenizer(
        boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>"
    )
    part = Gemma3ImageProcessorPil(size={"height": 28, "width": 28})
    processor = Gemma3Processor(
        image_processor=part, tokenizer=tokenizer, image_seq_length=4, chat_template=in_order("<start_of_image>")
    )
    config = Gemma3Config(
        text_config={**TEXT, "query_pre_attn_scalar": 16},
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        mm_tokens_per_image=4,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
    )
    return saved(folder, config, processor, seed)


FAMILIES: Mapping[str, Callable[..., Path]] = {
    "llava": tiny_llava,
    "llava_next": tiny_llava_next,
    "paddleocr_vl": tiny_paddleocr_vl,
    "idefics3": tiny_idefics3,
    "gemma3": tiny_gemma3,
}
"""`model_type` -> the function that saves a model of it."""


def media_tokenizer(**tokens: str):
    """The byte tokenizer with the special tokens of a model, whose answers end with <|im_end|>."""
    return byte_tokenizer(eos_token="<|im_end|>", bos_token=None, extra_special_tokens=tokens)


def draw(path: Path, *, height: int = 28, width: int = 28, seed: int = 0) -> Path:
    """An image of noise."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng([seed, height, width]).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    return path


def saved(folder: Path, config: Any, processor: Any, seed: int) -> Path:
    import torch
    from transformers import AutoModelForImageTextToText

    processor.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        AutoModelForImageTextToText.from_config(config, dtype=torch.float32).save_pretrained(folder)
    return Path(folder)


def talk(question: str, answer: str, images: Sequence[Path]) -> list[dict[str, Any]]:
    """A conversation as processors take it, the images before the question."""
    parts = [{"type": "image", "path": str(path)} for path in images]
    return [
        {"role": "user", "content": [*parts, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def row_of(processor: Any, messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of a conversation, made by the processor alone."""
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    ids = processor.apply_chat_template(messages, **options)["input_ids"][0].tolist()
    prompt = processor.apply_chat_template(messages[:-1], add_generation_prompt=True, **options)["input_ids"][0]
    paths = [part["path"] for part in messages[0]["content"] if part["type"] == "image"]
    blocks = []
    if paths:
        text = processor.apply_chat_template(messages)
        options = {"return_text_replacement_offsets": True, "return_offsets_mapping": True}
        found = processor(text=[text], images=[paths], **options)
        for piece in found["text_replacement_offsets"][0]:
            start, stop = piece["new_span"]
            places = [n for n, (a, b) in enumerate(found["offset_mapping"][0]) if start <= a < b <= stop]
            blocks += [places[0], places[-1] + 1]
    return {"input_ids": ids, "labels": [-100] * len(prompt) + ids[len(prompt) :], "images": paths, "blocks": blocks}


SHORT_RUN: dict[str, Any] = {
    "stage": "sft",
    "do_train": True,
    "finetuning_type": "full",
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
}
"""Keys of a few steps that teach a tiny model something."""
SAMPLING: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
