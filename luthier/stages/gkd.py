"""Distillation: the student learns the whole distribution of a teacher at every token of the answers.

Generalized knowledge distillation (https://arxiv.org/abs/2306.13649), summed over the tokens t of the answers:

    sum_t D(P_t || Q_t),    P the teacher, Q the student, both at `gkd_temperature`

with D the generalized Jensen-Shannon divergence of `gkd_beta`: 0 is the forward KL, 1 the reverse KL. As in
algorithm 1, the answers of an optimizer step are the student's own with probability `gkd_lambda`, else the given ones.
Gradients do not go through the drawing of an answer. With `gkd_lambda` above 0 a row is a prompt with its last answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from luthier.config.keys.fields import never_unread
from luthier.config.rules.engine import Rule, Rules, above, within
from luthier.core.errors import RowError
from luthier.data.rows.row_plan import RowPlan
from luthier.data.types import Dialogue
from luthier.model.types import Models
from luthier.stages import FrozenModelSpec, LossOutput, Reporting, Stage, StageState, sft
from luthier.stages._beside import loss_beside
from luthier.stages._causal import count_targets
from luthier.stages._divergence import forward_kl, generalized_jsd
from luthier.stages._rollout import Rollout

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.config.runs import TrainRun
    from luthier.data.chat.encoder import TurnIds
    from luthier.data.rows.encoding import Encoding
    from luthier.data.rows.labels import Encoded
    from luthier.data.rows.tokenize import Written


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
                lambda run: run.model.shift_attn,
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


def write(example: Dialogue, encoding: "Encoding", config: Any) -> "Sequence[tuple[Written]]":
    """Every turn of the conversation, or the last one, with a prompt as a server sends it."""
    if config.gkd_lambda:
        return [(encoding.written_apart(example),)]
    return sft.write(example, encoding, config)


def label(parts: "Sequence[list[TurnIds]]", encoding: "Encoding", config: Any) -> "tuple[Encoded]":
    """Nothing is cut away of a prompt that the student answers: without its end it would ask for nothing."""
    from luthier.data.rows.labels import IGNORE_INDEX, Encoded

    if not config.gkd_lambda:
        return sft.label(parts, encoding, config)
    (((prompt, answer),),) = parts
    whole = [*answer, *([] if encoding.closing_eos is None else [encoding.closing_eos])]
    room = len(whole) if encoding.cutoff_len is None else encoding.cutoff_len - len(prompt)
    if room <= 0:
        raise RowError(f"the prompt alone fills cutoff_len {encoding.cutoff_len}")
    num_lost = max(len(whole) - room, 0)
    labels = [IGNORE_INDEX] * len(prompt) + whole[:room]
    return (Encoded([*prompt, *whole[:room]], labels, num_lost, num_lost, lost_terminator=num_lost > 0),)


def weigh(
    example: Dialogue,
    written: "Sequence[Written]",
    turns: "Sequence[list[TurnIds]]",
    encoding: "Encoding",
    config: Any,
) -> "list[Encoded]":
    if config.gkd_lambda:
        raise RowError('a message carries "loss", which answers of the student\'s own (gkd_lambda) do not have')
    return sft.weigh(example, written, turns, encoding, config)


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
    rows=RowPlan(examples=(Dialogue,), write=write, label=label, weigh=weigh, packer=sft.packer),
    frozen_models=frozen_models,
    units=count_targets,
    loss=loss,
    rollout=rollout,
    reporting=Reporting(headline=("teacher_kl",)),
    check=RULES,
)
