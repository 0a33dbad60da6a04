"""The losses of TRL on our batches: its own code, given the log-probabilities of a plain transformers model."""

import warnings
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch


def said(model: Any, batch: dict[str, torch.Tensor], prefix: str = "") -> SimpleNamespace:
    """What TRL asks of a model: log p of every next token of an answer, 0 elsewhere. Shape (B, T - 1)."""
    labels = batch[f"{prefix}input_ids"].masked_fill(batch[f"{prefix}completion_mask"] == 0, -100)[:, 1:]
    logits = model(batch[f"{prefix}input_ids"], attention_mask=batch[f"{prefix}attention_mask"]).logits[:, :-1]
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    nothing = torch.zeros_like(logps)
    shown = {"entropy": nothing, "is_top1": nothing.bool(), "mean_logits": logits.mean(-1)}
    return SimpleNamespace(log_probs=logps * (labels != -100), **shown)


def rectangle(rows: list[dict[str, list[int]]], prefix: str = "") -> dict[str, torch.Tensor]:
    """(B, T) ids, mask of tokens and mask of answers."""
    width = max(len(row["input_ids"]) for row in rows)
    padded = [[*row["input_ids"], *[0] * (width - len(row["input_ids"]))] for row in rows]
    answers = [[*(int(x != -100) for x in row["labels"]), *[0] * (width - len(row["labels"]))] for row in rows]
    tokens = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    named = {"input_ids": padded, "attention_mask": tokens, "completion_mask": answers}
    return {prefix + name: torch.tensor(values) for name, values in named.items()}


def trainer(**settings: Any) -> SimpleNamespace:
    """A trainer of TRL as far as its losses look at it."""
    gathered = dict.fromkeys(("gather", "gather_for_metrics"), lambda value: value)
    accelerator = SimpleNamespace(device=torch.device("cpu"), **gathered)
    common = {"accelerator": accelerator, "aux_loss_enabled": False, "precompute_ref_logps": True}
    counters = {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1}
    return SimpleNamespace(model=SimpleNamespace(training=True), **common, **counters, **settings)


def dpo_loss(
    model: Any, rows: list[dict[str, list[int]]], reference: torch.Tensor, loss_type: str, **settings: Any
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """(mean over pairs, metrics) of `trl.DPOTrainer`; first come all chosen rows, then all rejected ones."""
    from trl.trainer.dpo_trainer import DPOTrainer

    chosen, rejected = reference.chunk(2)
    inputs = {**rectangle(rows), "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    own = {"ld_alpha": None, "label_smoothing": 0.0, **settings}
    fixed = {"f_divergence_type": "reverse_kl", "use_weighting": False, "loss_weights": [1.0]}
    stand_in = trainer(loss_types=[loss_type], **fixed, **own)

    def called(**keys: Any) -> SimpleNamespace:
        return said(model, inputs)

    return DPOTrainer._compute_loss(stand_in, called, inputs, False), stand_in._metrics["train"]


def odds_ratio_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float) -> torch.Tensor:
    """(P,) beta log s(log odds ratio) of `trl.experimental.orpo`, which computes in float32."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo.orpo_trainer import ORPOTrainer

    return ORPOTrainer.odds_ratio_loss(trainer(beta=beta), chosen, rejected)[0]


def simpo_loss(chosen: torch.Tensor, rejected: torch.Tensor, beta: float, gamma: float) -> torch.Tensor:
    """(P,) of `trl.experimental.cpo`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.cpo.cpo_trainer import CPOTrainer

    settings = {"alpha": 0.0, "loss_type": "simpo", "simpo_gamma": gamma, "beta": beta, "label_smoothing": 0.0}
    return CPOTrainer.cpo_loss(trainer(**settings), chosen, rejected)[0]


def kto_loss(
    model: Any, rows: list[dict[str, list[int]]], mismatched: list[dict[str, list[int]]], liked: list[bool],
    reference: torch.Tensor, **settings: Any,
) -> tuple[torch.Tensor, dict[str, list[float]]]:  # fmt: skip
    """(mean over rows, metrics) of `trl.KTOTrainer`."""
    from trl.trainer.kto_trainer import KTOTrainer

    logps, kl_logps = reference.chunk(2)
    inputs = {**rectangle(rows), **rectangle(mismatched, "KL_"), "label": torch.tensor(liked)}
    inputs |= {"ref_logps": logps, "ref_KL_logps": kl_logps}
    stand_in = trainer(calculate_KL=True, loss_type="kto", **settings)
    with torch.no_grad():
        kl = said(model, inputs, "KL_").log_probs.sum(-1)
    stand_in._compute_kl_logps = lambda *_: kl

    def called(**keys: Any) -> SimpleNamespace:
        return said(model, inputs)

    return KTOTrainer._compute_loss(stand_in, called, inputs, False), stand_in._metrics["train"]
