"""Distillation: the student matches the teacher's distribution at every token of the answers.

Generalized knowledge distillation (https://arxiv.org/abs/2306.13649), summed over the tokens t of the answers:

    sum_t D(P_t || Q_t),    P the teacher, Q the student, both at `gkd_temperature`

with D the generalized Jensen-Shannon divergence of `gkd_beta`: 0 is the forward KL, 1 the reverse KL. As in
algorithm 1, the answers of an optimizer step are sampled from the student with probability `gkd_lambda`, else taken
from the dataset. No gradient flows through sampling. With `gkd_lambda` above 0 a row is a prompt with its last answer.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.keys.fields import never_unread
from luthier.config.rules.engine import Rule, Rules, When, above, is_set, not_, within
from luthier.data.plans.distillation import DISTILLATION
from luthier.model.types import Models
from luthier.stages import FrozenModelSpec, LossOutput, Reporting, Stage, StageState, sft
from luthier.stages._against_frozen import loss_against_frozen
from luthier.stages._causal import count_targets
from luthier.stages._divergence import forward_kl, generalized_jsd
from luthier.stages._rollout import Rollout

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.config.runs import TrainRun


@dataclass(frozen=True, slots=True, kw_only=True)
class GkdConfig:
    teacher_model: str | None = None
    """The teacher: a folder, a GGUF file or a hub name, with the same tokenizer."""
    teacher_model_adapters: tuple[str, ...] = ()
    """Adapters of the teacher, merged in this order."""
    gkd_beta: float = 0.5
    """0 is the forward KL, 1 the reverse KL, values between them the generalized Jensen-Shannon divergence."""
    gkd_temperature: float = 1.0
    """Temperature of both distributions."""
    gkd_lambda: float = 0.0
    """Share of the optimizer steps that train on answers sampled from the student instead of the dataset's."""
    train_on_prompt: bool = never_unread(False)
    """Train on the prompt tokens as well as the answers."""
    mask_history: bool = never_unread(False)
    """Train on the last answer of a conversation only."""


_with_own_answers = When(lambda run: run.method.gkd_lambda > 0)

OWN_ANSWER_RULES = (
    *(
        _with_own_answers.refuses(
            (key, "gkd_lambda"),
            "joins rows, and with gkd_lambda above 0 each row is a prompt that the student answers",
            "leave one of the two out",
            is_set("data", key),
        )
        for key in ("packing", "neat_packing")
    ),
    _with_own_answers.refuses(
        ("streaming", "gkd_lambda"),
        "with gkd_lambda above 0 prompts are sampled from the whole of a dataset",
        "leave one of the two out",
        is_set("data", "streaming"),
    ),
    _with_own_answers.refuses(
        ("train_on_prompt", "gkd_lambda"),
        "with gkd_lambda above 0 only the last answers are trained on",
        "leave one of the two out",
        is_set("method", "train_on_prompt"),
    ),
    _with_own_answers.refuses(
        ("on_overlong", "gkd_lambda"),
        "cuts a row into several, and with gkd_lambda above 0 each row is a whole prompt",
        "set on_overlong: truncate, drop or error",
        lambda run: run.data.on_overlong == "split",
    ),
    _with_own_answers.refuses(
        ("shift_attn", "gkd_lambda"),
        "with gkd_lambda above 0 answers are generated while training, which needs attention to the whole text",
        "leave one of the two out",
        is_set("features.shifted_attention", "shift_attn"),
    ),
)

RULES = Rules(
    (
        Rule(
            ("teacher_model", "stage"),
            "is missing, and this stage needs a teacher",
            "name a model with the same tokenizer",
            not_(is_set("method", "teacher_model")),
            for_rows=False,
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
                is_set("training", key),
            )
            for key in ("predict_with_generate", "do_predict")
        ),
    )
)


def frozen_models(run: "TrainRun") -> tuple[FrozenModelSpec, ...]:
    method = run.method
    return (FrozenModelSpec("teacher", "teacher_model", method.teacher_model, method.teacher_model_adapters),)


def rollout(config: GkdConfig) -> Rollout | None:
    return Rollout(sampled_share=config.gkd_lambda) if config.gkd_lambda else None


def loss(
    models: Models, batch: Mapping[str, Any], config: GkdConfig, *, state: StageState, training: bool
) -> LossOutput:
    """Summed over the labeled tokens; the metric `teacher_kl` is KL(P || Q) at temperature 1."""
    temperature = config.gkd_temperature

    def compare(own: "Tensor", teacher: "Tensor", part: slice) -> "tuple[Tensor, Tensor]":
        divergence = generalized_jsd(own / temperature, teacher / temperature, beta=config.gkd_beta)
        return divergence, forward_kl(own.detach(), teacher)

    return loss_against_frozen(models, batch, "teacher", compare)


STAGE = Stage(
    name="gkd",
    config=GkdConfig,
    rows=DISTILLATION,
    frozen_models=frozen_models,
    reads="cross_entropy",
    units=count_targets,
    loss=loss,
    rollout=rollout,
    reporting=Reporting(headline=("teacher_kl",), evaluated=lambda config: ("teacher_kl",)),
    check=RULES,
    supports_router_loss=True,
)
