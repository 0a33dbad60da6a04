"""Does a model that was merged and written answer as base and adapters did before?

The same prompts run through both. At each of T positions p is the distribution of the next token before, q after:

    mean KL = 1/T sum_t sum_v p_t(v) (log p_t(v) - log q_t(v))        in nats
    top-1 agreement = share of positions at which argmax p_t = argmax q_t

Shapes: T tokens of one prompt, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from luthier.model.classes import gives_scores
from luthier.model.heads.score_head import position_scores
from luthier.model.modules import unwrap

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

ALLOWED_MEAN_KL = {
    "float32": 1e-5,
    "float16": 3e-3,
    "bfloat16": 3e-2,
    "f32": 1e-5,
    "f16": 3e-3,
    "bf16": 3e-2,
    "q8_0": 3e-2,
}
"""By number format of the export, since W + B A is rounded to it. On a 135M model rounding costs 1e-11, 3e-5 and 2e-3
nats; ten times that and more means that the weights are other ones."""


@dataclass(frozen=True, slots=True)
class Agreement:
    mean_kl: float
    largest_kl: float
    top1_agreement: float
    num_positions: int

    def __str__(self) -> str:
        return (
            f"mean KL {self.mean_kl:.2g} nats, the same first choice at {self.top1_agreement:.1%} of "
            f"{self.num_positions} positions"
        )


@dataclass(slots=True)
class Reference:
    """What the model says before anything is merged. Called with each adapter on top of what is merged already."""

    prompts: Sequence[Sequence[int]]
    logits: "list[Tensor]" = field(default_factory=list)
    """(T, V) for each prompt: of the base with all adapters seen so far."""
    merges: list[Agreement] = field(default_factory=list)
    """For each adapter but the last: the model that it was merged into, against the two side by side."""

    def __call__(self, model: "PreTrainedModel | PeftModel") -> None:
        from peft import PeftModel

        if self.logits and isinstance(model, PeftModel):
            with model.disable_adapter():
                self.merges.append(agreement(self.logits, next_token_logits(model, self.prompts)))
        self.logits = next_token_logits(model, self.prompts)

    def compare(self, model: "PreTrainedModel") -> Agreement:
        return agreement(self.logits, next_token_logits(model, self.prompts))


def next_token_logits(model: "PreTrainedModel | PeftModel", prompts: Sequence[Sequence[int]]) -> "list[Tensor]":
    """(T, V) for each prompt, float32, on the CPU. Token ids that the model has no row for are left out.

    The score s of a reward model is the log-odds of the text against one of score 0: its "logits" are s and 0.
    """
    import torch

    embedding: Any = model.get_input_embeddings()
    num_rows, device = embedding.weight.shape[0], embedding.weight.device
    was_training, found = model.training, []
    model.eval()
    with torch.no_grad():
        for prompt in prompts:
            ids = torch.tensor([[index for index in prompt if index < num_rows]], device=device)
            if gives_scores(unwrap(model).config):
                scores = position_scores(model, {"input_ids": ids}).cpu()
                found.append(torch.stack([scores, torch.zeros_like(scores)], -1))
                continue
            inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
            found.append(model(input_ids=ids, **inputs).logits[0].float().cpu())
    model.train(was_training)
    return found


def agreement(before: "Sequence[Tensor]", after: "Sequence[Tensor]") -> Agreement:
    """`before`, `after`: (T, V) per prompt. Columns that only one of them has, of tokens added since, are left out."""
    import torch

    divergences, equal = [], []
    for expected, found in zip(before, after, strict=True):
        num_columns = min(expected.shape[-1], found.shape[-1])
        p = expected[:, :num_columns].log_softmax(-1, dtype=torch.float64)
        q = found[:, :num_columns].log_softmax(-1, dtype=torch.float64)
        divergences.append((p.exp() * (p - q)).sum(-1))
        equal.append(p.argmax(-1) == q.argmax(-1))
    kl, same = torch.cat(divergences), torch.cat(equal)
    return Agreement(kl.mean().item(), kl.max().item(), same.double().mean().item(), len(kl))


def allowed_mean_kl(*number_formats: str) -> float:
    """The most that any of the formats which the weights go through may cost, e.g. `bfloat16` and `q8_0`."""
    return max(ALLOWED_MEAN_KL[name] for name in number_formats)
