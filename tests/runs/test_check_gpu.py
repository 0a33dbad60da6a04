"""`make check-gpu` on a CPU: the logic of its checks, on a model of two layers."""

import json

import pytest
import torch

from benchmarks import check_gpu
from benchmarks.gpu import checks, results
from benchmarks.gpu.results import Check
from benchmarks.gpu.world import World

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world") / "world", "cpu", is_tiny=True)


def run(group, world, tmp_path):
    checks.run_group(group, world, tmp_path / "results.jsonl")
    return results.read(tmp_path / "results.jsonl")


@without_gpu
def test_without_a_gpu_it_ends_with_one_sentence(tmp_path, capsys):
    assert check_gpu.main(["--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err.strip()
    assert message == check_gpu.NO_DEVICE and "\n" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.thorough
@without_gpu
def test_attention_without_padding_equals_padded_rows(world, tmp_path):
    found = {check.name.partition(",")[0]: check for check in run("attention", world, tmp_path)}
    assert found["sdpa"].status == "ok", found["sdpa"].remark
    assert found["sdpa"].figures["loss"] == pytest.approx(found["sdpa"].figures["expected"], rel=2e-2)
    assert found["fa2"].status == "skipped" and "flash" in found["fa2"].remark.lower()
    assert found["flex"].status in ("ok", "skipped")


@without_gpu
@pytest.mark.thorough
@pytest.mark.parametrize("group", ["stages", "quantized", "kernels", "speed"])
def test_every_group_runs_on_a_cpu(group, world, tmp_path):
    found = run(group, world, tmp_path)
    assert [check.remark for check in found if check.status == "failed"] == []
    assert len(found) >= 2
    if group == "stages":
        assert {check.name for check in found} == {"pt", "sft", "rm", "dpo", "kto", "ppo", "grpo", "gkd"}
        assert all("planned/measured" in check.figures for check in found)


def test_an_error_is_the_result_of_its_check_and_the_others_go_on(world, tmp_path, monkeypatch):
    def broken():
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    group = {"group": lambda world: iter([("one", broken), ("two", lambda: Check("group", "two", "ok"))])}
    monkeypatch.setattr(checks, "GROUPS", group)
    one, two = run("group", world, tmp_path)
    assert (one.status, one.remark) == ("failed", "RuntimeError: CUDA error: an illegal memory access")
    assert two.status == "ok"


def test_a_loss_that_differs_fails():
    assert checks.verdict("g", "n", [2.0], {}, [2.01]).status == "ok"
    assert checks.verdict("g", "n", [2.0], {}, [2.2]).status == "failed"
    assert checks.verdict("g", "n", [2.0, 2.01], {}, [2.0, 2.0], 1e-3).status == "failed"
    assert checks.verdict("g", "n", [2.0, float("nan")], {}).status == "failed"


def test_results_are_written_as_json_and_as_a_table(tmp_path):
    found = [Check("speed", "lora", "ok", {"tokens/s": 12345.0}), Check("attention", "fa2", "skipped", remark="a | b")]
    as_json, page = results.write(tmp_path, found, {"device": "one"})
    assert json.loads(as_json.read_text())["checks"][0]["figures"] == {"tokens/s": 12345.0}
    assert page.read_text().splitlines() == [
        "device: one",
        "",
        "| group | check | result | figures | remarks |",
        "|---|---|---|---|---|",
        "| speed | lora | ok | tokens/s 1.234e+04 |  |",
        "| attention | fa2 | skipped |  | a / b |",
    ]
