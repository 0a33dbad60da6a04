"""Useful tokens per second and peak memory of LoRA sft on SmolLM2-135M: luthier against transformers.Trainer with peft.

    make bench-train

Both train the same rows in the same order with the same adapter, optimizer and number format, each in its own process.
"Useful" tokens are those of the rows; padding is not counted.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct.gguf"


def run_file(output_dir: str, steps: int, dtype: str) -> dict:
    return {
        "model_name_or_path": str(MODEL),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "dataset_dir": str(ROOT / "examples" / "data"),
        "dataset": "tools,multi_turn,history,identity",
        "template": "smollm2",
        "cutoff_len": 1024,
        "output_dir": output_dir,
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "bf16": dtype == "bfloat16",
    }


def train_luthier(output_dir: str, steps: int, dtype: str) -> float:
    import luthier

    result = luthier.train(run_file(output_dir, steps, dtype))
    return result.metrics["train"]["train_runtime"]


def train_plain(output_dir: str, steps: int, dtype: str) -> float:
    """A careful script by hand: padded batches, peft, transformers.Trainer."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

    rows, tokenizer = tokenized_rows(output_dir, steps, dtype)
    model = AutoModelForCausalLM.from_pretrained(MODEL.parent, gguf_file=MODEL.name, dtype=getattr(torch, dtype))
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    # transformers refuses to train what it loaded from GGUF until the quantizer is taken off.
    del model.hf_quantizer
    model.is_quantized = False
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    args = TrainingArguments(
        output_dir, per_device_train_batch_size=4, max_steps=steps, learning_rate=1e-4, logging_steps=1,
        report_to="none", save_strategy="no", train_sampling_strategy="sequential", bf16=dtype == "bfloat16",
        disable_tqdm=True, use_cpu=not torch.accelerator.is_available(),
    )  # fmt: skip
    collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    trainer = Trainer(model, args, data_collator=collator, train_dataset=rows)
    return trainer.train().metrics["train_runtime"]


def tokenized_rows(output_dir: str, steps: int, dtype: str):  # type: ignore[no-untyped-def]
    from luthier.config.load import load_train
    from luthier.core.kinds import STAGES
    from luthier.workflow.text import load_text_side

    run = load_train(run_file(output_dir, steps, dtype))
    from luthier.data.prepare import prepare

    text = load_text_side(run)
    rows = prepare(run, STAGES.get("sft").rows, text.encoding).train
    return [{name: row[name] for name in ("input_ids", "labels")} for row in rows], text.tokenizer


def useful_tokens(steps: int) -> int:
    rows, _ = tokenized_rows("unused", steps, "float32")
    return sum(len(rows[index % len(rows)]["input_ids"]) for index in range(4 * steps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--child", choices=["luthier", "plain"])
    args = parser.parse_args()
    if args.child:
        with tempfile.TemporaryDirectory() as folder:
            train = {"luthier": train_luthier, "plain": train_plain}[args.child]
            seconds = train(str(Path(folder, "out")), args.steps, args.dtype)
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_bytes}))
        return
    tokens = useful_tokens(args.steps)
    print(f"SmolLM2-135M, LoRA rank 8 on all linear layers, {args.dtype}")
    print(f"{args.steps} steps of 4 rows, {tokens} useful tokens")
    print(f"{'':14}{'tokens/s':>10}{'seconds':>10}{'peak GB':>10}")
    for name in ("plain", "luthier"):
        start = time.monotonic()
        command = [sys.executable, __file__, "--child", name, "--steps", str(args.steps), "--dtype", args.dtype]
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            sys.exit(f"{name} failed after {time.monotonic() - start:.0f} s:\n{child.stderr}")
        facts = json.loads(child.stdout.splitlines()[-1])
        rate = tokens / facts["seconds"]
        print(f"{name:14}{rate:>10.0f}{facts['seconds']:>10.1f}{facts['peak_bytes'] / 1e9:>10.2f}")


if __name__ == "__main__":
    main()
