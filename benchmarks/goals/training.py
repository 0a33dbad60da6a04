"""Measures of training: luthier against the reference, step by step in turn."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.goals import inputs
from benchmarks.goals.machine_peak import OPERATIONS, operations_of_lora
from benchmarks.goals.rows import Row, gigabytes, worst_difference
from benchmarks.goals.turns import Measured, Ratio, take_turns

RANK = 8
AGREE = 1e-3
"""The most by which the losses of one step may differ."""
SCORED = ("dpo", "kto")
"""Stages whose rows luthier scores before training."""


@dataclass(frozen=True, slots=True)
class Setting:
    """How a run of the benchmark is done."""

    folder: Path
    """For everything that is written."""
    model: Path
    teacher: Callable[[], Path]
    """Made when it is needed."""
    num_steps: int
    """Measured ones; one more warms up."""

    def keys(self, batch_size: int, changes: Mapping[str, Any]) -> dict[str, Any]:
        shared = inputs.run_keys(self.model, self.folder, self.num_steps + 1, batch_size)
        return {**shared, **changes}


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of training against the reference."""

    measure: str
    goal: str
    keys: dict[str, Any]
    batch_size: int = 2
    note: str = ""
    losses_agree: bool = True
    """False if the programs begin from different random weights or round the base differently."""
    needs_teacher: bool = False
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Measure -> keys of another run of luthier in the same turns."""


def command(program: str, work_file: Path, python: str = sys.executable) -> list[str]:
    return [python, "-m", "benchmarks.goals.child", program, str(work_file)]


def work_file(folder: Path, name: str, keys: Mapping[str, Any], rows: Path | None, **settings: Any) -> Path:
    path = folder / f"{name}.work.json"
    output = {**keys, "output_dir": str(folder / f"{name}.out")}
    path.write_text(json.dumps({"keys": output, "rows": str(rows or ""), "settings": settings}), encoding="utf-8")
    return path


def turns_of(setting: Setting, case: Case) -> tuple[dict[str, Measured], Path]:
    """What `reference`, `luthier`, the case's other runs and then `peak` did; and the file of the rows."""
    more = {"teacher_model": str(setting.teacher())} if case.needs_teacher else {}
    keys = setting.keys(case.batch_size, {**case.keys, **more})
    rows = inputs.token_rows(keys, setting.folder)
    place = setting.folder
    commands = {
        "reference": command("reference", work_file(place, "reference", keys, rows)),
        "luthier": command("luthier", work_file(place, "luthier", keys, None)),
    }
    if case.others:
        commands["peak"] = command("peak", work_file(place, "peak", keys, None))
    for number, (name, changes) in enumerate(case.others.items()):
        commands[name] = command("luthier", work_file(place, f"other{number}", {**keys, **changes}, None))
    own_cache = {"LUTHIER_CACHE": str(place / "cache")}
    is_scored = case.keys.get("stage") in SCORED  # before the first step, which is timed
    return take_turns(commands, dict.fromkeys(commands, own_cache), starts_together=not is_scored), rows


def seconds_cell(reference: Measured, ours: Measured) -> str:
    return f"{reference.median:.2f} -> {ours.median:.2f}"


def memory_cell(reference: Measured, ours: Measured) -> str:
    ratio = ours.peak_bytes / reference.peak_bytes
    return f"{gigabytes(reference.peak_bytes)} -> {gigabytes(ours.peak_bytes)} ({ratio:.2f}x)"


def loss_remark(reference: Measured, ours: Measured, losses_agree: bool) -> str:
    apart = worst_difference(reference.losses, ours.losses)
    if not losses_agree:
        return f"losses differ by {apart:.1g}"
    return f"losses within {apart:.1g}" if apart <= AGREE else f"LOSSES DIFFER by {apart:.2g}"


def compared(measure: str, goal: str, reference: Measured, ours: Measured, remarks: list[str]) -> Row:
    return Row(
        measure,
        goal,
        str(Ratio.of(reference.seconds, ours.seconds)),
        seconds_cell(reference, ours),
        memory_cell(reference, ours),
        "; ".join(filter(None, [*remarks, f"CPU seconds {Ratio.of(reference.cpu_seconds, ours.cpu_seconds)}"])),
    )


def measure(case: Case, setting: Setting) -> list[Row]:
    found, rows = turns_of(setting, case)
    reference, ours = found["reference"], found["luthier"]
    remarks = [loss_remark(reference, ours, case.losses_agree), case.note]
    scoring = ours.facts["seconds_of_scoring"]
    if scoring:
        per_step = scoring / (setting.num_steps + 1)
        ratio = reference.median / (ours.median + per_step)
        remarks.append(f"with the scoring of the rows in the first epoch {ratio:.2f}x")
    result = [compared(case.measure, case.goal, reference, ours, remarks)]
    for name in case.others:
        other = found[name]
        goal = "2.2x at 0.5x memory" if case.keys.get("bf16") else "2.0x at 0.5x memory"
        result.append(compared(name, goal, reference, other, [loss_remark(reference, other, case.losses_agree)]))
    if case.others:
        result.append(share_of_peak(case, setting, found, rows))
    return result


def share_of_peak(case: Case, setting: Setting, found: Mapping[str, Measured], rows: Path) -> Row:
    """Operations of each measured step over its time, as a share of a large product's speed in the same turns."""
    config = json.loads((setting.model / "config.json").read_text(encoding="utf-8"))
    all_rows = inputs.read_rows(rows)
    peak = OPERATIONS / min(found["peak"].seconds)
    shares: dict[str, list[float]] = {"reference": [], "luthier": []}
    for name, values in shares.items():
        for number, seconds in enumerate(found[name].seconds, start=1):
            of_step = all_rows[number * case.batch_size : (number + 1) * case.batch_size]
            values.append(operations_of_lora(config, RANK, of_step, shares=name == "luthier") / seconds / peak)
    ours, theirs = (sorted(shares[name]) for name in ("luthier", "reference"))
    middle = len(ours) // 2
    dtype = "bf16" if case.keys.get("bf16") else "float32"
    return Row(
        f"share of the machine's matrix peak, {dtype}",
        "50 %" if dtype == "bf16" else "70 %",
        f"{ours[middle]:.0%} ({ours[0]:.0%} to {ours[-1]:.0%})",
        note=f"a product of {round((OPERATIONS / 2) ** (1 / 3)):,} squared reaches {peak / 1e9:.0f} GFLOP/s;"
        f" the reference uses {theirs[middle]:.0%} of it",
    )


def lora(dtype: str) -> Case:
    checkpointing = {f"LoRA sft, checkpointing on, {dtype}": {"disable_gradient_checkpointing": False}}
    keys = {"bf16": True} if dtype == "bf16" else {}
    return Case(f"LoRA sft, defaults, {dtype}", "2.8x at 1x memory", keys, batch_size=4, others=checkpointing)


PAIRS = {"dataset": "pairs"}
CASES = {
    "lora-float32": lora("float32"),
    "lora-bf16": lora("bf16"),
    "full": Case("full sft, float32", "2x at 0.7x memory", {"finetuning_type": "full", "learning_rate": 1e-5}),
    "bnb": Case(
        "QLoRA, bitsandbytes nf4", "2.5x", {"quantization_bit": 4, "double_quantization": True}, losses_agree=False
    ),
    "hqq": Case("QLoRA, HQQ 4 bit", "2.5x", {"quantization_bit": 4, "quantization_method": "hqq"}, losses_agree=False),
    "dpo": Case("dpo, LoRA, sigmoid, cached reference", "4x at 0.4x memory", {"stage": "dpo", **PAIRS}, batch_size=1),
    "rm": Case(
        "rm, LoRA",
        "2.5x",
        {"stage": "rm", **PAIRS},
        batch_size=1,
        losses_agree=False,
        note="score layers begin from random weights",
    ),
    "kto": Case("kto, LoRA, cached reference", "3x", {"stage": "kto", "dataset": "feedback"}),
    "gkd": Case("gkd, teacher of twice the layers", "2x", {"stage": "gkd"}, needs_teacher=True),
}
MEASURES: dict[str, Callable[[Setting], list[Row]]] = {name: partial(measure, case) for name, case in CASES.items()}
