"""Direct preference optimization (DPO) and related losses: a chosen and a rejected answer to the same prompt.

P pairs in a batch. `pref_loss` chooses the loss of a pair (equations in `_preference_losses`); then

    L = (loss + w_bco BCO) / (1 + w_bco) + w_ftx NLL(chosen)

with w_bco = `pref_bco_weight`, w_ftx = `pref_ftx` and NLL the mean of -log pi over the tokens of the chosen answer.

`ld_alpha` (LD-DPO, https://arxiv.org/abs/2409.06411): with n tokens in the shorter answer of a pair, the policy's
log-probability of the longer one is that of its first n tokens plus ld_alpha times that of the others. As in
LLaMA-Factory, the reference model's log-probability is not changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from luthier.config.rules.engine import Rule, Rules, above, all_of, at_least, is_changed, is_set, not_, warning, within
from luthier.data.plans.pairs import PAIRS
from luthier.model.types import Models
from luthier.stages import FrozenModelSpec, LossOutput, Reporting, Stage, StageState, StepStatistics, Sums
from luthier.stages._logps import SequenceLogps, sequence_logps, summed_by_sequence
from luthier.stages._pairs import (
    LOGPS,
    NO_ANSWERS,
    NO_PACKING,
    NO_SPLIT,
    REWARDS,
    ChosenRejected,
    count_pairs,
    halves,
    not_filler,
)
from luthier.stages._preference_losses import KNOBS, LOSSES, PairLoss, bco_pair, odds_ratio
from luthier.stages._reference import NO_DROPOUT, NO_PREDICTIONS, ReferenceConfig, of_reference, reference_model

if TYPE_CHECKING:
    from torch import Tensor

    from luthier.config.runs import TrainRun

SMOOTHED = tuple(name for name, loss in LOSSES.items() if "label_smoothing" in loss.reads)


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoConfig(ReferenceConfig):
    pref_beta: float = 0.1
    """Strength of the regularization towards the reference model; for orpo, weight of the odds ratio term."""
    pref_ftx: float = 0.0
    """Weight of the plain sft loss on the chosen answer, added to the preference loss."""
    pref_bco_weight: float = 0.0
    """Weight of the binary classifier loss mixed into the preference loss (https://arxiv.org/abs/2404.04656)."""
    pref_loss: Literal[
        "sigmoid", "robust", "hinge", "ipo", "kto_pair", "orpo", "simpo", "exo_pair", "bco_pair", "apo_zero",
        "apo_down", "sppo",
    ] = "sigmoid"  # fmt: skip
    """Loss on preference pairs; equations in docs/methods.md."""
    dpo_label_smoothing: float = 0.0
    """Assumed share of pairs with flipped labels, 0 to 0.5."""
    simpo_gamma: float = 0.5
    """Margin of SimPO (https://arxiv.org/abs/2405.14734)."""
    ld_alpha: float | None = None
    """Weight of the tokens beyond the length of the shorter answer (https://arxiv.org/abs/2409.06411)."""


def has_reference(run: "TrainRun") -> bool:
    return LOSSES[run.method.pref_loss].has_reference


RULES = Rules(
    (
        NO_SPLIT,
        *NO_PACKING,
        NO_ANSWERS,
        NO_PREDICTIONS,
        NO_DROPOUT,
        *of_reference(has_reference),
        above("method", "pref_beta", 0),
        at_least("method", "pref_ftx", 0),
        at_least("method", "pref_bco_weight", 0),
        at_least("method", "simpo_gamma", 0),
        at_least("method", "ld_alpha", 0),
        within("method", "dpo_label_smoothing", 0, 0.5, or_high=True),
        Rule(
            ("dpo_label_smoothing", "pref_loss"),
            "only the losses sigmoid, robust and exo_pair assume swapped labels",
            "set pref_loss: sigmoid, or leave it out",
            lambda run: run.method.dpo_label_smoothing > 0 and run.method.pref_loss not in SMOOTHED,
        ),
        Rule(
            ("dpo_label_smoothing", "pref_loss"),
            "if half of the pairs have swapped labels nothing can be learned, and robust would divide by 0",
            "set it below 0.5",
            lambda run: run.method.dpo_label_smoothing == 0.5 and run.method.pref_loss == "robust",
        ),
        Rule(
            ("pref_loss", "dpo_label_smoothing"),
            "exo_pair compares the policy with a preference distribution that must not be certain",
            "set dpo_label_smoothing above 0, e.g. 0.001",
            lambda run: run.method.dpo_label_smoothing == 0 and run.method.pref_loss == "exo_pair",
        ),
        Rule(
            ("pref_bco_weight", "pref_loss"),
            "mixes in a loss that compares with a reference model, and this one has none",
            "leave it out, or choose another pref_loss",
            lambda run: run.method.pref_bco_weight > 0 and not has_reference(run),
        ),
        warning(
            ("simpo_gamma", "pref_loss"),
            "is read by pref_loss: simpo only",
            "leave it out",
            all_of(is_changed("simpo_gamma"), lambda run: run.method.pref_loss != "simpo"),
        ),
        *(
            warning(
                (key, "pref_loss"),
                "is not read, since this loss has no reference model",
                "leave it out",
                all_of(is_set("method", key), not_(has_reference)),
            )
            for key in ("ref_model", "ref_model_adapters")
        ),
    )
)


@dataclass(frozen=True, slots=True)
class PairInputs:
    """Inputs of a pair loss."""

    logps: SequenceLogps
    policy: "Tensor"
    """(2 P,) log pi(y | x), with `ld_alpha`."""
    values: ChosenRejected
    """d_w and d_l of `LOSSES`."""
    ratios: ChosenRejected | None
    """Summed log-ratios, also where a loss takes means; None without a reference."""


def pair_inputs(models: Models, batch: Mapping[str, Any], kind: PairLoss, ld_alpha: float | None) -> PairInputs:
    logps = sequence_logps(models, batch)
    policy = logps.sums if ld_alpha is None else shortened(logps, batch, ld_alpha)
    ratios = policy - batch["reference_logps"] if kind.has_reference else None
    values = policy if ratios is None else ratios
    if kind.is_mean:
        policy, values = (numbers / logps.lengths.clamp(min=1) for numbers in (policy, values))
    return PairInputs(logps, policy, halves(values), None if ratios is None else halves(ratios))


def shortened(logps: SequenceLogps, batch: Mapping[str, Any], ld_alpha: float) -> "Tensor":
    """(2 P,) log-probabilities; tokens beyond the length of the shorter answer of a pair are weighted by `ld_alpha`."""
    import torch

    rows = batch["target_rows"]
    first = logps.lengths.cumsum(0) - logps.lengths
    position = torch.arange(rows.numel(), device=rows.device) - first[rows]
    shorter = torch.minimum(*logps.lengths.chunk(2)).repeat(2)
    weights = torch.where(position < shorter[rows], 1.0, ld_alpha).to(logps.tokens.dtype)
    return summed_by_sequence(logps.tokens * weights, batch)


def loss(
    models: Models, batch: Mapping[str, Any], config: DpoConfig, *, state: StageState, training: bool
) -> LossOutput:
    """The sum over the pairs of a batch."""
    kind, beta = LOSSES[config.pref_loss], config.pref_beta
    inputs = pair_inputs(models, batch, kind, config.ld_alpha)
    chosen, rejected = inputs.values.chosen, inputs.values.rejected
    knobs = {name: getattr(config, key) for name, key in KNOBS.items()} | dict(state)
    losses = kind.of(chosen, rejected, beta=beta, **{name: knobs[name] for name in kind.reads})
    if config.pref_bco_weight:
        assert inputs.ratios is not None, "the rules require a loss with a reference"
        bco = bco_pair(inputs.ratios.chosen, inputs.ratios.rejected, beta=beta, mean_reward=state["mean_reward"])
        losses = (losses + config.pref_bco_weight * bco) / (1 + config.pref_bco_weight)
    means = halves(inputs.logps.sums / inputs.logps.lengths.clamp(min=1))
    if config.pref_ftx:
        losses = losses - config.pref_ftx * means.chosen
    is_real = not_filler(batch)
    real, count = is_real.to(losses.dtype), is_real.sum()
    metrics = {
        "rewards/chosen": beta * chosen,
        "rewards/rejected": beta * rejected,
        "rewards/accuracies": (chosen > rejected).to(losses.dtype),
        "rewards/margins": beta * (chosen - rejected),
        "logps/chosen": halves(inputs.policy).chosen,
        "logps/rejected": halves(inputs.policy).rejected,
        "logits/chosen": halves(inputs.logps.mean_logits).chosen,
        "logits/rejected": halves(inputs.logps.mean_logits).rejected,
    }
    if config.pref_loss == "orpo":
        metrics |= {"sft_loss": -means.chosen, "odds_ratio_loss": odds_ratio(chosen, rejected)}
    return LossOutput(
        (losses * real).sum(), {name: ((value.detach() * real).sum(), count) for name, value in metrics.items()}
    )


def sums(models: Models, batch: Mapping[str, Any], config: DpoConfig, *, state: StageState) -> Sums:
    """The log-ratios of both sides, for the losses that need their means."""
    kind = LOSSES[config.pref_loss]
    if "chosen_kl" not in kind.reads and not _needs_mean_reward(config):
        return {}
    ratios = pair_inputs(models, batch, kind, config.ld_alpha).ratios
    assert ratios is not None, "only losses with a reference have means"
    is_real = not_filler(batch)
    real, count = is_real.to(ratios.chosen.dtype), is_real.sum()
    return {"chosen": ((ratios.chosen * real).sum(), count), "rejected": ((ratios.rejected * real).sum(), count)}


def update(state: StageState, means: Mapping[str, tuple[float, float]], config: DpoConfig) -> StageState:
    """Means for the losses: over this step for kto_pair, over all pairs so far for BCO."""
    if not means:
        return state
    (chosen, count), (rejected, _) = means["chosen"], means["rejected"]
    kl = {"chosen_kl": max(chosen, 0.0), "rejected_kl": max(rejected, 0.0)}
    if not _needs_mean_reward(config):
        return kl
    before, num_before = state.get("mean_reward", 0.0), state.get("num_pairs", 0.0)
    num_pairs = num_before + count
    reward = config.pref_beta * (chosen + rejected) / 2
    return {
        **kl,
        "mean_reward": before + (reward - before) * count / max(num_pairs, 1.0),
        "num_pairs": num_pairs,
    }


def _needs_mean_reward(config: DpoConfig) -> bool:
    return config.pref_bco_weight > 0 or "mean_reward" in LOSSES[config.pref_loss].reads


def frozen_models(run: "TrainRun") -> tuple[FrozenModelSpec, ...]:
    return (reference_model(run.method, is_cached=True),) if has_reference(run) else ()


STAGE = Stage(
    name="dpo",
    config=DpoConfig,
    rows=PAIRS,
    frozen_models=frozen_models,
    has_dropout=False,
    units=count_pairs,
    loss=loss,
    reporting=Reporting(
        headline=("rewards/accuracies", "rewards/margins"),
        evaluated=lambda config: ("rewards/accuracies", *REWARDS, *LOGPS),
    ),
    statistics=StepStatistics(sums=sums, update=update),
    check=RULES,
)
