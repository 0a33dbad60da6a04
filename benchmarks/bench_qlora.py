"""QLoRA against LoRA on SmolLM2-135M: loss after 50 steps, bytes of the linear layers, time and memory.

    make bench-qlora

All train the same rows in the same order with the same seed; only the base differs. The loss is the mean of the last
ten steps. With HQQ it must be within 3 % of that on the base itself, and the layers must take at most 0.35 of the bytes
of bfloat16. nf4 takes less memory and loses more of so small a model.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.gguf"
BASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "hqq": {"quantization_bit": 4, "quantization_method": "hqq"},
    "nf4": {"quantization_bit": 4},
}


def run_file(output_dir: str, steps: int, base: str) -> dict:
    return {
        "model_name_or_path": str(MODEL),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "dataset_dir": str(ROOT / "examples" / "data"),
        "dataset": "multi_turn,identity",
        "template": "auto",
        "cutoff_len": 256,
        "output_dir": output_dir,
        "per_device_train_batch_size": 2,
        "max_steps": steps,
        "learning_rate": 2e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "seed": 7,
        "disable_gradient_checkpointing": True,
        **BASES[base],
    }


def measure(steps: int, base: str) -> dict:
    """Train in this process; return loss, bytes, seconds and peak memory."""
    import logging
    import resource

    import luthier
    from luthier.core.log import LOGGER, set_up

    said: list[str] = []
    set_up()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    LOGGER.addHandler(handler)
    with tempfile.TemporaryDirectory() as folder:
        result = luthier.train(run_file(folder, steps, base))
    losses = [logs["loss"] for logs in result.log_history if "loss" in logs]
    sizes = re.search(r"([\d.,]+) MB instead of ([\d.,]+) MB", "\n".join(said))
    return {
        "first": losses[0],
        "loss": sum(losses[-10:]) / len(losses[-10:]),
        "seconds": result.metrics["train"]["train_runtime"],
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "share_of_bytes": float(sizes[1].replace(",", "")) / float(sizes[2].replace(",", "")) if sizes else 1.0,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--worker", choices=BASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(measure(args.steps, args.worker)))
        return
    found = {}
    for base in BASES:
        command = [sys.executable, __file__, "--worker", base, "--steps", str(args.steps)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[base] = json.loads(done.stdout.splitlines()[-1])
        row = found[base]
        print(
            f"{base:<6} first loss {row['first']:.4f}  last ten {row['loss']:.4f}  {row['seconds']:.0f} s  peak"
            f" {row['peak_gb']:.2f} GB  linear layers {row['share_of_bytes']:.3f} of their bytes in bfloat16"
        )
    apart = {base: abs(row["loss"] / found["plain"]["loss"] - 1) for base, row in found.items() if base != "plain"}
    for base, share in apart.items():
        print(f"{base}: the losses differ by {share:.2%}")
    if apart["hqq"] > 0.03 or max(found[base]["share_of_bytes"] for base in apart) > 0.35:
        raise SystemExit("bench-qlora: outside the limits (3 % with hqq, 0.35)")


if __name__ == "__main__":
    main()
