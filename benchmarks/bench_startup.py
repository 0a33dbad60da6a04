"""CPU seconds (user + system) until a command answers or begins its work: `python benchmarks/bench_startup.py [RUNS]`.

Each command runs in its own process, once more than it is counted, so that bytecode is compiled and rows are cached.
Prints median and minimum beside the target; the exit status is 1 if a median is above its target. The model is a
random Llama of two layers: what a larger one adds is the loading of its weights.

| row | what is measured |
|---|---|
| `data`, `template`, `plan` | the whole command; what the libraries of training take is known to the plan |
| `chat`, first line | until it waits for the first question, on an input that has none |
| `train`, first step | until the first step begins, less `import torch` alone |
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

NUM_RUNS = 7
TARGETS = {
    "version": 0.15,
    "--help": 0.15,
    "check": 0.35,
    "check, misspelt key": 0.35,
    "explain": 0.35,
    "schema": 0.35,
    "data": 1.5,
    "template check": 1.5,
    "template render": 1.5,
    "plan": 3.0,
    "chat, first line": 4.0,
    "train, first step": 3.0,
}

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
SMALL_RUN_FILE = """\
model_name_or_path: {folder}/model
stage: sft
do_train: true
finetuning_type: lora
dataset: identity
dataset_dir: {folder}
output_dir: {folder}/out
overwrite_output_dir: true
max_steps: 1
report_to: none
"""


CHAT_FORMAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONVERSATIONS = '[{"id": "a", "messages": [{"role": "user", "content": "Who are you?"}]}]'
UNTIL_FIRST_STEP = """\
import os, resource, sys
from contextlib import contextmanager
from luthier.cli import main
from luthier.core.importing import import_within

def stop(*_, **__):
    usage = resource.getrusage(resource.RUSAGE_SELF)
    print(usage.ru_utime + usage.ru_stime, flush=True)
    os._exit(0)

@contextmanager
def stopping(module):
    yield
    module.StageTrainer.training_step = stop

import_within({"luthier.training.trainer": stopping})
sys.exit(main(sys.argv[1:]))
"""
"""Runs a command and leaves it where its first training step would begin; prints the CPU seconds so far."""


def cpu_seconds(words: list[str], expected_status: int) -> float:
    """CPU seconds of `python WORDS`, without input."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False, input="")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == expected_status, f"{' '.join(words)}: {done.returncode}\n{done.stderr}"
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def seconds_to_first_step(run_file: Path) -> float:
    """CPU seconds of `luthier train` until its first step begins, less those of `import torch` just before."""
    torch_alone = cpu_seconds(["-c", "import torch"], 0)
    words = [sys.executable, "-c", UNTIL_FIRST_STEP, "train", str(run_file)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1]) - torch_alone


def make_model(folder: Path, dtype: str = "float32", **larger: int) -> None:
    """A random Llama with a byte tokenizer and a chat template. `larger`: sizes for `LlamaConfig` instead of these."""
    import torch
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    specials = ("<|im_start|>", "</s>")
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = CHAT_FORMAT
    tokenizer.save_pretrained(folder)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    ids = {"bos_token_id": None, "eos_token_id": 257, "pad_token_id": 257}
    options: dict[str, Any] = {**sizes, "num_attention_heads": 4, **ids, **larger}
    config = LlamaConfig(**options)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)


def commands_in(folder: Path) -> dict[str, tuple[list[str], int]]:
    """Name -> (words after `luthier`, exit status). Writes the files that they read."""
    (folder / "dataset_info.json").write_text(DATASET_INFO, encoding="utf-8")
    (folder / "identity.json").write_text(ROWS, encoding="utf-8")
    (folder / "conversations.json").write_text(CONVERSATIONS, encoding="utf-8")
    run_file, wrong_file, small_file, chat_file = (
        folder / f"{name}.yaml" for name in ("run", "wrong", "small", "chat")
    )
    run_file.write_text(RUN_FILE.format(folder=folder), encoding="utf-8")
    wrong_file.write_text(run_file.read_text(encoding="utf-8").replace("lora_rank", "lora_rnk"), encoding="utf-8")
    model = folder / "model"
    make_model(model)
    small_file.write_text(SMALL_RUN_FILE.format(folder=folder), encoding="utf-8")
    chat_file.write_text(f"model_name_or_path: {model}\n", encoding="utf-8")
    return {
        "version": (["version"], 0),
        "--help": (["--help"], 0),
        "check": (["check", str(run_file)], 0),
        "check, misspelt key": (["check", str(wrong_file)], 2),
        "explain": (["explain", "lora_rank"], 0),
        "schema": (["schema"], 0),
        "data": (["data", str(small_file)], 0),
        "template check": (["template", "check", str(model)], 0),
        "template render": (["template", "render", "chatml", str(folder / "conversations.json")], 0),
        "plan": (["plan", str(small_file)], 0),
        "chat, first line": (["chat", str(chat_file)], 0),
    }


def main(argv: list[str]) -> int:
    num_runs = int(argv[0]) if argv else NUM_RUNS
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.setdefault("LUTHIER_CACHE", str(folder / "cache"))
        rows = {
            command: partial(cpu_seconds, ["-m", "luthier", *words], status)
            for command, (words, status) in commands_in(folder).items()
        }
        rows["train, first step"] = partial(seconds_to_first_step, folder / "small.yaml")
        torch_alone = min(cpu_seconds(["-c", "import torch"], 0) for _ in range(3))
        print(
            f"CPU seconds, {num_runs} runs each, {os.cpu_count()} cores; `import torch` alone takes {torch_alone:.2f}"
        )
        print(f"{'command':<22}{'median':>8}{'minimum':>9}{'target':>8}")
        is_slow = False
        for command, measure in rows.items():
            measure()
            seconds = [measure() for _ in range(num_runs)]
            median = statistics.median(seconds)
            is_slow |= median > TARGETS[command]
            print(f"{command:<22}{median:>8.3f}{min(seconds):>9.3f}{TARGETS[command]:>8.2f}", flush=True)
    return 1 if is_slow else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
