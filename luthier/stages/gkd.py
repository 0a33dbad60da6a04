"""Distillation: the student learns the whole distribution of a teacher at every token of the answers.

Generalized knowledge distillation (https://arxiv.org/abs/2306.13649), summed over the tokens t of the answers:

    sum_t D(P_t || Q_t),    P the teacher, Q the student, both at `gkd_temperature`

with D the generalized Jensen-Shannon divergence of `gkd_beta`: 0 is the forward KL, 1 the reverse KL. As in
algorithm 1, the answers of an optimizer step are the student's own with probability `gkd_lambda`, else the given ones.
Gradients do not go through the drawing of an answer. With `gkd_lambda` above 0 a row is a prompt with its last answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from luthier.config.keys.fields import never_unread
from luthier.config.rules.engine import Rule, Rules, above, within
from luthier.data.plans.distillation import DISTILLATION
from luthier.model.types import Models
from luthier.stages import FrozenModelSpec, LossOutput, Reporting, Stage, StageState, sft
from luthier.stages._beside import loss_beside
from luthier.stages._causal import count_targets
from luthier.stages._divergence import forward_kl, generalized_jsd
from luthier.stages._rollout import Rollout

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
    """Which divergence: 0 the forward KL, 1 the reverse KL, between them the generalized Jensen-Shannon divergence."""
    gkd_temperature: float = 1.0
    """Temperature of both distributions."""
    gkd_lambda: float = 0.0
    """Share of the optimizer steps that learn from answers of the student's own instead of given ones."""
    train_on_prompt: bool = never_unread(False)
    """Learn the prompt tokens as well as the answers."""
    mask_history: bool = never_unread(False)
    """Learn the last answer of a conversation only."""


def own_answers(rule: Rule) -> Rule:
    """`rule`, for runs that learn from answers of the student's own."""
    return replace(
        rule,
        keys=(rule.keys[0], "gkd_lambda"),
        broken=lambda run: run.method.gkd_lambda > 0 and rule.broken(run),
    )


OWN_ANSWER_RULES = tuple(
    map(
        own_answers,
        (
            *(
                Rule(
                    (key,),
                    "joins rows, and with gkd_lambda above 0 each row is a prompt that the student answers",
                    "leave one of the two out",
                    lambda run, key=key: bool(getattr(run.data, key)),  # type: ignore[misc]
                )
                for key in ("packing", "neat_packing")
            ),
            Rule(
                ("streaming",),
                "with gkd_lambda above 0 prompts are drawn from the whole of a dataset",
                "leave one of the two out",
                lambda run: run.data.streaming,
            ),
            Rule(
                ("train_on_prompt",),
                "with gkd_lambda above 0 the last answers alone are learned",
                "leave one of the two out",
                lambda run: run.method.train_on_prompt,
            ),
            Rule(
                ("on_overlong",),
                "cuts a row into several, and with gkd_lambda above 0 each row is a whole prompt",
                "set on_overlong: truncate, drop or error",
                lambda run: run.data.on_overlong == "split",
            ),
            Rule(
                ("shift_attn",),
                "with gkd_lambda above 0 answers are written while training, for which the whole text must be seen",
                "leave one of the two out",
                lambda run: run.features.shifted_attention.shift_attn,
            ),
            *(
                Rule(
                    (key,),
                    "shares weights out, and this version does not write answers with such weights",
                    "use several processes with whole weights (torchrun without it), or leave gkd_lambda out",
                    lambda run, key=key: bool(run.training[key]),  # type: ignore[misc]
                )
                for key in ("fsdp", "deepspeed")
            ),
        ),
    )
)

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
        within("method", "gkd_lambda", 0, 1, or_high=True),
        sft.ONE_HISTORY,
        *OWN_ANSWER_RULES,
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


def frozen_models(run: "TrainRun") -> tuple[FrozenModelSpec, ...]:
    method = run.method
    return (FrozenModelSpec("teacher", "teacher_model", method.teacher_model, method.teacher_model_adapters),)


def rollout(config: GkdConfig) -> Rollout | None:
    return Rollout(own_share=config.gkd_lambda) if config.gkd_lambda else None


def loss(
    models: Models, batch: Mapping[str, Any], config: GkdConfig, *, state: StageState, training: bool
) -> LossOutput:
    """Summed over the learned tokens; `teacher_kl` is KL(P || Q) at temperature 1."""
    temperature = config.gkd_temperature

    def compare(own: "Tensor", teacher: "Tensor", part: slice) -> "tuple[Tensor, Tensor]":
        divergence = generalized_jsd(own / temperature, teacher / temperature, beta=config.gkd_beta)
        return divergence, forward_kl(own.detach(), teacher)

    return loss_beside(models, batch, "teacher", compare)


STAGE = Stage(
    name="gkd",
    config=GkdConfig,
    rows=DISTILLATION,
    frozen_models=frozen_models,
    units=count_targets,
    loss=loss,
    rollout=rollout,
    reporting=Reporting(headline=("teacher_kl",)),
    check=RULES,
    supports_router_loss=True,
)
