"""Group relative policy optimization (GRPO): several answers per prompt, each compared with the others.

https://arxiv.org/abs/2402.03300. No value head: the advantage A of an answer comes from the scores of its group. With B
answers of |o_i| tokens each, and l the clipped loss of a token plus `grpo_beta` times its KL to the reference:

    grpo      1/B sum_i 1/|o_i| sum_t l          A = (r - mean) / std
    dapo      1/(sum_i |o_i|) sum_i sum_t l      A as grpo                        (https://arxiv.org/abs/2503.14476)
    dr_grpo   1/(B L) sum_i sum_t l              A = r - mean, L = max_new_tokens (https://arxiv.org/abs/2503.20783)
    gspo      as grpo, with the mean ratio of the answer for each token           (https://arxiv.org/abs/2507.18071)
    rloo      as grpo, with the ratio of the whole answer; A = r - mean of the others, and the KL is subtracted from
              the score instead of being added to the loss                        (https://arxiv.org/abs/2402.14740)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.config.rules.engine import Rule, Rules, all_of, at_least, is_set, not_, warning
from luthier.data.collate import model_inputs
from luthier.data.plans.prompts import PROMPTS
from luthier.model.types import Models
from luthier.stages import FrozenModelSpec, LossOutput, Reporting, Stage, StageState
from luthier.stages._advantages import GroupAdvantages, by_group_deviation, by_group_mean, leave_one_out
from luthier.stages._policy_loss import answer_ratio, clipped_loss, mean_ratio, reference_kl, token_ratio
from luthier.stages._reference import NO_DROPOUT, adapters_of_reference, reference_model
from luthier.stages._reward import ROLLOUT_RULES, RewardConfig
from luthier.stages._rollout import Experience, Rollout, RolloutTargets, Totals

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.config.runs import TrainRun


LEAST_SPREAD = 1e-9
"""Equal rewards deviate by less from their mean, by rounding."""


@dataclass(frozen=True, slots=True)
class Objective:
    """One row of the table above."""

    advantages: GroupAdvantages
    ratio: "Callable[[Tensor, Mapping[str, Any]], Tensor]"
    averages_answers: bool
    """Whether every answer has the same weight, whatever its length; else every token has."""
    divides_by_limit: bool = False
    """Whether each answer counts as `max_new_tokens` tokens in the divisor."""
    kl_in_score: bool = False


LOSSES = {
    "grpo": Objective(by_group_deviation, token_ratio, averages_answers=True),
    "dapo": Objective(by_group_deviation, token_ratio, averages_answers=False),
    "dr_grpo": Objective(by_group_mean, token_ratio, averages_answers=False, divides_by_limit=True),
    "gspo": Objective(by_group_deviation, mean_ratio, averages_answers=True),
    "rloo": Objective(leave_one_out, answer_ratio, averages_answers=True, kl_in_score=True),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GrpoConfig(RewardConfig):
    num_generations: int = 8
    """Answers per prompt."""
    num_iterations: int = 1
    """Optimizer steps taken on each set of answers."""
    grpo_beta: float = 0.0
    """Weight of the KL to the reference model; 0 needs no reference model."""
    epsilon: float = 0.2
    """Lower clip range: the ratio of new and old probability is clipped below 1 - epsilon."""
    epsilon_high: float | None = None
    """Upper clip range: the ratio is clipped above 1 + epsilon_high; unset means epsilon."""
    loss_type: Literal["grpo", "dapo", "dr_grpo", "gspo", "rloo"] = "grpo"
    """How token losses are averaged and advantages are computed."""


RULES = Rules(
    (
        *ROLLOUT_RULES,
        NO_DROPOUT,
        adapters_of_reference(lambda run: run.method.grpo_beta > 0),
        at_least("method", "num_generations", 2),
        Rule(
            ("num_generations", "per_device_train_batch_size", "gradient_accumulation_steps"),
            "the answers of an optimizer step must be whole groups",
            "make per_device_train_batch_size x gradient_accumulation_steps a multiple of num_generations",
            lambda run: (
                run.method.num_generations > 1
                and run.training["per_device_train_batch_size"]
                * run.training["gradient_accumulation_steps"]
                % run.method.num_generations
                != 0
            ),
        ),
        at_least("method", "num_iterations", 1),
        at_least("method", "grpo_beta", 0),
        at_least("method", "epsilon", 0),
        at_least("method", "epsilon_high", 0),
        *(
            warning(
                (key, "grpo_beta"),
                "is not read, since grpo_beta is 0",
                "set grpo_beta, or leave it out",
                all_of(is_set("method", key), not_(is_set("method", "grpo_beta"))),
            )
            for key in ("ref_model", "ref_model_adapters")
        ),
    )
)


def frozen_models(run: "TrainRun") -> tuple[FrozenModelSpec, ...]:
    method = run.method
    if not method.grpo_beta:
        return ()
    return (reference_model(method),)


def advantages(
    experience: Experience, config: GrpoConfig, *, state: StageState, totals: Totals, max_new_tokens: int
) -> RolloutTargets:
    """The advantage of each answer, repeated for each of its tokens."""
    objective, size = LOSSES[config.loss_type], config.num_generations
    scores, lengths, metrics = experience.scores, experience.lengths, {}
    if experience.logps is not None and experience.reference is not None:
        kl = experience.summed(experience.logps - experience.reference)
        metrics["kl"] = (kl.sum(), float(len(scores)))
        if objective.kl_in_score:
            scores = scores - config.grpo_beta * kl
    groups = experience.scores.view(-1, size)
    metrics["reward_spread"] = (groups.std(1).sum(), float(len(groups)))
    each = objective.advantages(scores, size).float()
    weights = 1 / lengths if objective.averages_answers else lengths.new_ones(len(lengths), dtype=each.dtype)
    columns = {"advantages": each[experience.rows], "weights": weights.to(each.dtype)[experience.rows]}
    if experience.logps is not None:
        columns["old_logps"] = experience.logps
    if experience.reference is not None and not objective.kl_in_score:
        columns["reference_logps"] = experience.reference
    counted = lengths.float() if not objective.averages_answers else lengths.new_ones(len(lengths)).float()
    if objective.divides_by_limit:
        counted = counted.new_full((len(lengths),), float(max_new_tokens))
    return RolloutTargets(columns, counted, dict(state), metrics)


def loss(
    models: Models, batch: Mapping[str, Any], config: GrpoConfig, *, state: StageState, training: bool
) -> LossOutput:
    """Summed over answers or over tokens, depending on `loss_type`."""
    from luthier.model.heads.output_head import token_logps

    inputs, positions, targets = model_inputs(batch), batch["positions"], batch["targets"]
    logps, _ = token_logps(models.policy, models.head, inputs, positions, targets, temperature=batch["temperature"])
    # With one pass, answers come from the current policy: the ratio is 1 and has a gradient.
    ratios = LOSSES[config.loss_type].ratio(logps - batch.get("old_logps", logps.detach()), batch)
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    losses, clipped = clipped_loss(ratios, batch["advantages"], low=config.epsilon, high=high)
    if "reference_logps" in batch:
        losses = losses + config.grpo_beta * reference_kl(logps, batch["reference_logps"])
    metrics = {"clip_fraction": (clipped.float().sum(), float(targets.numel()))}
    return LossOutput((losses * batch["weights"]).sum(), metrics)


def warns(means: Mapping[str, float]) -> str:
    """Of steps in which no answer was better than another one."""
    if means.get("reward_spread", 1.0) > LEAST_SPREAD:
        return ""
    return (
        "in the last steps all answers to a prompt got the same reward (reward_spread: 0), so nothing was learned"
        " -> use rewards that tell answers apart, or raise temperature"
    )


def units(batch: Mapping[str, Any]) -> float:
    return float(batch["units"])


def rollout(config: GrpoConfig) -> Rollout:
    return Rollout(
        num_generations=config.num_generations,
        num_passes=config.num_iterations,
        needs_policy_logps=config.num_iterations > 1 or config.grpo_beta > 0,
        advantages=advantages,
    )


STAGE = Stage(
    name="grpo",
    config=GrpoConfig,
    rows=PROMPTS,
    has_dropout=False,
    frozen_models=frozen_models,
    units=units,
    loss=loss,
    rollout=rollout,
    reporting=Reporting(headline=("reward", "kl"), warns=warns),
    check=RULES,
)
