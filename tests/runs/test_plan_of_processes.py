"""The plan of several processes: what two processes really hold and send, and the formulas of the engines."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from luthier.config.load import load_train
from luthier.core.kinds import STAGES
from luthier.core.machine import detect
from luthier.core.manifest import MANIFEST_NAME
from luthier.data.prepare import prepare
from luthier.run.plan import machine_for
from luthier.workflow.plan.engine import Engine, engine_of
from luthier.workflow.plan.make import Plan, make_plan, sketch
from luthier.workflow.plan.memory import HEAP_SHARE
from luthier.workflow.plan.text import as_json, lines_of, table_of
from luthier.workflow.plan.transfers import Transfer
from luthier.workflow.text import load_text_side
from tests.small_world import WAYS, small_world
from tests.tiny import tiny_llama

FSDP = {"fsdp": "full_shard auto_wrap"}
COUNTED: dict[str, dict[str, Any]] = {
    "ddp": {**WAYS["lora"], "gradient_accumulation_steps": 2},
    "fsdp-full": {**WAYS["full"], **FSDP},
    "fsdp-lora-bf16": {**WAYS["lora"], **FSDP, "bf16": True, "gradient_accumulation_steps": 2},
    "fsdp-tied-kept": {**WAYS["full"], "fsdp": "shard_grad_op auto_wrap"},
    "tp-full": {**WAYS["full"], "tp_size": 2},
    "tp-lora-bf16": {**WAYS["lora"], "lora_target": "all", "tp_size": 2, "bf16": True},
    "tp-tied": {**WAYS["full"], "tp_size": 2},
    "sp-full": {**WAYS["full"], "sp_size": 2},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    values = small_world(tmp_path_factory.mktemp("world"), num_hidden_layers=3)
    # The last step is counted. With DDP it is in the third epoch: no batch is larger than any before, so the step is
    # DDP's own (`luthier.training.retrying`), and the buckets have their order.
    return {**values, "max_steps": 8, "per_device_train_batch_size": 2}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    values = small_world(tmp_path_factory.mktemp("tied"), num_hidden_layers=3, tie_word_embeddings=True)
    return values["model_name_or_path"]


def plan_of(keys, num_processes=2, engine=None, accelerator_bytes=None) -> Plan:
    run = load_train(keys)
    machine, stage = machine_for(detect(), num_processes, accelerator_bytes), STAGES.get(run.stage)
    text = load_text_side(run, reads_chat=stage.rows.reads_chat, needs_weights=False)
    return make_plan(run, stage, text, prepare(run, stage.rows, text.encoding), machine, engine)


@pytest.fixture(scope="module")
def counted(world, tied, tmp_path_factory) -> Path:
    folder, files = tmp_path_factory.mktemp("counted"), []
    for name, keys in COUNTED.items():
        files.append(folder / f"{name}.yaml")
        values = {**world, **keys, "output_dir": str(folder / name)}
        values |= {"model_name_or_path": tied} if "tied" in name else {}
        files[-1].write_text(yaml.safe_dump(values))
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "tests.runs.counted", str(folder), *map(str, files)]
    done = subprocess.run(
        words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("name", COUNTED)
def test_two_processes_hold_and_send_what_is_planned(world, tied, counted, name):
    keys = {**world, **COUNTED[name], **({"model_name_or_path": tied} if "tied" in name else {})}
    plan = plan_of(keys)
    held = [json.loads((counted / f"{name}.{rank}.json").read_text()) for rank in (0, 1)]
    sent: dict[str, int] = {}
    for transfer in plan.transfers:
        sent[transfer.kind] = sent.get(transfer.kind, 0) + transfer.num_bytes * transfer.times
    if not name.startswith(("tp", "sp")):  # which also exchange in each layer
        assert held[0]["sent"] == held[1]["sent"] == sent
    assert held[0]["weights"] == plan.held.weights_bytes
    assert held[0]["gradients"] == plan.held.gradients_bytes
    assert held[0]["optimizer"] == plan.held.optimizer_bytes


def test_processes_that_share_rows_hold_a_part_of_the_activations(world):
    """Two groups of two have the rows of two processes."""
    keys = {**world, **WAYS["full"], "fast_path": False}  # rows that do not share tokens, as with sp_size
    two, shared = plan_of(keys, 2), plan_of({**keys, "sp_size": 2}, 4)
    tokens = two.work.heaviest.num_tokens
    assert (shared.work.heaviest.num_tokens, shared.work.heaviest.own_tokens) == (tokens, -(-tokens // 2))
    assert shared.work.steps == two.work.steps and shared.held.weights_bytes == two.held.weights_bytes
    assert 0.4 < shared.traces.kept.early_bytes / two.traces.kept.early_bytes < 0.8


def test_processes_that_share_layers_hold_a_part_of_the_matrices(world):
    keys = {**world, **WAYS["full"]}
    alone, split = plan_of(keys, 1), plan_of({**keys, "tp_size": 2}, 2)
    assert split.parameters == alone.parameters and split.checkpoint_bytes == alone.checkpoint_bytes
    norms = 64 * (2 * 3 + 1)
    buffers = alone.held.weights_bytes - 4 * alone.parameters
    numbers = norms + (alone.parameters - norms) // 2
    assert split.held.weights_bytes == 4 * numbers + buffers
    assert split.held.optimizer_bytes == 8 * numbers
    assert split.held.gradients_bytes == 4 * (numbers + 320 * 64 // 2), "that of the embedding is whole"
    assert split.held.gathered_bytes == 4 * 320 * 64, "the head"
    assert split.trace.early_bytes < alone.trace.early_bytes
    text = "\n".join(lines_of(split))
    assert "tp, 2 processes; what they exchange in each layer is not planned" in text


def zero(stage, **settings):
    return {"deepspeed": {"zero_optimization": {"stage": stage, **settings}}}


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, Engine("ddp", 4)),
        (FSDP, Engine("fsdp2", 4)),
        ({"fsdp": "shard_grad_op"}, Engine("fsdp2", 4, reshards=False)),
        (
            {"fsdp": "full_shard offload", "fsdp_config": {"transformer_layer_cls_to_wrap": "LlamaDecoderLayer"}},
            Engine("fsdp2", 4, wrapped=("LlamaDecoderLayer",), offloads_weights=True, offloads_optimizer=True),
        ),
        (zero(0), Engine("ddp", 4)),
        (zero(1, offload_optimizer={"device": "none"}), Engine("zero1", 4)),
        (zero(2, reduce_bucket_size=1e6, allgather_bucket_size="auto"), Engine("zero2", 4, bucket_numbers=10**6)),
        (
            zero(3, offload_param={"device": "cpu"}, offload_optimizer={"device": "nvme"}),
            Engine("zero3", 4, offloads_weights=True, offloads_optimizer=True),
        ),
    ],
)
def test_the_keys_choose_the_engine(world, keys, expected):
    assert engine_of(load_train({**world, **keys}), 4) == expected


def test_in_a_ring_each_process_sends_its_share():
    assert Transfer("all-gather", "weights", 800, 2).sent_bytes(8) == 1400
    assert Transfer("reduce-scatter", "gradients", 800, 1).sent_bytes(8) == 700
    assert Transfer("all-reduce", "gradients", 800, 1).sent_bytes(8) == 1400


def test_zero_holds_what_its_paper_says(world):
    """P numbers, N processes, bf16 and Adam: 2 P of weights, 2 P of gradients and 12 P of the optimizer are shared."""
    keys, count = {**world, **WAYS["full"], "bf16": True}, 4
    plans = {name: plan_of(keys, count, Engine(name, count)) for name in ("ddp", "zero1", "zero2", "zero3")}
    numbers = plans["ddp"].parameters
    whole = {"weights": 2 * numbers, "gradients": 2 * numbers, "optimizer": 12 * numbers}
    shared = {"zero1": ("optimizer",), "zero2": ("optimizer", "gradients"), "zero3": tuple(whole)}
    for name, parts in shared.items():
        held = plans[name].held
        found = {"weights": held.weights_bytes, "gradients": held.gradients_bytes, "optimizer": held.optimizer_bytes}
        assert found == {part: size // count if part in parts else size for part, size in whole.items()}
    sent = {name: sum(t.num_bytes for t in plan.transfers if t.what != "buffers") for name, plan in plans.items()}
    assert sent == {"ddp": 4 * numbers, "zero1": 4 * numbers, "zero2": 4 * numbers, "zero3": 6 * numbers}


def test_what_is_offloaded_is_in_the_memory_of_the_host(world):
    keys = {**world, **WAYS["full"], "bf16": True}
    near = plan_of({**keys, **FSDP}, 4, accelerator_bytes=10**9)
    far = plan_of({**keys, "fsdp": "full_shard offload"}, 4, accelerator_bytes=10**9)
    moved = near.held.weights_bytes + near.held.gradients_bytes + near.held.optimizer_bytes
    assert far.held.all_bytes == near.held.all_bytes - moved
    assert far.held.host_bytes == max(near.held.host_bytes, moved) and near.held.host_bytes == 4 * near.parameters + 64


def test_on_a_machine_that_is_not_here_nothing_is_timed(world):
    plan = plan_of({**world, **WAYS["lora"]}, 8, accelerator_bytes=80 * 10**9)
    assert plan.seconds is None and plan.available_bytes == 80 * 10**9
    found, text = as_json(plan), "\n".join(lines_of(plan))
    assert found["seconds"] is None and found["processes"] == 8 and found["engine"] == "ddp"
    assert found["sent_bytes_per_step"] == sum(transfer["sent_bytes"] for transfer in found["transfers"])
    assert "ddp, 8 processes; each sends" in text and "on a machine not here" in text and "assumed" in text


def test_the_table_has_a_line_for_each_plan(world):
    keys = {**world, **WAYS["lora"]}
    run = load_train(keys)
    machine, stage = machine_for(detect(), 8, 10**9), STAGES.get("sft")
    text = load_text_side(run, reads_chat=True)
    data, drawn = prepare(run, stage.rows, text.encoding), sketch(run, stage, text, machine)
    names = ["ddp", "zero2", "zero3", "fsdp2"]
    plans = [make_plan(run, stage, text, data, machine, Engine(name, 8), drawn) for name in names]
    head, line, *rows = table_of(plans)
    assert {head.count("|"), line.count("|"), *(row.count("|") for row in rows)} == {13}
    assert [row.split(" | ")[1] for row in rows] == names
    of_ddp, of_zero2, of_zero3, of_fsdp = (plan.traces for plan in plans)
    assert of_zero2 is of_zero3 and of_ddp is not of_zero2
    assert of_fsdp is not of_zero3, "its layers are computed again in PyTorch's other way"
    short = replace(plans[0], available_bytes=1)
    assert "| no |" in list(table_of([short]))[2] and "| yes |" in rows[0]


SHARED: dict[str, dict[str, Any]] = {
    "sp-recomputed": {**WAYS["full"], "sp_size": 2, "disable_gradient_checkpointing": False},
    "tp-lora": {**WAYS["lora"], "lora_target": "all", "tp_size": 2},
}
"""Runs of one row of 4,096 tokens, whose activations are a good part of the memory."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    folder, files = tmp_path_factory.mktemp("shared"), []
    values = small_world(folder / "world")
    data, length = Path(values["dataset_dir"]), 4096
    rows = [{"instruction": f"Count to {n}.", "output": " ".join(map(str, range(2000)))} for n in range(4)]
    (data / "long.json").write_text(json.dumps(rows))
    info = json.loads((data / "dataset_info.json").read_text())
    (data / "dataset_info.json").write_text(json.dumps({**info, "long": {"file_name": "long.json"}}))
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
    model = tiny_llama(folder / "model", num_hidden_layers=6, vocab_size=8192, max_position_embeddings=length, **sizes)
    values |= {"model_name_or_path": str(model), "dataset": "long", "cutoff_len": length, "max_steps": 2}
    values |= {"disable_gradient_checkpointing": True, "per_device_train_batch_size": 1, "save_strategy": "no"}
    for name, keys in SHARED.items():
        files.append(folder / f"{name}.yaml")
        files[-1].write_text(yaml.safe_dump({**values, **keys, "output_dir": str(folder / name)}))
    return folder


@pytest.mark.thorough
@pytest.mark.parametrize("name", SHARED)
def test_processes_that_share_rows_or_layers_need_what_is_planned(shared, name):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "tests.runs.gives_back", str(shared / f"{name}.yaml")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compared = json.loads((shared / name / MANIFEST_NAME).read_text())["plan"]
    planned = compared["planned_peak_bytes"] / (1 + HEAP_SHARE)
    for peak in compared["peak_bytes_of_processes"]:
        assert planned == pytest.approx(peak, rel=0.15)
