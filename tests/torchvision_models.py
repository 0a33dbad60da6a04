"""Tiny random models of the families whose processor needs torchvision; without it, who asks for one is skipped.

As in `tests.media_models`, each function saves a model, its processor, a byte tokenizer and a chat template.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.media_models import FAMILIES as PLAIN_FAMILIES
from tests.media_models import TEXT, VISION, in_order, media_tokenizer, saved

_QWEN_TOKENS = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}
_QWEN_SLOT = in_order("<|vision_start|><|image_pad|><|vision_end|>")
_THREE_AXES = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
_PIXTRAL_TOKENS = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
_PIXTRAL_VISION = {**VISION, "model_type": "pixtral", "image_size": 112}
_GRID = [[28, 56], [56, 28], [56, 56]]


def tiny_qwen2_vl(folder: Path, *, seed: int = 0) -> Path:
    """Images keep their shape; 28x28 pixels are a token. Positions have three axes."""
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    tokenizer = media_tokenizer(**_QWEN_TOKENS)
    part = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16})
    processor = Qwen2VLProcessor(part, tokenizer, Qwen2VLVideoProcessor(), chat_template=_QWEN_SLOT)
    config = Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": _THREE_AXES},
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
        **_qwen_ids(tokenizer),
    )
    return saved(folder, config, processor, seed)


def tiny_qwen2_5_vl(folder: Path, *, seed: int = 0) -> Path:
    """As Qwen2-VL; the first layer of its tower sees windows of 56x56 pixels."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLProcessor, Qwen2VLImageProcessor, Qwen2VLVideoProcessor

    tokenizer = media_tokenizer(**_QWEN_TOKENS)
    part = Qwen2VLImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16})
    processor = Qwen2_5_VLProcessor(part, tokenizer, Qwen2VLVideoProcessor(), chat_template=_QWEN_SLOT)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_parameters": _THREE_AXES},
        vision_config={**vision, "window_size": 56, "fullatt_block_indexes": [1]},
        **_qwen_ids(tokenizer),
    )
    return saved(folder, config, processor, seed)


def tiny_qwen3_vl(folder: Path, *, seed: int = 0) -> Path:
    """32x32 pixels are a token. What its tower sees in layer 0 is also added to layer 0 of the language model."""
    from transformers import Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLProcessor, Qwen3VLVideoProcessor

    tokenizer = media_tokenizer(**_QWEN_TOKENS)
    part = Qwen2VLImageProcessor(size={"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 16}, patch_size=16)
    processor = Qwen3VLProcessor(part, tokenizer, Qwen3VLVideoProcessor(), chat_template=_QWEN_SLOT)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    config = Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": {**_THREE_AXES, "mrope_interleaved": True}},
        vision_config={**vision, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        **_qwen_ids(tokenizer),
    )
    return saved(folder, config, processor, seed)


def tiny_glm4v(folder: Path, *, seed: int = 0) -> Path:
    """Images keep their shape; 28x28 pixels are a token. Videos are written with the token of images."""
    from transformers import Glm4vConfig, Glm4vImageProcessor, Glm4vProcessor, Glm4vVideoProcessor

    tokenizer = media_tokenizer(
        image_token="<|image|>",
        video_token="<|video|>",
        image_start_token="<|begin_of_image|>",
        image_end_token="<|end_of_image|>",
        video_start_token="<|begin_of_video|>",
        video_end_token="<|end_of_video|>",
    )
    part = Glm4vImageProcessor(size={"shortest_edge": 28 * 28, "longest_edge": 28 * 28 * 16 * 2})
    slot = in_order("<|begin_of_image|><|image|><|end_of_image|>")
    processor = Glm4vProcessor(part, tokenizer, Glm4vVideoProcessor(), chat_template=slot)
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64}
    config = Glm4vConfig(
        text_config={**TEXT, "rope_parameters": _THREE_AXES},
        vision_config={**vision, "image_size": 56, "patch_size": 14},
        **{name: getattr(tokenizer, name) for name in ("image_token_id", "video_token_id")},
        **{f"{kind}_{end}_token_id": getattr(tokenizer, f"{kind}_{end}_token_id")
           for kind in ("image", "video") for end in ("start", "end")},
    )  # fmt: skip
    return saved(folder, config, processor, seed)


def tiny_pixtral(folder: Path, *, seed: int = 0) -> Path:
    """LLaVA with the tower of Pixtral: images keep their shape, 14x14 pixels are a token, and rows end in a break."""
    from transformers import LlavaConfig

    tokenizer = media_tokenizer(**_PIXTRAL_TOKENS)
    config = LlavaConfig(
        text_config={**TEXT, "model_type": "mistral"},
        vision_config=_PIXTRAL_VISION,
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return saved(folder, config, _pixtral_processor(tokenizer, longest_edge=56, merge=1), seed)


def tiny_mistral3(folder: Path, *, seed: int = 0) -> Path:
    """As Pixtral, where 2x2 patches become one token."""
    from transformers import Mistral3Config

    tokenizer = media_tokenizer(**_PIXTRAL_TOKENS)
    config = Mistral3Config(
        text_config={**TEXT, "model_type": "mistral"},
        vision_config=_PIXTRAL_VISION,
        image_token_index=tokenizer.image_token_id,
        spatial_merge_size=2,
        tie_word_embeddings=False,
    )
    return saved(folder, config, _pixtral_processor(tokenizer, longest_edge=112, merge=2), seed)


def tiny_llava_onevision(folder: Path, *, seed: int = 0) -> Path:
    """A single image is seen whole and in tiles of 28x28 pixels, one of several images only whole."""
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    tokenizer = media_tokenizer(image_token="<image>", video_token="<video>")
    part = LlavaOnevisionImageProcessor(size={"height": 28, "width": 28}, image_grid_pinpoints=_GRID)
    processor = LlavaOnevisionProcessor(
        part, tokenizer, LlavaOnevisionVideoProcessor(), num_image_tokens=4, vision_feature_select_strategy="full",
        chat_template=in_order("<image>"),
    )  # fmt: skip
    config = LlavaOnevisionConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**VISION, "model_type": "siglip_vision_model", "vision_use_head": False},
        image_token_index=tokenizer.image_token_id,
        video_token_index=tokenizer.video_token_id,
        image_grid_pinpoints=_GRID,
    )
    return saved(folder, config, processor, seed)


def tiny_smolvlm(folder: Path, *, seed: int = 0) -> Path:
    """As Idefics3. Its processor also needs num2words."""
    pytest.importorskip("num2words")
    from transformers import SmolVLMConfig, SmolVLMImageProcessor, SmolVLMProcessor, SmolVLMVideoProcessor

    places = {f"place_{row}_{column}": f"<row_{row}_col_{column}>" for row in range(1, 4) for column in range(1, 4)}
    tokenizer = media_tokenizer(
        image_token="<image>",
        fake_image_token="<fake_token_around_image>",
        global_image_token="<global-img>",
        end_of_utterance_token="<end_of_utterance>",
        **places,
    )
    part = SmolVLMImageProcessor(size={"longest_edge": 56}, max_image_size={"longest_edge": 28})
    processor = SmolVLMProcessor(
        part, tokenizer, SmolVLMVideoProcessor(), image_seq_len=1, chat_template=in_order("<image>")
    )
    config = SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama"},
        vision_config=VISION,
        image_token_id=tokenizer.image_token_id,
        scale_factor=2,
        pad_token_id=256,
    )
    return saved(folder, config, processor, seed)


def tiny_gemma4(folder: Path, *, seed: int = 0) -> Path:
    """Images keep their shape and become at most 70 tokens, the fewest that its processor allows."""
    from transformers import (
        Gemma4AudioFeatureExtractor,
        Gemma4Config,
        Gemma4ImageProcessor,
        Gemma4Processor,
        Gemma4VideoProcessor,
    )

    names = {"image": "image", "boi": "image_begin", "eoi": "image_end"}
    names |= {"audio": "audio", "boa": "audio_begin", "eoa": "audio_end"}
    tokenizer = media_tokenizer(**{f"{name}_token": f"<|{word}|>" for name, word in names.items()})
    part = Gemma4ImageProcessor(max_soft_tokens=70, patch_size=4)
    processor = Gemma4Processor(
        Gemma4AudioFeatureExtractor(), part, tokenizer, Gemma4VideoProcessor(), chat_template=in_order("<|image|>")
    )
    layers = {"layer_types": ["sliding_attention", "full_attention"], "global_head_dim": 16}
    per_layer = {"vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8}
    config = Gemma4Config(
        text_config={**TEXT, **layers, **per_layer},
        vision_config={**VISION, "num_key_value_heads": 2, "head_dim": 16, "patch_size": 4,
                       "position_embedding_size": 256},
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("image", "boi", "eoi", "audio")},
        video_token_id=processor.video_token_id,
        boa_token_id=tokenizer.boa_token_id,
        eoa_token_index=tokenizer.eoa_token_id,
    )  # fmt: skip
    return saved(folder, config, processor, seed)


def tiny_internvl(folder: Path, *, seed: int = 0) -> Path:
    """Tiles of 28x28 pixels, four tokens each, and the whole image behind them."""
    from transformers import GotOcr2ImageProcessor, InternVLConfig, InternVLProcessor, InternVLVideoProcessor

    tokenizer = media_tokenizer(
        start_image_token="<img>",
        end_image_token="</img>",
        context_image_token="<IMG_CONTEXT>",
        video_token="<video>",
    )
    part = GotOcr2ImageProcessor(size={"height": 28, "width": 28}, min_patches=1, max_patches=4)
    processor = InternVLProcessor(
        part, tokenizer, InternVLVideoProcessor(), image_seq_length=4, chat_template=in_order("<IMG_CONTEXT>")
    )
    config = InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2"},
        vision_config={**VISION, "image_size": [28, 28], "patch_size": [7, 7]},
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    return saved(folder, config, processor, seed)


def tiny_lfm2_vl(folder: Path, *, seed: int = 0) -> Path:
    """Images keep their shape, 32x32 pixels are a token; large ones are cut into tiles. One layer is a convolution."""
    from transformers import Lfm2VlConfig, Lfm2VlImageProcessor, Lfm2VlProcessor

    places = {
        f"place_{row}_{column}": f"<|img_row_{row}_col_{column}|>" for row in range(1, 5) for column in range(1, 5)
    }
    tokenizer = media_tokenizer(
        image_token="<image>",
        image_start_token="<|image_start|>",
        image_end_token="<|image_end|>",
        image_thumbnail_token="<|img_thumbnail|>",
        **places,
    )
    part = Lfm2VlImageProcessor(min_image_tokens=1, max_image_tokens=4, max_tiles=4, tile_size=64)
    processor = Lfm2VlProcessor(part, tokenizer, chat_template=in_order("<image>"))
    layers = {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False}
    config = Lfm2VlConfig(
        text_config={**TEXT, "model_type": "lfm2", **layers},
        vision_config={**VISION, "model_type": "siglip2_vision_model", "patch_size": 16, "num_patches": 16,
                       "vision_use_head": False},
        image_token_id=tokenizer.image_token_id,
        projector_hidden_size=64,
        tie_word_embeddings=False,
    )  # fmt: skip
    return saved(folder, config, processor, seed)


def tiny_llama4(folder: Path, *, seed: int = 0) -> Path:
    """Tiles of 28x28 pixels, four tokens each, and the whole image behind them; its mark stands inside the block. The
    processor makes pixels in bfloat16."""
    from transformers import Llama4Config, Llama4ImageProcessor, Llama4Processor

    tokenizer = media_tokenizer(
        image_token="<|image|>",
        start_token="<|image_start|>",
        end_token="<|image_end|>",
        patch_token="<|patch|>",
        tile_x_token="<|tile_x_separator|>",
        tile_y_token="<|tile_y_separator|>",
    )
    part = Llama4ImageProcessor(size={"height": 28, "width": 28}, max_patches=4)
    processor = Llama4Processor(part, tokenizer, patch_size=7, chat_template=in_order("<|image|>"))
    text = {"intermediate_size_mlp": 96, "num_local_experts": 2, "interleave_moe_layer_step": 2}
    vision = {"intermediate_size": 128, "projector_input_dim": 64, "projector_output_dim": 64, "vision_output_dim": 64}
    config = Llama4Config(
        text_config={**TEXT, **text},
        vision_config={**VISION, **vision, "patch_size": 7},
        image_token_index=tokenizer.patch_token_id,
        boi_token_index=tokenizer.start_token_id,
        eoi_token_index=tokenizer.end_token_id,
    )
    return saved(folder, config, processor, seed)


def _qwen_ids(tokenizer: Any) -> dict[str, int]:
    return {f"{name}_id": getattr(tokenizer, f"{name}_id") for name in _QWEN_TOKENS}


def _pixtral_processor(tokenizer: Any, *, longest_edge: int, merge: int) -> Any:
    from transformers import PixtralImageProcessor, PixtralProcessor

    part = PixtralImageProcessor(size={"longest_edge": longest_edge}, patch_size=14 * merge)
    return PixtralProcessor(
        part, tokenizer, patch_size=14, spatial_merge_size=merge, chat_template=in_order("[IMG]"), **_PIXTRAL_TOKENS
    )


def _with_torchvision(make: Callable[..., Path]) -> Callable[..., Path]:
    def made(folder: Path, *, seed: int = 0) -> Path:
        pytest.importorskip("torchvision")
        return make(folder, seed=seed)

    return made


_MAKERS = (
    *(tiny_qwen2_vl, tiny_qwen2_5_vl, tiny_qwen3_vl, tiny_glm4v, tiny_pixtral, tiny_mistral3, tiny_llava_onevision),
    *(tiny_smolvlm, tiny_gemma4, tiny_internvl, tiny_lfm2_vl, tiny_llama4),
)
FAMILIES: Mapping[str, Callable[..., Path]] = {
    **PLAIN_FAMILIES,
    **{make.__name__.removeprefix("tiny_"): _with_torchvision(make) for make in _MAKERS},
}
"""Family -> the function that saves a model of it: those of `tests.media_models`, and those that need torchvision."""
