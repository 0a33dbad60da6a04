"""Attention kernels that need an accelerator, and models that have one and still lie in main memory."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from luthier.model.multimodal import text_part

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FLASH = {"fa2": "flash_attention_2", "fa3": "flash_attention_3"}
FLEX = "flex_attention"


def can_be_tried(base: "PreTrainedModel") -> bool:
    """Whether the attention kernel of the model runs where its weights are."""
    return base.device.type != "cpu" or text_part(base).config._attn_implementation not in (*FLASH.values(), FLEX)


@contextlib.contextmanager
def attending_anywhere(base: "PreTrainedModel") -> Iterator[None]:
    """While open, a model that cannot be tried attends without a kernel. For trials of what is behind attention."""
    text = text_part(base)
    used = text.config._attn_implementation
    if can_be_tried(base) or not text._can_set_attn_implementation():
        yield
        return
    text.set_attn_implementation("eager")
    try:
        yield
    finally:
        text.set_attn_implementation(used)
