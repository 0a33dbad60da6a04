"""Traces of torch's profiler: which steps they hold, and where they are written."""

import json
from pathlib import Path
from typing import Any

import pytest

import luthier
from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from tests.small_world import small_world


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    return {**small_world(tmp_path_factory.mktemp("world")), "max_steps": 4, "lr_scheduler_type": "constant"}


def test_one_trace_of_the_requested_step(values):
    keys = {"enable_torch_profiler": True, "profiler_with_stack": False, "profiler_warmup_steps": 0}
    luthier.train({**values, **keys})
    (path,) = Path(values["output_dir"], "profiler", "rank_0").glob("*.json")
    events = json.loads(path.read_text())["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert any(name.startswith("ProfilerStep") for name in names) and "aten::mm" in names
    (operation,) = [e for e in events if e.get("name") == "aten::mm"][:1]
    assert operation["args"]["Input Dims"]


def test_a_trace_every_second_step_in_the_given_folder(values, tmp_path):
    keys = {"enable_torch_profiler": True, "profiler_with_stack": False, "profiler_record_shapes": False}
    keys |= {"profiler_wait_steps": 0, "profiler_repeat": 0, "profiler_profile_memory": False}
    luthier.train({**values, **keys, "profiler_output_dir": str(tmp_path / "traces")})
    traces = list((tmp_path / "traces" / "rank_0").glob("*.json"))
    assert len(traces) == 2 and not any('"Input Dims"' in trace.read_text() for trace in traces)


def test_a_run_that_is_too_short_for_a_trace_says_so(values, capsys):
    luthier.train({**values, "max_steps": 1, "enable_torch_profiler": True, "profiler_active_steps": 5})
    assert "the run ended before the 7 steps that a trace needs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("key", "value", "least"),
    [("profiler_active_steps", 0, 1), ("profiler_wait_steps", -1, 0), ("profiler_repeat", -1, 0)],
)
def test_numbers_of_steps(values, key, value, least):
    with pytest.raises(ConfigError, match=f"{key}: {value}: must be at least {least}"):
        load_train({**values, "enable_torch_profiler": True, key: value})
