"""Low-rank adapters, W + (alpha / r) B A, through peft (https://arxiv.org/abs/2106.09685)."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier.config.keys.fields import never_unread
from luthier.config.keys.sharding import shards_weights
from luthier.config.rules.engine import (
    Rule,
    Rules,
    When,
    all_of,
    at_least,
    is_changed,
    is_given,
    is_set,
    not_,
    warning,
    within,
)
from luthier.core.errors import ModelError
from luthier.core.kinds import STAGES
from luthier.core.log import info, warn
from luthier.model.adapters import Adapter
from luthier.model.adapters._loftq import start_from_quantization_error
from luthier.model.adapters._merge import GivenAdapters, continue_adapter, merge_adapters
from luthier.model.adapters._new_adapter import NEW_ADAPTER_RULES, common_settings, start_adapter
from luthier.model.adapters._new_rows import add_rows
from luthier.model.adapters._pissa import start_from_principal_parts
from luthier.model.adapters._targets import Targets, find_targets, targets_inside
from luthier.model.adapters._ties import untie_adapted
from luthier.model.embeddings import NewRows, NewTokens
from luthier.model.llama_pro import inserted_blocks

if TYPE_CHECKING:
    import peft
    from peft import PeftModel
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    lora_rank: int = 8
    """Rank r of the update B A."""
    lora_alpha: int | None = None
    """Scale of the update is alpha / r; unset means 2 r."""
    lora_dropout: float = 0.0
    """Dropout on the input of A while training."""
    lora_target: tuple[str, ...] = ("all",)
    """Names of the modules that get an adapter, or `all` for every linear layer and expert but not the output head."""
    additional_target: tuple[str, ...] = ()
    """Modules trained in full beside the adapter and saved with it (peft's modules_to_save)."""
    create_new_adapter: bool = False
    """Merge the adapters given by `adapter_name_or_path` and train a fresh one."""
    use_rslora: bool = never_unread(False)
    """Scale by alpha / sqrt(r) instead of alpha / r (https://arxiv.org/abs/2312.03732)."""
    use_dora: bool = never_unread(False)
    """Weight-decomposed LoRA (https://arxiv.org/abs/2402.09353)."""
    use_llama_pro: bool = False
    """Put adapters only on the blocks that `luthier expand` inserted (LLaMA Pro, https://arxiv.org/abs/2401.02415)."""
    freeze_trainable_layers: int = 2
    """With use_llama_pro: how many blocks were inserted."""
    pissa_init: bool = never_unread(False)
    """Start from the principal singular vectors of the weight (https://arxiv.org/abs/2404.02948)."""
    pissa_iter: int = 16
    """Iterations of the fast SVD of PiSSA; -1 takes the exact SVD."""
    pissa_convert: bool = False
    """Copy the adapter to `output_dir`/pissa_converted too; what PiSSA saves is a plain LoRA adapter in any case."""
    loftq_init: bool = never_unread(False)
    """Start from the error of quantization instead of from zero (LoftQ, https://arxiv.org/abs/2310.08659)."""


def _has_reference(run: Any) -> bool:
    return any(spec.key == "ref_model" for spec in STAGES.get(run.stage).frozen_models(run))


_with_pissa = When(is_set("adapter", "pissa_init"))
_with_loftq = When(is_set("adapter", "loftq_init"))

RULES = Rules(
    (
        at_least("adapter", "lora_rank", 1),
        at_least("adapter", "lora_alpha", 1),
        *NEW_ADAPTER_RULES,
        within("adapter", "lora_dropout", 0, 1, or_high=False),
        _with_pissa.refuses(
            ("pissa_init", "quantization_bit"),
            "takes a part out of the weights, which quantized weights cannot give",
            "leave one of the two out",
            is_given("quantization", "quantization_bit"),
        ),
        _with_pissa.refuses(
            ("pissa_init", "use_dora"),
            "and DoRA both change what a weight is before training, and only one of them can be undone",
            "leave one of the two out",
            is_set("adapter", "use_dora"),
        ),
        _with_pissa.refuses(
            ("pissa_init", "stage"),
            "takes a part out of the model that this stage needs as its reference",
            "leave it out; of stage: dpo, pref_loss: orpo and simpo have no reference, and neither has grpo_beta: 0",
            _has_reference,
        ),
        _with_pissa.refuses(
            ("pissa_init", "fsdp", "deepspeed"),
            "has to see whole weights, and each process would hold a part of them only",
            "leave it out, or train without FSDP and ZeRO-3",
            shards_weights,
        ),
        Rule(
            ("pissa_iter", "pissa_init"),
            "must be -1 for the exact decomposition, or at least 0",
            "",
            lambda run: run.adapter.pissa_iter < -1,
        ),
        _with_loftq.refuses(
            ("loftq_init", "quantization_bit"),
            "starts from the error of quantization, and nothing is quantized here",
            "set quantization_bit: 4, or leave it out",
            not_(is_given("quantization", "quantization_bit")),
        ),
        _with_loftq.refuses(
            ("loftq_init", "use_dora"),
            "changes the direction that DoRA starts from",
            "leave one of the two out",
            is_set("adapter", "use_dora"),
        ),
        *(
            warning(
                (key, "pissa_init"),
                "is read only if pissa_init is on",
                "set pissa_init: true, or leave it out",
                all_of(is_changed(key), not_(is_set("adapter", "pissa_init"))),
            )
            for key in ("pissa_iter", "pissa_convert")
        ),
        *(
            warning(
                (key, "adapter_name_or_path"),
                "is not read here, since training continues the given adapter with the settings in its own config",
                "leave it out, or set create_new_adapter: true, which merges that adapter and starts a new one",
                all_of(
                    is_changed(key),
                    is_set("model", "adapter_name_or_path"),
                    not_(is_set("adapter", "create_new_adapter")),
                ),
            )
            for key in ("pissa_init", "loftq_init", "use_llama_pro")
        ),
    )
)


def apply(
    model: "PreTrainedModel",
    config: LoraConfig,
    *,
    given: GivenAdapters,
    new_tokens: NewTokens | None = None,
    pure_bf16: bool,
    frozen: Sequence[str] = (),
    original: "Callable[[], PreTrainedModel] | None" = None,
) -> "PeftModel":
    """Freeze the model and put a trainable adapter on it.

    Of the `given` adapters all but the last are merged and the last is trained on; with `create_new_adapter` all are
    merged and a fresh one is trained. `new_tokens`: their rows are trained too.
    `original`: loads the model again, not quantized; LoftQ needs it.
    Raises `ModelError` for names that no module has and for adapters that do not fit.
    """
    if given and not config.create_new_adapter:
        return continue_adapter(model, given, new_tokens, pure_bf16=pure_bf16)
    model = merge_adapters(model, given.names, given)
    rows = new_tokens.give_rows(model) if new_tokens else NewRows()
    settings = settings_for(model, config, rows=rows, frozen=frozen)
    adapted = start_adapter(model, settings, key="lora_target", wanted=config.lora_target, pure_bf16=pure_bf16)
    if config.use_dora:
        _require_directions(adapted)
    if config.pissa_init:
        untie_adapted(adapted)  # what is left of a weight without its principal parts must not reach the other end
        start_from_principal_parts(adapted, config.pissa_iter)
    if config.loftq_init:
        assert original is not None, "loftq_init needs the weights as they were before quantization"
        start_from_quantization_error(adapted, original())
    return adapted


def _require_directions(adapted: "PeftModel") -> None:
    """DoRA divides each row of a weight by its length. Raises `ModelError` for a weight with a row of zeros."""
    for name, lengths in adapted.named_parameters():
        layer, found, _ = name.partition(".lora_magnitude_vector.")
        if found and not lengths.all():
            ending = layer.rpartition(".")[2]
            raise ModelError(
                f"use_dora: {ending}: has a row of zeros, such as that of the padding token, which has no direction"
                f" -> leave {ending} out of lora_target, or leave use_dora out"
            )


def settings_for(
    model: "PreTrainedModel", config: LoraConfig, *, rows: NewRows, frozen: Sequence[str]
) -> "peft.LoraConfig":
    """The settings of peft for a new adapter on `model`. Raises `ModelError` for names that no module has."""
    import peft

    targets = _targets(model, config, frozen)
    settings = peft.LoraConfig(
        **common_settings(model, config.additional_target),
        r=config.lora_rank,
        lora_alpha=2 * config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(targets.modules),
        target_parameters=list(targets.parameters) or None,
        fan_in_fan_out=_stores_transposed(model),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )
    add_rows(model, settings, rows, "lora_target")
    return settings


def _targets(model: "PreTrainedModel", config: LoraConfig, frozen: Sequence[str]) -> Targets:
    """What `lora_target` names, without the weights that the method cannot adapt, and a log line says so."""
    targets = find_targets(model, config.lora_target, "lora_target", frozen)
    if config.use_llama_pro:
        targets = targets_inside(model, targets, inserted_blocks(model, config.freeze_trainable_layers))
    if not targets.parameters:
        return targets
    names = ", ".join(targets.parameters)
    why = next((key for key in ("lora_dropout", "use_dora", "pissa_init") if getattr(config, key)), "")
    if why:
        warn(f"{why}: is not possible for weights outside of layers, so these get no adapter: {names}")
        return Targets(targets.modules)
    info(f"lora_target: {', '.join(config.lora_target)}: weights that are not layers get an adapter too: {names}")
    return targets


def _stores_transposed(model: "PreTrainedModel") -> bool:
    """GPT-2 keeps its weights as (in, out); peft has to be told."""
    from transformers.pytorch_utils import Conv1D

    return any(isinstance(module, Conv1D) for module in model.modules())


def finish(config: LoraConfig, folder: Path) -> None:
    """`pissa_convert`: scripts look for the plain LoRA adapter in a folder of its own."""
    if config.pissa_init and config.pissa_convert:
        for path in folder.glob("adapter_*"):
            target = folder / "pissa_converted" / path.name
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, target)
        info(f"the adapter is also in {folder / 'pissa_converted'}, as pissa_convert asks")


ADAPTER = Adapter(name="lora", config=LoraConfig, apply=apply, adds_weights=True, check=RULES, finish=finish)
