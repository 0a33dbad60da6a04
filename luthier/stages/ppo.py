"""Proximal policy optimization (PPO): sampled answers scored by a reward model, and a value head on the policy.

https://arxiv.org/abs/1707.06347 as in https://arxiv.org/abs/2203.02155: token t of an answer with score s has reward

    r_t = -beta (log pi(t) - log reference(t)) + [t is the last token] s

with beta adapted to keep the KL near `ppo_target`. Advantages come from GAE and are whitened to mean 0 and variance 1.
The loss is the mean over tokens of the clipped policy loss plus 0.1 times the clipped value loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from luthier.config.rules.engine import Rules, above, at_least
from luthier.data.collate import model_inputs
from luthier.data.plans.prompts import PROMPTS
from luthier.model.types import Models
from luthier.stages import FrozenModelSpec, LossOutput, Reporting, Stage, StageState
from luthier.stages._policy_loss import clipped_loss, clipped_value_loss
from luthier.stages._reference import NO_DROPOUT, adapters_of_reference, reference_model
from luthier.stages._reward import ROLLOUT_RULES, RewardConfig
from luthier.stages._rollout import Experience, Rollout, RolloutTargets, Totals

if TYPE_CHECKING:
    from luthier.config.runs import TrainRun

GAMMA, LAMBDA = 1.0, 0.95
CLIP, VALUE_CLIP, VALUE_WEIGHT = 0.2, 0.2, 0.1
START_COEFFICIENT, HORIZON_ANSWERS = 0.2, 10_000
"""Initial KL coefficient, and the horizon of its controller in answers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PpoConfig(RewardConfig):
    ppo_buffer_size: int = 1
    """Optimizer steps' worth of answers collected before the policy is trained on them."""
    ppo_epochs: int = 4
    """Passes over the collected answers."""
    ppo_score_norm: bool = False
    """Normalize scores to mean 0 and variance 1, over all scores so far."""
    ppo_target: float = 6.0
    """Target of the adaptive KL penalty: KL to the reference model, summed over an answer."""
    ppo_whiten_rewards: bool = False
    """Scale token rewards to variance 1 before advantages are computed."""


RULES = Rules(
    (
        *ROLLOUT_RULES,
        NO_DROPOUT,
        adapters_of_reference(lambda run: True),
        at_least("method", "ppo_buffer_size", 1),
        at_least("method", "ppo_epochs", 1),
        above("method", "ppo_target", 0),
    )
)


def frozen_models(run: "TrainRun") -> tuple[FrozenModelSpec, ...]:
    method = run.method
    return (reference_model(method),)


def advantages(
    experience: Experience, config: PpoConfig, *, state: StageState, totals: Totals, max_new_tokens: int
) -> RolloutTargets:
    """Advantages and returns of every token; the state holds beta and the score moments for the next rollout."""
    from luthier.stages._advantages import add_moments, gae, next_kl_coefficient, whitened

    assert experience.logps is not None and experience.reference is not None, "the stage needs both"
    assert experience.values is not None, "there is a value head"
    scores, coefficient = experience.scores, state.get("kl_coefficient", START_COEFFICIENT)
    token_kl = experience.logps - experience.reference
    kl, count = experience.summed(token_kl), float(len(scores))
    sums = totals(
        {
            "kl": (kl.sum(), count),
            "score": (scores.double().sum(), count),
            "score_squares": (scores.double().square().sum(), count),
        }
    )
    new_state = dict(state)
    if config.ppo_score_norm:
        new_state |= add_moments(state, sums)
        deviation = (new_state["score_spread"] / max(new_state["score_count"] - 1, 1)) ** 0.5
        scores = (scores - new_state["score_mean"]) / (deviation + 1e-8)
    rewards = -coefficient * token_kl
    last = experience.lengths.cumsum(0) - 1
    rewards[last] += scores.to(rewards.dtype)
    if config.ppo_whiten_rewards:
        rewards = whitened(rewards, totals, shifts_mean=False)
    gains = gae(rewards, experience.values, experience.rows, gamma=GAMMA, lam=LAMBDA)
    total_kl, num_answers = sums["kl"]
    new_state["kl_coefficient"] = next_kl_coefficient(
        coefficient,
        total_kl / num_answers,
        target=config.ppo_target,
        num_answers=num_answers,
        horizon=HORIZON_ANSWERS,
    )
    columns = {
        "old_logps": experience.logps,
        "old_values": experience.values,
        "advantages": whitened(gains, totals),
        "returns": gains + experience.values,
    }
    metrics = {"kl": (kl.sum(), count), "kl_coefficient": (kl.new_tensor(coefficient), 1.0)}
    return RolloutTargets(columns, experience.lengths.float(), new_state, metrics)


def loss(
    models: Models, batch: Mapping[str, Any], config: PpoConfig, *, state: StageState, training: bool
) -> LossOutput:
    """Summed over the tokens of the answers."""
    from luthier.model.heads.value_head import logps_and_values

    inputs, positions, targets = model_inputs(batch), batch["positions"], batch["targets"]
    logps, values = logps_and_values(
        models.policy, models.head, inputs, positions, targets, temperature=batch["temperature"]
    )
    policy, clipped = clipped_loss(logps - batch["old_logps"], batch["advantages"], low=CLIP, high=CLIP)
    value = clipped_value_loss(values, batch["old_values"], batch["returns"], clip_range=VALUE_CLIP)
    count = float(targets.numel())
    metrics = {
        "policy_loss": (policy.detach().sum(), count),
        "value_loss": (value.detach().sum(), count),
        "clip_fraction": (clipped.float().sum(), count),
    }
    return LossOutput(policy.sum() + VALUE_WEIGHT * value.sum(), metrics)


def units(batch: Mapping[str, Any]) -> float:
    return float(batch["units"])


def rollout(config: PpoConfig) -> Rollout:
    return Rollout(
        num_batches=config.ppo_buffer_size, num_passes=config.ppo_epochs, has_values=True, advantages=advantages
    )


STAGE = Stage(
    name="ppo",
    config=PpoConfig,
    rows=PROMPTS,
    has_dropout=False,
    frozen_models=frozen_models,
    units=units,
    loss=loss,
    rollout=rollout,
    reporting=Reporting(headline=("reward", "kl")),
    check=RULES,
)
