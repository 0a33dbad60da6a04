"""On an accelerator the host goes on while the device computes, until it reads a number. So losses read none."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from luthier.core.kinds import STAGES
from luthier.data.collate import concatenate_rows, model_inputs
from luthier.model.attention import isolate_samples
from luthier.model.features.mixture_of_depths import convert
from luthier.model.features.shifted_attention import shift_attention
from luthier.model.frozen_models import SeparateModel
from luthier.model.heads.output_head import inspect_head
from luthier.model.heads.value_head import add_value_head
from luthier.model.types import Models
from luthier.training.callbacks.neftune import NeftuneNoise
from luthier.training.distributed.sums import add_to
from tests.reads import Reads
from tests.tiny import TINY_LLAMA

FORWARD = {"samples.py": 1, "masking_utils.py": 1}
"""What a forward pass reads, however many layers it has: where samples begin, and whether there are several."""
ROWS = [{"input_ids": [5, 6, 7, 8 + n], "labels": [-100, 6, 7, 8 + n]} for n in range(4)]


def model_of(kind: type = LlamaForCausalLM, **changes: Any) -> Any:
    torch.manual_seed(0)
    return kind(LlamaConfig(**{**TINY_LLAMA, "hidden_size": 16, "num_labels": 1, **changes}))


def batch_of_all() -> dict[str, Any]:
    """With the entries of all stages."""
    batch = concatenate_rows(ROWS)
    per_token = ("weights", "old_logps", "advantages", "old_values", "returns")
    batch |= {name: torch.rand(len(batch["targets"])) for name in per_token}
    return batch | {"kto_tags": torch.tensor([1, 0]), "temperature": 1.0}


LOSSES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "pt": ("pt", {}, {}),
    "sft": ("sft", {"label_smoothing_factor": 0.1}, {}),
    "dft": ("sft", {"use_dft_loss": True}, {}),
    "eaft": ("sft", {"use_eaft_loss": True}, {}),
    "asft": ("sft", {"use_asft_loss": True}, {"masking_utils.py": 1}),
    "gkd": ("gkd", {}, {"masking_utils.py": 1}),
    "rm": ("rm", {}, {}),
    "dpo": ("dpo", {"ld_alpha": 0.5, "pref_ftx": 0.1}, {}),
    "orpo": ("dpo", {"pref_loss": "orpo"}, {}),
    "kto": ("kto", {}, {"collate.py": 1}),
    "ppo": ("ppo", {}, {}),
    "grpo": ("grpo", {"grpo_beta": 0.1}, {}),
    "gspo": ("grpo", {"loss_type": "gspo"}, {}),
}
"""Stage, its keys, and what it reads beside one forward pass: that of another model, or where half of a batch is."""


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_no_number_of_the_device(name):
    stage, keys, more = STAGES.get(LOSSES[name][0]), *LOSSES[name][1:]
    policy = model_of(LlamaForSequenceClassification if stage.head == "score" else LlamaForCausalLM)
    isolate_samples(policy)
    head = inspect_head(policy)
    frozen = SeparateModel(policy, head)
    models = Models(policy, replace(head, value=add_value_head(policy)), {"teacher": frozen, "reference": frozen})
    batch = batch_of_all()
    batch["reference_logps"] = -torch.rand(len(batch["targets"] if stage.name == "grpo" else batch["ends"]))
    with Reads() as reads:
        output = stage.loss(models, batch, stage.config(**keys), state={"kl": 0.1}, training=True)
        add_to({}, output.metrics)
        output.total.backward()
    assert Counter(FORWARD) + Counter(more) == Counter(file for _, file in reads.found), reads.found


@pytest.mark.parametrize("feature", ["none", "mixture of depths", "shifted attention", "neftune"])
@pytest.mark.parametrize("num_layers", [2, 6])
def test_the_number_of_reads_does_not_grow_with_the_layers(feature, num_layers):
    model = model_of(num_hidden_layers=num_layers).train()
    if feature == "shifted attention":
        shift_attention(model)
    else:
        isolate_samples(model)
    if feature == "mixture of depths":
        convert(model, 0.5)
    if feature == "neftune":
        NeftuneNoise(5.0).attach(model)
    inputs = model_inputs(concatenate_rows(ROWS))
    with Reads() as reads:
        model(**inputs, use_cache=False).logits.sum().backward()
    assert Counter(file for _, file in reads.found) == FORWARD, reads.found
