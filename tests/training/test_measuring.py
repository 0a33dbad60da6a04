"""Profilers, utilization, memory and speed: what they write, and whether the numbers are right."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import luthier
from luthier.config.load import load_train
from luthier.core.errors import ConfigError, InvalidInput
from luthier.data.collate import concatenate_rows, model_inputs, pad_rows
from luthier.model.lengths import sequence_lengths
from luthier.training.callbacks.module_profiler import ModuleProfiler
from luthier.training.gauges import Utilization, gauges_of, peak_flops, training_flops
from tests.small_world import small_world
from tests.training.optimizers.worlds import tiny_model

ROWS = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {**small_world(tmp_path_factory.mktemp("world")), "max_steps": 4, "lr_scheduler_type": "constant"}


@pytest.fixture
def values(world, tmp_path) -> dict[str, Any]:
    return {**world, "output_dir": str(tmp_path / "out")}


# -- torch profiler ------------------------------------------------------------------------------------


def test_one_trace_of_the_step_that_is_asked_for(values):
    keys = {"enable_torch_profiler": True, "profiler_with_stack": False, "profiler_warmup_steps": 0}
    luthier.train({**values, **keys})
    (path,) = Path(values["output_dir"], "profiler", "rank_0").glob("*.json")
    events = json.loads(path.read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert any(name.startswith("ProfilerStep") for name in names) and "aten::mm" in names
    (operation,) = [e for e in events if e.get("name") == "aten::mm"][:1]
    assert operation["args"]["Input Dims"]


def test_a_trace_each_second_step_in_a_folder_of_ones_own(values, tmp_path):
    keys = {"enable_torch_profiler": True, "profiler_with_stack": False, "profiler_record_shapes": False}
    keys |= {"profiler_wait_steps": 0, "profiler_repeat": 0, "profiler_profile_memory": False}
    luthier.train({**values, **keys, "profiler_output_dir": str(tmp_path / "traces")})
    traces = list((tmp_path / "traces" / "rank_0").glob("*.json"))
    assert len(traces) == 2 and not any('"Input Dims"' in trace.read_text() for trace in traces)


def test_a_run_that_is_too_short_for_a_trace_says_so(values, capsys):
    luthier.train({**values, "max_steps": 1, "enable_torch_profiler": True, "profiler_active_steps": 5})
    assert "the run was over before the 7 steps that a trace takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "least"),
    [("profiler_active_steps", 0, 1), ("profiler_wait_steps", -1, 0), ("profiler_repeat", -1, 0)],
)
def test_numbers_of_steps(values, key, value, least):
    with pytest.raises(ConfigError, match=f"{key}: {value}: must be at least {least}"):
        load_train({**values, "enable_torch_profiler": True, key: value})


# -- times of modules ----------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_passes_of_modules_are_told_at_each_log(values, capsys, checkpointing):
    keys = {
        "profile_modules": "model.layers.*.mlp",
        "logging_steps": 2,
        "disable_gradient_checkpointing": not checkpointing,
    }
    plain = luthier.train({**values, "logging_steps": 2})
    capsys.readouterr()
    result = luthier.train({**values, **keys})
    said = capsys.readouterr().err
    assert "modules up to step 2" in said and "modules up to step 4" in said
    num_forward = 4 if checkpointing else 2  # a checkpointed layer runs again in the backward pass
    for name in ("model.layers.0.mlp", "model.layers.1.mlp"):
        (line, _) = [line for line in said.splitlines() if f"{name}: forward" in line]
        assert f"ms in {num_forward}, backward" in line and line.endswith("ms in 2")
    assert [x.get("loss") for x in result.log_history] == pytest.approx([x.get("loss") for x in plain.log_history])


def test_the_times_are_those_of_the_passes():
    class Slow(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.05)
            return x * 2

    model = SimpleNamespace(named_modules=lambda: [("slow", slow), ("other", torch.nn.ReLU())])
    slow = Slow()
    profiler = ModuleProfiler(["sl*"])
    profiler.attach(model)
    slow(torch.ones(1, requires_grad=True)).backward()
    (line,) = profiler.lines()
    assert line.startswith("  slow: forward ") and 50 <= float(line.split()[2]) < 200


def test_patterns_that_fit_no_module(values):
    with pytest.raises(InvalidInput, match=r"profile_modules: \*\.mpl: fits no module of LlamaForCausalLM"):
        luthier.train({**values, "profile_modules": "*.mpl"})


# -- utilization, memory, speed ------------------------------------------------------------------------


def test_lengths_of_the_sequences():
    assert sequence_lengths(model_inputs(concatenate_rows(ROWS))).tolist() == [[3, 3, 3, 1]]
    padded = sequence_lengths(model_inputs(pad_rows(ROWS, 0)))
    assert padded.tolist() == [[3, 3, 3, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert sequence_lengths({"input_ids": torch.zeros(2, 4, dtype=torch.long)}).tolist() == [[4] * 4] * 2


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
    monkeypatch.setattr("luthier.training.gauges.time.monotonic", lambda: clock[0])
    model.train()(**model_inputs(pad_rows(ROWS, 0)))
    with torch.no_grad():
        model(**model_inputs(pad_rows(ROWS, 0)))
    model.eval()(**model_inputs(pad_rows(ROWS, 0)))
    clock[0] = 102.0
    flops = training_flops(model)
    done = 4 * flops.per_token + (3 * 3 + 1 * 1) * flops.per_pair
    assert gauge() == {"mfu": pytest.approx(done / 2.0 / 1e9)}


def test_models_whose_weights_do_not_tell_the_cost():
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
