"""Models whose output head is their embedding, and adapters that change one of the two uses.

LoRA on the embedding of such a model changes what goes in and leaves what comes out. Beside the weights that is so; but
merged into the one matrix it would change both. So before a merge the head gets a matrix of its own, and the merged
model says in its config that it has two.
"""

from typing import TYPE_CHECKING, Any

from luthier.core.log import info
from luthier.model.modules import unwrap

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import nn
    from transformers import PreTrainedModel


def untie_adapted(adapted: "PeftModel") -> None:
    """Before a merge: the head gets a matrix of its own if an adapter is on it or on the embedding."""
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    base = unwrap(adapted)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is None or not any(isinstance(end, BaseTunerLayer) for end in (embedding, head)):
        return
    source, target = _original(embedding), _original(head)
    if target.weight is source.weight:
        target.weight = torch.nn.Parameter(source.weight.detach().clone(), requires_grad=False)
        _say_untied(base)
        info("the output head of the model is its embedding; the adapter changes one use of it, so each gets its own")


def settle_ties(model: "PreTrainedModel") -> None:
    """After a merge: the config, and what transformers saves, say whether the head is the embedding.

    An adapter may bring a matrix of its own for each.
    """
    embedding: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()
    if head is not None and model.all_tied_weights_keys and head.weight is not embedding.weight:
        _say_untied(model)


def _say_untied(model: "PreTrainedModel") -> None:
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = False
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _original(module: "nn.Module") -> Any:
    """The layer below an adapter of peft."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    return module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else module
