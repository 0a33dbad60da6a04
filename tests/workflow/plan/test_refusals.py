"""The table of `luthier plan` has figures of the engines that the run may take, and says why of the others."""

import json
import os

import pytest

from luthier import cli
from luthier.config.load import load_train
from luthier.workflow.plan.engine import Engine
from luthier.workflow.plan.refusals import refusal_of
from tests.small_world import small_world


@pytest.mark.parametrize(
    ("keys", "absent", "reason"),
    [
        ({"use_muon": True}, "zero1, zero2, zero3, fsdp2", "use_muon needs whole weights"),
        ({"use_adam_mini": True}, "zero1, zero2, zero3, fsdp2", "use_adam_mini needs whole weights"),
        ({"use_galore": True, "galore_target": "all"}, "zero1, zero2, zero3, fsdp2", "use_galore needs whole weights"),
        ({"use_apollo": True, "apollo_target": "all"}, "zero1, zero2, zero3, fsdp2", "use_apollo needs whole weights"),
        ({"mixture_of_depths": "convert"}, "zero3, fsdp2", "mixture_of_depths "),
        ({"finetuning_type": "lora", "pissa_init": True}, "zero3, fsdp2", "pissa_init "),
        ({"finetuning_type": "lora", "quantization_bit": 8}, "zero3, fsdp2", "of quantized weights, FSDP and ZeRO-3"),
        ({"on_nonfinite": "skip"}, "zero1, zero2, zero3", "on_nonfinite "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_table_says_why_there_is_no_plan_of_an_engine(tmp_path, capsys, keys, absent, reason):
    """The others are planned as ever. `train` would refuse these, for the same reason."""
    path = tmp_path / "run.json"
    values = {**small_world(tmp_path), "bf16": True, **keys}
    path.write_text(json.dumps(values), encoding="utf-8")
    assert cli.main(["plan", str(path), "--processes=2,8", "--accelerator", "16GiB", "--table"]) == 0
    rows = capsys.readouterr().out.splitlines()[2:]
    assert rows[10:] == [row for row in rows if not row.startswith("|")]
    told = [line.partition(": ") for line in rows[10:]]
    assert told and all(reason in words for _, _, words in told)
    assert ", ".join(names for names, _, _ in told) == absent
    for row in rows[:10]:
        name, *cells = [cell.strip() for cell in row.strip("|").split("|")][1:]
        assert (set(cells) == {"-"}) == (name in absent.split(", ")), row


@pytest.mark.parametrize(
    ("keys", "engine", "reason"),
    [
        ({}, Engine("ddp", 8), None),
        ({}, Engine("fsdp2", 8), None),
        ({"use_badam": True}, Engine("one process"), None),
        ({"use_badam": True}, Engine("ddp", 8), "use_badam each process would train its own block"),
    ],
)
def test_what_train_would_refuse(tmp_path, monkeypatch, keys, engine, reason):
    """The environment is as before afterwards."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert refusal_of(load_train({**small_world(tmp_path), **keys}), engine) == reason
    assert "WORLD_SIZE" not in os.environ
