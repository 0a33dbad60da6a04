"""How cost grows: with the rows of a dataset, and with the packed tokens of a step."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.bench_data import write_rows
from benchmarks.goals import inputs
from benchmarks.goals.rows import Row, gigabytes
from benchmarks.goals.turns import ROOT, ProgramFailed, take_turns

if TYPE_CHECKING:
    from benchmarks.goals.training import Setting

ROW_COUNTS = (1_000, 10_000, 100_000)
LONGEST_ANSWER_WORDS = 40
PACK_TOKENS = 512
NUM_STEP_ROWS = 1_000
PACKS_IN_A_STEP = (1, 4, 16)
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
MAKE_MODEL = (
    "import json, sys\n"
    "from pathlib import Path\n"
    "from benchmarks.bench_startup import make_model\n"
    "make_model(Path(sys.argv[1]), **json.loads(sys.argv[2]))"
)


def prepare(keys: dict[str, Any], folder: Path) -> tuple[float, int]:
    """(CPU seconds, peak bytes) of `luthier data` on rows that are not cached."""
    run_file = folder / "run.json"
    run_file.write_text(json.dumps(keys), encoding="utf-8")
    words = [sys.executable, "-m", "luthier", "data", str(run_file), "--limit", "1"]
    with (folder / "log").open("w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, cwd=ROOT, env=inputs.environment(folder))
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = status
        if status:
            log.seek(0)
            raise ProgramFailed(f"luthier data ended with status {status}:\n{log.read()[-1000:]}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_rows(setting: "Setting") -> list[Row]:
    """Time of the rows beyond those of the smaller set, so that start-up does not count."""
    found = []
    for count in ROW_COUNTS:
        folder = setting.folder / f"rows{count}"
        folder.mkdir()
        write_rows(folder, count, LONGEST_ANSWER_WORDS)
        keys = {**setting.keys(1, {"dataset": "rows", "dataset_dir": str(folder)}), "max_samples": None}
        found.append(prepare({name: value for name, value in keys.items() if value is not None}, folder))
    per_second = [
        (many - few) / (after - before)
        for (few, many), ((before, _), (after, _)) in zip(pairwise(ROW_COUNTS), pairwise(found), strict=True)
    ]
    numbers = " -> ".join(f"{count:,}" for count in ROW_COUNTS)
    remark = f"{' -> '.join(f'{seconds:.1f} s' for seconds, _ in found)}, start-up included"
    memory = " -> ".join(gigabytes(peak) for _, peak in found)
    measured = " -> ".join(f"{rate:,.0f}" for rate in per_second) + " rows per CPU second"
    return [Row(f"`data`, {numbers} rows", "linear, memory flat", measured, memory=memory, note=remark)]


def measure_steps(setting: "Setting") -> list[Row]:
    """A random Llama, LoRA, packs of 512 tokens: tokens/s at 1, 4 and 16 packs a step."""
    from benchmarks.goals.training import command, work_file

    model = setting.folder / "growth"
    model.mkdir()
    words = [sys.executable, "-c", MAKE_MODEL, str(model), json.dumps(SIZES)]
    subprocess.run(words, check=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    write_rows(model, NUM_STEP_ROWS, LONGEST_ANSWER_WORDS)
    commands = {}
    for packs in PACKS_IN_A_STEP:
        changes = {
            "model_name_or_path": str(model),
            "dataset_dir": str(model),
            "dataset": "rows",
            "template": "auto",
            "packing": True,
            "cutoff_len": PACK_TOKENS,
            "max_samples": NUM_STEP_ROWS,
            "disable_gradient_checkpointing": True,
        }
        keys = setting.keys(packs, changes)
        commands[str(packs)] = command("luthier", work_file(setting.folder, f"packs{packs}", keys, None))
    cache = {"LUTHIER_CACHE": str(setting.folder / "cache")}
    found = take_turns(commands, dict.fromkeys(commands, cache), starts_together=True)
    rates = [packs * PACK_TOKENS / found[str(packs)].median for packs in PACKS_IN_A_STEP]
    tokens = " -> ".join(f"{packs * PACK_TOKENS:,}" for packs in PACKS_IN_A_STEP)
    return [
        Row(
            f"{tokens} packed tokens a step",
            "tokens/s within 10 %",
            f"{' -> '.join(f'{rate:,.0f}' for rate in rates)} tokens/s",
            seconds=" -> ".join(f"{found[str(packs)].median:.2f}" for packs in PACKS_IN_A_STEP),
            memory=" -> ".join(gigabytes(found[str(packs)].peak_bytes) for packs in PACKS_IN_A_STEP),
            note="a random Llama of 6 layers, 512 wide",
        )
    ]


MEASURES: dict[str, Callable[["Setting"], list[Row]]] = {"rows": measure_rows, "steps": measure_steps}
