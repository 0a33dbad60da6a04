"""transformers 5.24: every forward pass of Llama 4 with its vision part fails at its end.

It hands on `image_outputs` of what its language model returns, which has no such field.

https://github.com/huggingface/transformers/blob/v5.24.0/src/transformers/models/llama4/modeling_llama4.py
`Llama4ForConditionalGeneration.forward`
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def give_image_outputs(model: "PreTrainedModel") -> None:
    """The output of its language model has the field, without a value."""
    if type(model).__name__ == "Llama4ForConditionalGeneration":
        from transformers.modeling_outputs import MoeCausalLMOutputWithPast

        MoeCausalLMOutputWithPast.image_outputs = None
