"""Utilization, memory and speed: whether the numbers are right."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

import luthier
from luthier.data.collate import model_inputs, pad_rows
from luthier.data.shared_prefixes import concatenate_sharing_prefixes
from luthier.model.attention import isolate_samples
from luthier.training.trainer import StageTrainer
from luthier.training.watch.gauges import Utilization, gauges_of, peak_flops, training_flops
from tests.small_world import small_world
from tests.training.optimizers.worlds import tiny_model

ROWS = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {**small_world(tmp_path_factory.mktemp("world")), "max_steps": 4, "lr_scheduler_type": "constant"}


def test_operations_per_token_by_hand():
    """A layer has 2 x 64 x 64 (q, o) + 2 x 32 x 64 (k, v) + 3 x 64 x 128 weights and two norms; the head 320 x 64."""
    layer, norms, head = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128, 5 * 64, 320 * 64
    flops = training_flops(tiny_model())
    assert flops.per_token == 6 * (2 * layer + norms + head)
    assert flops.per_pair == 12 * 2 * 4 * 16
    tied = training_flops(tiny_model(tie_word_embeddings=True))
    assert tied.per_token == flops.per_token
    frozen = tiny_model()
    frozen.requires_grad_(False)
    assert training_flops(frozen).per_token == pytest.approx(flops.per_token * 4 / 6)


def test_utilization_counts_what_training_computes(monkeypatch):
    model = tiny_model()
    gauge = Utilization(peak=1e9)
    gauge.on_train_begin(None, None, None, model=model)
    assert gauge() == {}
    clock = [100.0]
    monkeypatch.setattr("luthier.training.watch.gauges.time.monotonic", lambda: clock[0])
    model.train()(**model_inputs(pad_rows(ROWS, 0)))
    with torch.no_grad():
        model(**model_inputs(pad_rows(ROWS, 0)))
    model.eval()(**model_inputs(pad_rows(ROWS, 0)))
    clock[0] = 102.0
    flops = training_flops(model)
    done = 4 * flops.per_token + (3 * 3 + 1 * 1) * flops.per_pair
    assert gauge() == {"mfu": pytest.approx(done / 2.0 / 1e9)}
    alike = [{"input_ids": [*range(8), *own], "labels": [*range(8), *own]} for own in ([8, 9], [9, 8, 7])]
    isolate_samples(model)
    model.train()(**model_inputs(concatenate_sharing_prefixes(alike)))
    done += 13 * flops.per_token + (10 * 10 + 3 * 3 + 2 * 3 * 8) * flops.per_pair
    assert gauge() == {"mfu": pytest.approx(done / 2.0 / 1e9)}


def test_models_whose_cost_does_not_follow_from_their_weights():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    assert training_flops(mixture) is None


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA RTX A6000", 154.8),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_peaks_of_devices(name, tflops):
    assert peak_flops(name) == tflops * 1e12


def test_what_is_not_known_is_left_out(values):
    assert peak_flops("Some Other Device") is None
    assert gauges_of("cpu", is_16_bit=True) == []
    result = luthier.train({**values, "max_steps": 1})
    assert not {"mfu", "vram_allocated"} & {name for logs in result.log_history for name in logs}


def test_effective_tokens_per_second(values):
    result = luthier.train({**values, "include_effective_tokens_per_second": True})
    metrics = json.loads(Path(values["output_dir"], "train_results.json").read_text())
    assert metrics["effective_tokens_per_sec"] == result.metrics["train"]["train_tokens_per_second"] > 0
    assert "effective_tokens_per_sec" not in luthier.train(values).metrics["train"]


def test_the_operations_of_a_run_are_those_that_transformers_counts(values, monkeypatch):
    """The parameters are counted once, and every batch has its own number of tokens."""

    def total_flos() -> float:
        luthier.train({**values, "finetuning_type": "lora"})
        return json.loads(Path(values["output_dir"], "trainer_state.json").read_text())["total_flos"]

    counted, real = [], Trainer.floating_point_ops
    monkeypatch.setattr(Trainer, "floating_point_ops", lambda *args: counted.append(1) or real(*args))
    found = total_flos()
    assert len(counted) == 1
    monkeypatch.setattr(StageTrainer, "floating_point_ops", real)
    assert found == total_flos() > 0
