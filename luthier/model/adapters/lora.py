"""Low-rank adapters, W + (alpha / r) B A, through peft (https://arxiv.org/abs/2106.09685)."""

from dataclasses import dataclass

from luthier.config.fields import refused
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
    pissa_iter: int = 16
    """Iterations of the fast SVD of PiSSA; -1 takes the exact SVD."""
    pissa_convert: bool = refused(False, "PiSSA is not part of this version", "leave it out")
    """Turn a PiSSA adapter into a plain LoRA adapter at the end."""
    loraplus_lr_ratio: float | None = refused(None, "LoRA+ is not part of this version", "leave it out")
    """Learning rate of B divided by that of A (https://arxiv.org/abs/2402.12354)."""
    loraplus_lr_embedding: float = 1e-6
    """Learning rate of embedding adapters under LoRA+."""


RULES = Rules(
    (
        at_least("adapter", "lora_rank", 1),
        at_least("adapter", "lora_alpha", 1),
        within("adapter", "lora_dropout", 0, 1, or_high=False),
    )
)
