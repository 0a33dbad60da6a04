"""Times of single modules: measured by hooks, printed at each log."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import luthier
from luthier.core.errors import InvalidInput
from luthier.training.callbacks import module_profiler
from luthier.training.callbacks.module_profiler import ModuleProfiler
from tests.small_world import small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {**small_world(tmp_path_factory.mktemp("world")), "max_steps": 4, "lr_scheduler_type": "constant"}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_module_times_are_logged(values, capsys, checkpointing):
    keys = {
        "profile_modules": "model.layers.*.mlp",
        "logging_steps": 2,
        "disable_gradient_checkpointing": not checkpointing,
    }
    plain = luthier.train({**values, "logging_steps": 2})
    capsys.readouterr()
    result = luthier.train({**values, **keys})
    said = capsys.readouterr().err
    assert "module times up to step 2" in said and "module times up to step 4" in said
    num_forward = 4 if checkpointing else 2  # a checkpointed layer runs again in the backward pass
    for name in ("model.layers.0.mlp", "model.layers.1.mlp"):
        (line, _) = [line for line in said.splitlines() if f"{name}: forward" in line]
        assert f"ms in {num_forward}, backward" in line and line.endswith("ms in 2")
    assert [x.get("loss") for x in result.log_history] == pytest.approx([x.get("loss") for x in plain.log_history])


def test_the_times_are_those_of_the_passes(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(module_profiler, "_now", lambda: clock[0])

    class Slow(torch.nn.Module):
        def forward(self, x):
            clock[0] += 0.05
            return x * 2

    model = SimpleNamespace(named_modules=lambda: [("slow", slow), ("other", torch.nn.ReLU())])
    slow = Slow()
    profiler = ModuleProfiler(["sl*"])
    profiler.attach(model)
    slow(torch.ones(1, requires_grad=True)).backward()
    (line,) = profiler.lines()
    assert line.startswith("  slow: forward 50.0 ms in 1, backward 0.0 ms")


def test_patterns_that_match_no_module(values):
    with pytest.raises(InvalidInput, match=r"profile_modules: \*\.mpl: matches no module of LlamaForCausalLM"):
        luthier.train({**values, "profile_modules": "*.mpl"})
