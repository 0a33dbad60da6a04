"""Low-rank adapters, W + (alpha / r) B A, through peft (https://arxiv.org/abs/2106.09685)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from luthier.config.fields import no_effect, refused
from luthier.core.errors import ModelError
from luthier.model.adapters import Adapter
from luthier.model.embeddings import embedding_names
from luthier.model.merge import GivenAdapters, attach_adapter, merge_adapters
from luthier.model.modules import require_modules

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel
from luthier.config.rules import Rules, at_least, within


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    lora_rank: int = 8
    """Rank r of the update B A."""
    lora_alpha: int | None = None
    """Scale of the update is alpha / r; unset means 2 r."""
    lora_dropout: float = 0.0
    """Dropout on the input of A while training."""
    lora_target: tuple[str, ...] = ("all",)
    """Names of the modules that get an adapter, or `all` for every linear layer but the output head."""
    additional_target: tuple[str, ...] = ()
    """Modules trained in full beside the adapter and saved with it (peft's modules_to_save)."""
    create_new_adapter: bool = False
    """Merge the adapters given by `adapter_name_or_path` and train a fresh one."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r) instead of alpha / r (https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = False
    """Weight-decomposed LoRA (https://arxiv.org/abs/2402.09353)."""
    pissa_init: bool = refused(False, "PiSSA is not part of this version", "leave it out: LoRA starts from B = 0")
    """Start from the principal singular vectors of the weight (https://arxiv.org/abs/2404.02948)."""
    pissa_iter: int = no_effect(16, "read together with pissa_init only")
    """Iterations of the fast SVD of PiSSA; -1 takes the exact SVD."""
    pissa_convert: bool = refused(False, "PiSSA is not part of this version", "leave it out")
    """Turn a PiSSA adapter into a plain LoRA adapter at the end."""
    loraplus_lr_ratio: float | None = refused(None, "LoRA+ is not part of this version", "leave it out")
    """Learning rate of B divided by that of A (https://arxiv.org/abs/2402.12354)."""
    loraplus_lr_embedding: float = no_effect(1e-6, "read together with loraplus_lr_ratio only")
    """Learning rate of embedding adapters under LoRA+."""


RULES = Rules(
    (
        at_least("adapter", "lora_rank", 1),
        at_least("adapter", "lora_alpha", 1),
        within("adapter", "lora_dropout", 0, 1, or_high=False),
    )
)


def apply(
    model: "PreTrainedModel",
    config: LoraConfig,
    *,
    given: GivenAdapters,
    train_embeddings: bool,
    pure_bf16: bool,
) -> "PeftModel":
    """Freeze the model and put a trainable adapter on it.

    Of the `given` adapters all but the last are merged and the last is trained on; with `create_new_adapter` all are
    merged and a fresh one is trained. `train_embeddings`: the embedding has new rows, so it learns too.
    Raises `ModelError` for names that no module has and for adapters that do not fit.
    """
    import peft

    if given and not config.create_new_adapter:
        model = merge_adapters(model, given.names[:-1], given)
        return attach_adapter(model, given.names[-1], given, is_trainable=True, pure_bf16=pure_bf16)
    model = merge_adapters(model, given.names, given)
    saved = require_modules(model, config.additional_target, "additional_target")
    if train_embeddings and not saved:
        saved = tuple(dict.fromkeys(name.rpartition(".")[2] for name in embedding_names(model)))
    settings = peft.LoraConfig(
        task_type=peft.TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else peft.TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(target_modules(model, config.lora_target)),
        modules_to_save=list(saved) or None,
        ensure_weight_tying=bool(saved) and model.config.tie_word_embeddings,
        fan_in_fan_out=_stores_transposed(model),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )
    try:
        return peft.get_peft_model(model, settings, autocast_adapter_dtype=not pure_bf16)
    except ValueError as fault:  # e.g. a target that is a whole block, not a layer of weights
        raise ModelError(
            f"lora_target: {', '.join(config.lora_target)}: peft cannot adapt these modules of {type(model).__name__} "
            f"({str(fault).splitlines()[0]}) -> name linear layers, or all"
        ) from fault


def target_modules(model: "PreTrainedModel", wanted: Sequence[str]) -> tuple[str, ...]:
    """The names peft is given for `lora_target`. Raises `ModelError` for a name that no module ends in."""
    if "all" in wanted:
        return _all_linear(model)
    return require_modules(model, wanted, "lora_target")


def _all_linear(model: "PreTrainedModel") -> tuple[str, ...]:
    """Every linear layer but the output head: by last name, or by full name where others share that last name."""
    import torch
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    full, others = [], set()
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, Conv1D)) and module is not head:
            full.append(name)
        else:
            others.add(name.rpartition(".")[2])
    short = {name.rpartition(".")[2] for name in full}
    if short & others or any(name.isdecimal() for name in short):
        return tuple(full)
    return tuple(sorted(short))


def _stores_transposed(model: "PreTrainedModel") -> bool:
    """GPT-2 keeps its weights as (in, out); peft has to be told."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


ADAPTER = Adapter(name="lora", config=LoraConfig, apply=apply, adds_weights=True, check=RULES)
