"""Distillation: the student learns the whole distribution of a teacher at every token of the answers.

Generalised knowledge distillation (https://arxiv.org/abs/2306.13649) on given answers:

    sum_t D(P_t || Q_t),    P the teacher, Q the student, both at `gkd_temperature`

with D the generalised Jensen-Shannon divergence of `gkd_beta`: 0 is the forward KL, 1 the reverse KL.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.rules import Rule, Rules, above, within
from luthier.data.collate import model_inputs
from luthier.data.plan import RowPlan
from luthier.data.types import Dialogue
from luthier.model.types import Models
from luthier.stages import LossOutput, Stage, StageState, Wanted, sft
from luthier.stages._causal import count_targets, with_router_loss
from luthier.stages._divergence import forward_kl, generalised_jsd

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.config.runs import TrainRun


@dataclass(frozen=True, slots=True, kw_only=True)
class GkdConfig:
    teacher_model: str | None = None
    """The model to learn from: a folder, a GGUF file, or a name on the hub, with the same tokenizer."""
    teacher_model_adapters: tuple[str, ...] = ()
    """Adapters of the teacher, merged in this order."""
    gkd_beta: float = 0.5
    """Which divergence: 0 the forward KL, 1 the reverse KL, between them the generalised Jensen-Shannon divergence."""
    gkd_temperature: float = 1.0
    """Temperature of both distributions."""
    train_on_prompt: bool = False
    """Learn the prompt tokens as well as the answers."""
    mask_history: bool = False
    """Learn the last answer of a conversation only."""


RULES = Rules(
    (
        Rule(
            ("teacher_model", "stage"),
            "is missing, and this stage learns from one",
            "name a model with the same tokenizer",
            lambda run: not run.method.teacher_model,
        ),
        within("method", "gkd_beta", 0, 1, or_high=True),
        above("method", "gkd_temperature", 0),
        *(
            Rule(
                (key, "stage"),
                "writes answers and compares them with given ones, which is for stage sft",
                "leave it out, or use stage: sft",
                lambda run, key=key: run.training[key],  # type: ignore[misc]
            )
            for key in ("predict_with_generate", "do_predict")
        ),
    )
)


def wants(run: "TrainRun") -> tuple[Wanted, ...]:
    method = run.method
    return (Wanted("teacher", "teacher_model", method.teacher_model, method.teacher_model_adapters),)


def loss(
    models: Models, batch: Mapping[str, Any], config: GkdConfig, *, state: StageState, training: bool
) -> LossOutput:
    """Summed over the learned tokens; `teacher_kl` is KL(P || Q) at temperature 1."""
    from luthier.model.objective import predictions_at, summed_objective

    inputs, positions = model_inputs(batch), batch["positions"]
    teacher = models.companions["teacher"]
    with teacher.asked() as network:
        wanted = predictions_at(network, teacher.head, inputs, positions)
    student = predictions_at(models.policy, models.head, inputs, positions)
    # Embeddings may be padded to different sizes; what lies beyond the shorter one is no token.
    num_words = min(student.num_words, wanted.num_words)
    weights, kl = batch.get("weights"), positions.new_zeros((), dtype=student.values.dtype).float()

    def divergence(logits: "Tensor", part: slice) -> "Tensor":
        nonlocal kl
        own, given = logits[:, :num_words], wanted.logits(part)[:, :num_words]
        kl = kl + forward_kl(own.detach(), given).sum()
        values = generalised_jsd(own / config.gkd_temperature, given / config.gkd_temperature, beta=config.gkd_beta)
        return values if weights is None else values * weights[part]

    total = summed_objective(student, divergence)
    output = LossOutput(total, {"teacher_kl": (kl, positions.numel())})
    return with_router_loss(models, output, count_targets(batch))


STAGE = Stage(
    name="gkd",
    config=GkdConfig,
    rows=RowPlan(examples=(Dialogue,), write=sft.write, label=sft.label, weigh=sft.weigh, packer=sft.packer),
    wants=wants,
    units=count_targets,
    loss=loss,
    check=RULES,
)
