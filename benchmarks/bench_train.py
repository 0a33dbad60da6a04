"""Useful tokens per second and peak memory of LoRA sft on SmolLM2-135M: luthier against transformers.Trainer with peft.

    make bench-train

Both train the same rows in the same order with the same adapter, optimizer and number format, each in its own process,
one step each in turn. No layer is computed again. "Useful" tokens are those of the rows; padding is not counted, and
neither is the first step, which warms up.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.goals import inputs
from benchmarks.goals.training import command, work_file
from benchmarks.goals.turns import ROOT, take_turns

MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.gguf"
BATCH_SIZE = 4


def run_keys(folder: Path, num_steps: int, dtype: str) -> dict[str, Any]:
    return {
        **inputs.run_keys(MODEL, folder, num_steps, BATCH_SIZE),
        "dataset_dir": str(ROOT / "examples" / "data"),
        "dataset": "tools,multi_turn,history,identity",
        "disable_gradient_checkpointing": True,
        "bf16": dtype == "bfloat16",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, help="the first one is not counted")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = run_keys(folder, args.steps, args.dtype)
        rows_file = inputs.token_rows(keys, folder)
        lengths = [len(row["input_ids"]) for row in inputs.read_rows(rows_file)]
        plain = work_file(folder, "plain", keys, rows_file, checkpointing=False)
        commands = {
            "plain": command("reference", plain),
            "luthier": command("luthier", work_file(folder, "luthier", keys, None)),
        }
        found = take_turns(commands)
    taken = range(BATCH_SIZE, BATCH_SIZE * args.steps)
    tokens = sum(lengths[index % len(lengths)] for index in taken)
    print(f"SmolLM2-135M, LoRA rank 8 on all linear layers, {args.dtype}")
    print(f"{args.steps - 1} steps of {BATCH_SIZE} rows, {tokens} useful tokens")
    print(f"{'':14}{'tokens/s':>10}{'seconds':>10}{'peak GB':>10}")
    for name, measured in found.items():
        seconds = sum(measured.seconds)
        print(f"{name:14}{tokens / seconds:>10.0f}{seconds:>10.1f}{measured.peak_bytes / 1e9:>10.2f}")


if __name__ == "__main__":
    main()
