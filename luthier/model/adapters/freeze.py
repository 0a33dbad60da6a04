"""Train a few whole layers and leave the rest as it is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.config.rules.engine import Rule, Rules, is_set, not_, warning
from luthier.core.log import warn
from luthier.model.adapters import Adapter
from luthier.model.adapters._merge import GivenAdapters
from luthier.model.classes import gives_scores
from luthier.model.embeddings import NewRows, NewTokens, embedding_names
from luthier.model.heads.score_head import SCORE_LAYER
from luthier.model.llama_pro import inserted_layers
from luthier.model.modules import layer_list, unknown_module
from luthier.model.multimodal import find_parts, freeze_parts, in_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeConfig:
    freeze_trainable_layers: int = 2
    """Number of layers to train: the last n if positive, the first n if negative; with use_llama_pro the inserted n."""
    freeze_trainable_modules: tuple[str, ...] = ("all",)
    """Names of the modules to train inside those layers, or `all`."""
    freeze_extra_modules: tuple[str, ...] = ()
    """Names of modules to train outside the layers, e.g. `lm_head`."""
    use_llama_pro: bool = False
    """Train the blocks that `luthier expand` inserted; freeze_trainable_layers is their number (LLaMA Pro)."""


RULES = Rules(
    (
        Rule(
            ("freeze_trainable_layers", "freeze_extra_modules"),
            "leaves nothing to train",
            "give a number other than 0, or freeze_extra_modules",
            lambda run: run.adapter.freeze_trainable_layers == 0 and not run.adapter.freeze_extra_modules,
        ),
        Rule(
            ("freeze_trainable_layers", "use_llama_pro"),
            "is the number of inserted blocks if use_llama_pro is on, so it must be above 0",
            "give the number that `luthier expand` was given",
            lambda run: run.adapter.use_llama_pro and run.adapter.freeze_trainable_layers < 1,
        ),
        warning(
            ("freeze_vision_tower", "finetuning_type"),
            "finetuning_type: freeze trains layers of the language model, and the towers stay frozen",
            "name their modules in freeze_extra_modules, or use finetuning_type: full or lora",
            not_(is_set("finetuning", "freeze_vision_tower")),
        ),
    )
)


def apply(
    model: "PreTrainedModel",
    config: FreezeConfig,
    *,
    given: GivenAdapters,
    new_tokens: NewTokens | None = None,
    pure_bf16: bool,
    frozen: Sequence[str] = (),
    original: "Callable[[], PreTrainedModel] | None" = None,
) -> "PreTrainedModel":
    """Freeze the model but for the chosen layers and modules, and a projector that is not in `frozen`.

    A score layer is always trained, and so are the embedding and the head if there are `new_tokens`. Raises
    `ModelError` for names that no module has, or if nothing is trainable.
    """
    rows = new_tokens.give_rows(model) if new_tokens else NewRows()
    name, layers = layer_list(model)
    choose = inserted_layers if config.use_llama_pro else layers_to_train
    chosen = choose(len(layers), config.freeze_trainable_layers)
    inside = {n for n, _ in layers.named_parameters()}
    outside = {n for n, _ in model.named_modules() if n and not n.startswith(f"{name}.") and not name.startswith(n)}
    everything = "all" in config.freeze_trainable_modules
    for word in () if everything else config.freeze_trainable_modules:
        if not any(word in n.split(".")[1:-1] for n in inside):
            raise unknown_module(
                word, (part for n in inside for part in n.split(".")[1:-1]), "freeze_trainable_modules"
            )
    for word in config.freeze_extra_modules:
        if not any(word in n.split(".") for n in outside):
            raise unknown_module(word, (n.rpartition(".")[2] for n in outside), "freeze_extra_modules")
    model.requires_grad_(False)
    for index in chosen:
        for n, weight in layers[index].named_parameters():
            weight.requires_grad_(everything or bool(set(config.freeze_trainable_modules) & set(n.split(".")[:-1])))
    extra = {*config.freeze_extra_modules, *([SCORE_LAYER] if gives_scores(model.config) else ())}
    if rows:
        extra.update(embedding_names(model))
    for n in outside:
        if n in extra or extra & set(n.split(".")):
            model.get_submodule(n).requires_grad_(True)
    projector = find_parts(model).projector
    for n, weight in model.named_parameters():
        if in_parts(n, projector):
            weight.requires_grad_(True)
    freeze_parts(model, [part for part in frozen if part not in extra])
    return model


ADAPTER = Adapter(name="freeze", config=FreezeConfig, apply=apply, check=RULES)


def layers_to_train(num_layers: int, wanted: int) -> range:
    """The last `wanted` layers, or the first -`wanted`."""
    if abs(wanted) > num_layers:
        warn(f"freeze_trainable_layers: {wanted}: this model has {num_layers} layers, and all of them are trained")
    return range(max(0, num_layers - wanted), num_layers) if wanted > 0 else range(min(-wanted, num_layers))
