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
from luthier.data.prepare import prepare
from luthier.run.plan import machine_for
from luthier.workflow.plan.engine import Engine, engine_of, num_processes_asked
from luthier.workflow.plan.make import Plan, make_plan, sketch
from luthier.workflow.plan.shape import Unplanned
from luthier.workflow.plan.text import as_json, lines_of, table_of
from luthier.workflow.plan.transfers import Transfer
from luthier.workflow.text import load_text_side
from tests.small_world import WAYS, small_world

FSDP = {"fsdp": "full_shard auto_wrap"}
COUNTED: dict[str, dict[str, Any]] = {
    "ddp": {**WAYS["lora"], "gradient_accumulation_steps": 2},
    "fsdp-full": {**WAYS["full"], **FSDP},
    "fsdp-lora-bf16": {**WAYS["lora"], **FSDP, "bf16": True, "gradient_accumulation_steps": 2},
    "fsdp-tied-kept": {**WAYS["full"], "fsdp": "shard_grad_op auto_wrap"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    values = small_world(tmp_path_factory.mktemp("world"), num_hidden_layers=3)
    return {**values, "max_steps": 3, "per_device_train_batch_size": 2}  # DDP orders its buckets in the second


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
    words += ["-m", "tests.workflow.counted", str(folder), *map(str, files)]
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
    assert held[0]["sent"] == held[1]["sent"] == sent
    assert held[0]["weights"] == plan.held.weights_bytes
    assert held[0]["gradients"] == plan.held.gradients_bytes
    assert held[0]["optimizer"] == plan.held.optimizer_bytes
