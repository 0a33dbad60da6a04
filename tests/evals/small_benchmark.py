"""A benchmark of three subjects with twelve questions each, and models whose answers are known."""

import csv
import json
from pathlib import Path
from typing import Any

from tests.tiny import SPECIAL_TOKENS, byte_tokenizer, save_tiny

MAPPING = {
    "sums": {"name": "sums", "category": "STEM"},
    "towns": {"name": "small towns", "category": "Humanities"},
    "trades": {"name": "trades", "category": "Social Sciences"},
}
NUM_QUESTIONS, NUM_EXAMPLES = 12, 6


def row_of(subject: str, number: int, num_choices: int = 4) -> list[str]:
    """The right answer is that of the number: A, B, C, D, A, ..."""
    choices = [f"{subject} choice {number}.{place}" for place in range(num_choices)]
    return [f"{subject}: which one is number {number}?", *choices, "ABCDEFGHIJ"[number % num_choices]]


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return path


def write_benchmark(task_dir: Path, name: str = "mmlu", num_choices: int = 4) -> Path:
    """The folder `task_dir`/`name`, with files of all three splits."""
    folder = task_dir / name
    for split, count in (("test", NUM_QUESTIONS), ("val", NUM_QUESTIONS), ("dev", NUM_EXAMPLES)):
        for subject in MAPPING:
            rows = [row_of(subject, number, num_choices) for number in range(count)]
            write_csv(folder / "data" / split / f"{subject}_{split}.csv", rows)
    (folder / "mapping.json").write_text(json.dumps(MAPPING), encoding="utf-8")
    return folder


def constant_model(folder: Path, logits: dict[str, float]) -> Path:
    """A model that gives each of these letters its logit after any text, and everything else 0."""
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config

    config: Any = GPT2Config(
        vocab_size=256 + len(SPECIAL_TOKENS),
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=2048,
        tie_word_embeddings=False,
    )
    save_tiny(folder, config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = byte_tokenizer()
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.zero_()
        model.transformer.ln_f.bias[0] = 1
        model.lm_head.weight.zero_()
        for letter, logit in logits.items():
            model.lm_head.weight[tokenizer.encode(letter)[0], 0] = logit
    model.save_pretrained(folder)
    return folder
