"""Every loss of `pref_loss` against numbers worked out by hand, and against TRL on the same tensors, gradients too."""

import math
from typing import Any

import pytest
import torch

from luthier.data.collate import concatenate_rows, pad_rows
from luthier.model.attention import isolate_samples
from luthier.model.heads.output_head import inspect_head
from luthier.model.types import Models
from luthier.stages import _preference_losses as losses
from luthier.stages._preference_losses import LOSSES
from luthier.stages.dpo import DpoConfig, loss, sums, update
from tests.stages import trl_losses

LN3 = math.log(3)
BY_HAND = {
    "sigmoid": (LN3, 0.0, {}, -math.log(3 / 4)),
    "sigmoid, a quarter wrong": (LN3, 0.0, {"label_smoothing": 0.25}, -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
    "robust": (LN3, 0.0, {"label_smoothing": 0.25}, 2 * (0.25 * math.log(0.25) - 0.75 * math.log(0.75))),
    "hinge": (LN3, 0.0, {"beta": 0.5}, 1 - LN3 / 2),
    "hinge, far enough": (LN3, 0.0, {}, 0.0),
    "ipo": (LN3, 0.0, {}, (LN3 - 0.5) ** 2),
    "kto_pair": (LN3, 0.0, {"chosen_kl": 0.0, "rejected_kl": LN3}, 0.5),
    "orpo": (math.log(3 / 4), math.log(1 / 2), {}, -2 * math.log(3 / 4)),
    "simpo": (LN3, 0.0, {"gamma": LN3}, math.log(2)),
    "exo_pair": (LN3, 0.0, {"label_smoothing": 0.25}, 0.0),
    "exo_pair, undecided": (LN3, 0.0, {"label_smoothing": 0.5}, 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
    "bco_pair": (LN3, 0.0, {"mean_reward": -LN3}, -math.log(0.9) - math.log(0.25)),
    "apo_zero": (LN3, 0.0, {}, 0.75),
    "apo_down": (LN3, -LN3, {}, 0.85),
    "sppo": (LN3, 0.0, {}, (LN3 - 0.5) ** 2 + 0.25),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    """d_w = ln 3 and d_l = 0 with beta 1 give s(z) = 3/4 and s(-z) = 1/4; ln 9 gives 9/10.

    sigmoid   -ln 3/4; a quarter wrong: -3/4 ln 3/4 - 1/4 ln 1/4
    robust    (-3/4 ln 3/4 + 1/4 ln 1/4) / (1 - 1/2)
    ipo       (ln 3 - 1/2)^2
    kto_pair  KL_l = ln 3, KL_w = 0: 1 - s(0) / 2 - s(0) / 2
    orpo      probabilities 3/4 and 1/2 have odds 3 and 1: -ln 3/4 - ln s(ln 3)
    simpo     the margin is just gamma: -ln s(0)
    exo_pair  the policy prefers as the labels do, 3 to 1: no divergence; from (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2
    bco_pair  delta = -ln 3: -ln s(ln 9) - ln s(-ln 3)
    apo_zero  1 - 3/4 + 1/2;   apo_down  with d_l = -ln 3: 3/4 + 1 - 9/10
    sppo      (ln 3 - 1/2)^2 + (1/2)^2
    """
    chosen, rejected, more, expected = BY_HAND[case]
    of = LOSSES[case.partition(",")[0]].of
    pair = (torch.tensor([value], dtype=torch.float64) for value in (chosen, rejected))
    assert of(*pair, **{"beta": 1.0, **more}).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("probability", [1.0, 1 - 1e-7, 1e-30])
def test_the_odds_ratio_is_finite_for_certain_and_for_impossible_answers(probability):
    certain = torch.tensor([math.log(probability)], requires_grad=True)
    for pair in ((certain, torch.tensor([-1.0])), (torch.tensor([-1.0]), certain)):
        value = losses.odds_ratio(*pair)
        assert value.isfinite()
        (gradient,) = torch.autograd.grad(value.sum(), certain)
        assert gradient.isfinite()


PROMPT = [5, 6, 7]
CHOSEN = [[8, 9, 10, 11, 12], [13, 14], [20, 21, 22]]
REJECTED = [[30, 31, 32], [33, 34, 35, 36], [40]]
ROWS = [{"input_ids": PROMPT + a, "labels": [-100] * 3 + a} for a in (*CHOSEN, *REJECTED)]
REFERENCE = torch.tensor([-30.0, -12.5, -17.0, -17.0, -23.0, -5.5], dtype=torch.float64)
NUM_PAIRS = len(CHOSEN)


@pytest.fixture
def model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny import TINY_LLAMA

    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, "num_hidden_layers": 1})).double().eval()


def batch_of(concatenates: bool) -> dict[str, Any]:
    batch = concatenate_rows(ROWS) if concatenates else pad_rows(ROWS, pad_token_id=0)
    return {**batch, "reference_logps": REFERENCE}


def gradients(model: Any, value: torch.Tensor) -> dict[str, torch.Tensor]:
    names, weights = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, weights), strict=True))


def ours(model: Any, config: DpoConfig, *, concatenates: bool = False, **state: float) -> Any:
    if concatenates:
        isolate_samples(model)
    return loss(Models(model, inspect_head(model)), batch_of(concatenates), config, state=state, training=True)


def assert_equal_with_gradients(model: Any, found: torch.Tensor, expected: torch.Tensor) -> None:
    """A sum of ours, a mean of theirs."""
    found = found / NUM_PAIRS
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    mine, theirs = gradients(model, found), gradients(model, expected)
    assert max(gradient.abs().max() for gradient in theirs.values()) > 1e-4
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=0, atol=1e-6, msg=name)


IN_TRL = {
    "sigmoid": {},
    "sigmoid shortened": {"ld_alpha": 0.3},
    "robust": {"dpo_label_smoothing": 0.2},
    "hinge": {},
    "ipo": {},
    "exo_pair": {"dpo_label_smoothing": 0.2},
    "bco_pair": {},
    "apo_zero": {},
    "apo_down": {},
    "sppo": {},
}


@pytest.mark.parametrize("concatenates", [False, True], ids=["padded", "concatenated"])
@pytest.mark.parametrize("case", IN_TRL)
def test_the_stage_equals_trl(model, case, concatenates):
    pytest.importorskip("trl", reason="trl is the independent implementation")
    name, keys = case.split()[0], IN_TRL[case]
    settings = {"label_smoothing": keys.get("dpo_label_smoothing", 0.0), "ld_alpha": keys.get("ld_alpha")}
    theirs = {"sppo": "sppo_hard"}.get(name, name)
    expected, metrics = trl_losses.dpo_loss(model, ROWS, REFERENCE, theirs, beta=0.3, **settings)
    found = ours(model, DpoConfig(pref_loss=name, pref_beta=0.3, **keys), concatenates=concatenates, mean_reward=0.0)
    if concatenates:
        model.set_attn_implementation("sdpa")
    assert_equal_with_gradients(model, found.total, expected)
    if name != "ipo":  # its rewards are means by token here, as in the reference
        for metric in ("chosen", "rejected", "accuracies", "margins"):
            total, count = found.metrics[f"rewards/{metric}"]
            assert count == NUM_PAIRS
            assert float(total) / count == pytest.approx(metrics[f"rewards/{metric}"][0], abs=1e-6)


def means_by_token(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    logps = trl_losses.said(model, trl_losses.rectangle(ROWS)).log_probs.sum(-1)
    return (logps / torch.tensor([len(a) for a in (*CHOSEN, *REJECTED)])).chunk(2)


def test_orpo_equals_trl(model):
    """TRL takes the odds in float32, so its own numbers are held to 1e-5; the formula in float64 to 1e-6."""
    pytest.importorskip("trl", reason="trl is the independent implementation")
    chosen, rejected = means_by_token(model)
    found = ours(model, DpoConfig(pref_loss="orpo", pref_beta=0.3))
    trl = (-chosen - trl_losses.odds_ratio_loss(chosen, rejected, 0.3)).mean()
    torch.testing.assert_close(found.total / NUM_PAIRS, trl, rtol=0, atol=1e-5)
    p, q = chosen.exp(), rejected.exp()
    ratio = -torch.log(torch.sigmoid(torch.log((p / (1 - p)) / (q / (1 - q)))))
    assert_equal_with_gradients(model, found.total, (-chosen + 0.3 * ratio).mean())
    assert found.metrics["sft_loss"][0].item() == pytest.approx(-chosen.sum().item(), abs=1e-6)
    assert found.metrics["odds_ratio_loss"][0].item() == pytest.approx(ratio.sum().item(), abs=1e-6)


def test_simpo_equals_trl(model):
    pytest.importorskip("trl", reason="trl is the independent implementation")
    expected = trl_losses.simpo_loss(*means_by_token(model), beta=2.0, gamma=0.7).mean()
    found = ours(model, DpoConfig(pref_loss="simpo", pref_beta=2.0, simpo_gamma=0.7))
    assert_equal_with_gradients(model, found.total, expected)


def ratios(model: Any) -> tuple[torch.Tensor, torch.Tensor]:
    logps = trl_losses.said(model, trl_losses.rectangle(ROWS)).log_probs.sum(-1)
    return (logps - REFERENCE).chunk(2)


def test_kto_pair_is_kto_with_the_divergence_of_the_other_side(model):
    config = DpoConfig(pref_loss="kto_pair", pref_beta=0.3)
    models = Models(model, inspect_head(model))
    found = sums(models, batch_of(False), config, state={})
    means = {name: (total.item() / int(count), int(count)) for name, (total, count) in found.items()}
    state = update({}, means, config)
    chosen, rejected = ratios(model)
    chosen_kl, rejected_kl = chosen.mean().clamp(min=0).detach(), rejected.mean().clamp(min=0).detach()
    assert chosen_kl > 0 and rejected_kl == 0
    assert state == pytest.approx({"chosen_kl": float(chosen_kl), "rejected_kl": float(rejected_kl)}, abs=1e-9)
    both = torch.cat([1 - torch.sigmoid(0.3 * (chosen - rejected_kl)), 1 - torch.sigmoid(0.3 * (chosen_kl - rejected))])
    assert_equal_with_gradients(model, ours(model, config, **state).total, both.mean())


def test_bco_compares_with_the_mean_reward_of_all_steps_so_far(model):
    """Steps of 2 pairs with mean rewards 1 and 3, then of 4 pairs with 4 and 8: (2 x 2 + 4 x 6) / 6 = 14/3."""
    config = DpoConfig(pref_loss="bco_pair", pref_beta=0.5)
    state = update({}, {"chosen": (2.0, 2), "rejected": (6.0, 2)}, config)
    assert (state["mean_reward"], state["num_pairs"]) == (2.0, 2)
    state = update(state, {"chosen": (8.0, 4), "rejected": (16.0, 4)}, config)
    assert state["mean_reward"] == pytest.approx(14 / 3) and state["num_pairs"] == 6
    chosen, rejected = (0.5 * ratio for ratio in ratios(model))
    expected = (-torch.log(torch.sigmoid(chosen - 14 / 3)) - torch.log(torch.sigmoid(-(rejected - 14 / 3)))).mean()
    assert_equal_with_gradients(model, ours(model, config, **state).total, expected)


def test_label_smoothing_flips_a_share_of_the_pairs(model):
    """TRL 1.16 leaves the share out of this loss, so the formula stands here once more."""
    chosen, rejected = (0.3 * ratio for ratio in ratios(model))
    right, wrong = (-torch.log(torch.sigmoid(margin)) for margin in (chosen - rejected, rejected - chosen))
    expected = (0.8 * right + 0.2 * wrong).mean()
    assert_equal_with_gradients(model, ours(model, DpoConfig(pref_beta=0.3, dpo_label_smoothing=0.2)).total, expected)


def test_the_bco_and_the_sft_loss_are_mixed_in(model):
    config = DpoConfig(pref_beta=0.5, pref_bco_weight=0.4, pref_ftx=0.2)
    chosen, rejected = (0.5 * ratio for ratio in ratios(model))
    dpo = -torch.log(torch.sigmoid(chosen - rejected))
    bco = -torch.log(torch.sigmoid(chosen - 0.7)) - torch.log(torch.sigmoid(0.7 - rejected))
    expected = ((dpo + 0.4 * bco) / 1.4 - 0.2 * means_by_token(model)[0]).mean()
    assert_equal_with_gradients(model, ours(model, config, mean_reward=0.7).total, expected)


def test_the_metrics_of_each_side_are_sums_over_the_pairs(model):
    """Log-probabilities are those of whole answers, logits the means over their tokens and the vocabulary."""
    with torch.no_grad():
        logits = [model(torch.tensor([row["input_ids"]])).logits[0, len(PROMPT) - 1 : -1].mean() for row in ROWS]
    logps = trl_losses.said(model, trl_losses.rectangle(ROWS)).log_probs.sum(-1).detach()
    metrics = ours(model, DpoConfig(pref_beta=0.3)).metrics
    for side, own in (("chosen", slice(NUM_PAIRS)), ("rejected", slice(NUM_PAIRS, None))):
        expected = {
            f"logps/{side}": logps[own].sum(),
            f"logits/{side}": sum(logits[own]),
            f"rewards/{side}": 0.3 * (logps - REFERENCE)[own].sum(),
        }
        for name, value in expected.items():
            assert float(metrics[name][0]) == pytest.approx(float(value), abs=1e-6), name


def test_tokens_beyond_the_shorter_answer_count_ld_alpha_times(model):
    """With ld_alpha 0 a pair is compared up to its shorter answer; with 1 nothing changes."""
    metric = "logps/chosen"
    logps = trl_losses.said(model, trl_losses.rectangle(ROWS)).log_probs[:NUM_PAIRS, 2:]
    kept = [min(len(a), len(b)) for a, b in zip(CHOSEN, REJECTED, strict=True)]
    expected = sum(row[:n].sum().item() for row, n in zip(logps, kept, strict=True))
    assert float(ours(model, DpoConfig(ld_alpha=0.0)).metrics[metric][0]) == pytest.approx(expected, abs=1e-9)
    assert float(ours(model, DpoConfig(ld_alpha=1.0)).metrics[metric][0]) == pytest.approx(logps.sum().item(), abs=1e-9)


def test_filler_pairs_have_no_weight(model):
    filler = {"input_ids": [5, 6, 7, 8], "labels": [-100] * 4}
    rows = [*ROWS[:NUM_PAIRS], filler, *ROWS[NUM_PAIRS:], filler]
    zero = torch.zeros(1, dtype=torch.float64)
    reference = torch.cat([REFERENCE[:NUM_PAIRS], zero, REFERENCE[NUM_PAIRS:], zero])
    batch = {**pad_rows(rows, pad_token_id=0), "reference_logps": reference}
    models = Models(model, inspect_head(model))
    for name in LOSSES:
        config = DpoConfig(pref_loss=name, dpo_label_smoothing=0.1)
        state = {"mean_reward": 0.1, "chosen_kl": 0.2, "rejected_kl": 0.3}
        found = loss(models, batch, config, state=state, training=True)
        expected = ours(model, config, **state)
        torch.testing.assert_close(found.total, expected.total, rtol=1e-9, atol=1e-9)
        assert {int(count) for _, count in found.metrics.values()} == {NUM_PAIRS}
