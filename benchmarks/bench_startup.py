"""CPU seconds (user + system) of commands that must answer at once: `python benchmarks/bench_startup.py [RUNS]`.

Each command runs in its own process. Prints median and minimum beside the target; the exit status is 1 if a median is
above its target.
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

NUM_RUNS = 7
TARGETS = {"version": 0.15, "--help": 0.15, "check": 0.35, "check, misspelt key": 0.35, "explain": 0.35, "schema": 0.35}

DATASET_INFO = '{"identity": {"file_name": "identity.json"}}'
ROWS = '[{"instruction": "Who are you?", "input": "", "output": "An assistant."}]'
RUN_FILE = """\
model_name_or_path: Qwen/Qwen3-4B-Instruct-2507
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_alpha: 16
lora_dropout: 0.05
lora_target: all
dataset: identity
dataset_dir: {folder}
template: qwen3_nothink
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
dataloader_num_workers: 4
output_dir: {folder}/saves
logging_steps: 10
save_steps: 500
plot_loss: true
overwrite_output_dir: true
save_only_model: false
report_to: none
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 180000000
val_size: 0.1
eval_strategy: steps
eval_steps: 500
"""
"""35 keys, as a user of the reference writes them."""


def cpu_seconds(words: list[str], expected_status: int) -> float:
    """CPU seconds of one `luthier WORDS`."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "luthier", *words], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == expected_status, f"luthier {' '.join(words)}: {done.returncode}\n{done.stderr}"
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(argv: list[str]) -> int:
    num_runs = int(argv[0]) if argv else NUM_RUNS
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    is_slow = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "dataset_info.json").write_text(DATASET_INFO, encoding="utf-8")
        (folder / "identity.json").write_text(ROWS, encoding="utf-8")
        run_file, wrong_file = folder / "run.yaml", folder / "wrong.yaml"
        run_file.write_text(RUN_FILE.format(folder=folder), encoding="utf-8")
        wrong_file.write_text(run_file.read_text(encoding="utf-8").replace("lora_rank", "lora_rnk"), encoding="utf-8")
        commands = {
            "version": (["version"], 0),
            "--help": (["--help"], 0),
            "check": (["check", str(run_file)], 0),
            "check, misspelt key": (["check", str(wrong_file)], 2),
            "explain": (["explain", "lora_rank"], 0),
            "schema": (["schema"], 0),
        }
        print(f"CPU seconds, {num_runs} runs each, {os.cpu_count()} cores")
        print(f"{'command':<22}{'median':>8}{'minimum':>9}{'target':>8}")
        for command, (words, status) in commands.items():
            cpu_seconds(words, status)  # the first run may have to compile the bytecode
            seconds = [cpu_seconds(words, status) for _ in range(num_runs)]
            median = statistics.median(seconds)
            is_slow |= median > TARGETS[command]
            print(f"{command:<22}{median:>8.3f}{min(seconds):>9.3f}{TARGETS[command]:>8.2f}")
    return 1 if is_slow else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
