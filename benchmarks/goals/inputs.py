"""What the measured programs read: SmolLM2-135M, a teacher of twice its size, and rows of lengths as in alpaca.

The rows are made of the English sentences of examples/data/plain_text.txt, drawn from a fixed seed. Instructions have
8 to 30 words and answers 60 to 240, so that about three quarters of the tokens are labeled, as in alpaca.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.bench_plan import write_safetensors

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "SmolLM2-135M-float32"
TEACHER = ROOT / "models" / "SmolLM2-135M-twice"
NUM_ROWS = 64

DATASET_INFO = {
    "texts": {"file_name": "texts.json", "columns": {"prompt": "instruction", "response": "output"}},
    "pairs": {
        "file_name": "pairs.json",
        "ranking": True,
        "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
    },
    "feedback": {
        "file_name": "feedback.json",
        "columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"},
    },
}

DOUBLE = """\
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
import copy, torch
source, target = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
layers = model.model.layers
layers.extend(copy.deepcopy(layer) for layer in list(layers))
for index, layer in enumerate(layers):
    layer.self_attn.layer_idx = index
model.config.num_hidden_layers = len(layers)
if getattr(model.config, "layer_types", None):
    model.config.layer_types = model.config.layer_types * 2
model.save_pretrained(target)
AutoTokenizer.from_pretrained(source).save_pretrained(target)
"""


def model_folder() -> Path:
    """The model as a folder of safetensors in float32. Made once from the GGUF file; half a gigabyte."""
    if not (MODEL / "config.json").is_file():
        write_safetensors(MODEL)
    return MODEL


def teacher_folder() -> Path:
    """The model with each layer twice, in bfloat16: as slow as a teacher of twice the size. Made once."""
    if not (TEACHER / "config.json").is_file():
        subprocess.run([sys.executable, "-c", DOUBLE, str(model_folder()), str(TEACHER)], check=True, cwd=ROOT)
    return TEACHER


def write_data(folder: Path) -> None:
    """Writes the datasets `texts`, `pairs` and `feedback`, `NUM_ROWS` rows each, and their dataset_info.json."""
    lines = (ROOT / "examples" / "data" / "plain_text.txt").read_text(encoding="utf-8").splitlines()
    words = [word for line in lines if line.isascii() for word in line.split()]
    drawn = random.Random(0)

    def text(fewest: int, most: int) -> str:
        start = drawn.randrange(len(words))
        length = drawn.randint(fewest, most)
        return " ".join(words[(start + number) % len(words)] for number in range(length))

    def instruction() -> str:
        return text(8, 30)

    files: dict[str, list[dict[str, Any]]] = {
        "texts": [{"instruction": instruction(), "output": text(60, 240)} for _ in range(NUM_ROWS)],
        "pairs": [
            {"instruction": instruction(), "chosen": text(60, 240), "rejected": text(60, 240)} for _ in range(NUM_ROWS)
        ],
        "feedback": [
            {"instruction": instruction(), "output": text(60, 240), "good": bool(number % 2)}
            for number in range(NUM_ROWS)
        ],
    }
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps(DATASET_INFO), encoding="utf-8")


def run_keys(model: Path, folder: Path, num_steps: int, batch_size: int) -> dict[str, Any]:
    """The keys that all measured runs share. `num_steps`: with the one that warms up."""
    return {
        "model_name_or_path": str(model),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "dataset_dir": str(folder),
        "dataset": "texts",
        "max_samples": num_steps * batch_size,
        "template": "smollm2",
        "cutoff_len": 1024,
        "per_device_train_batch_size": batch_size,
        "max_steps": num_steps,
        "learning_rate": 1e-4,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_shuffling": True,
        "overwrite_output_dir": True,
        "output_dir": str(folder / "out"),
    }


def token_rows(keys: Mapping[str, Any], folder: Path) -> Path:
    """The rows of this run as token ids, one JSON object a line, for programs that do not tokenize themselves."""
    run_file, rows = folder / f"{keys['stage']}.json", folder / f"{keys['stage']}.rows.jsonl"
    run_file.write_text(json.dumps(dict(keys)), encoding="utf-8")
    with rows.open("w", encoding="utf-8") as file:
        words = [sys.executable, "-m", "luthier", "data", str(run_file), "--json"]
        done = subprocess.run(words, stdout=file, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment(folder))
    if done.returncode:
        raise RuntimeError(f"luthier data failed:\n{done.stderr}")
    return rows


def read_rows(rows: Path) -> list[dict[str, Any]]:
    """What `token_rows` has written."""
    return [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]


def environment(folder: Path) -> dict[str, str]:
    """A cache of its own, so that nothing computed by an earlier run is used."""
    return {**os.environ, "LUTHIER_CACHE": str(folder / "cache")}
