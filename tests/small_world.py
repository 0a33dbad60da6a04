"""A small world for training tests: a tiny Llama, a few rows, and run files for them."""

import json
from pathlib import Path
from typing import Any

from tests.tiny import tiny_llama

TALK = [
    {"from": "human", "value": "hi"},
    {"from": "gpt", "value": "hello there"},
    {"from": "human", "value": "2+2?"},
    {"from": "gpt", "value": "four"},
]
TOOL_TALK = [
    {"from": "human", "value": "weather in Rome?"},
    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Rome"}}'},
    {"from": "observation", "value": '{"sky": "clear"}'},
    {"from": "gpt", "value": "It is clear in Rome."},
]
TOOLS = json.dumps(
    [
        {
            "name": "weather",
            "description": "tells",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        }
    ]
)
PAIRS = [
    {
        "instruction": f"Say the number {number}.",
        "chosen": f"{'very ' * (number % 3)}well: {number}",
        "rejected": f"no{'!' * (number % 4 + 1)}",
    }
    for number in range(16)
]

FEEDBACK = [
    {
        "instruction": f"Say the number {number // 2}.",
        "output": f"{'very ' * (number % 3)}well: {number}" if number % 2 else f"no{'!' * (number % 5)}",
        "good": bool(number % 2),
    }
    for number in range(16)
]

WAYS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "lora": {"finetuning_type": "lora"},
    "oft": {"finetuning_type": "oft", "oft_block_size": 16},
    "qlora": {"finetuning_type": "lora", "quantization_bit": 4},
}
"""The ways to choose what learns."""


def small_world(folder: Path, **model_changes: Any) -> dict[str, Any]:
    """Writes model and data below `folder` and returns the keys that every run shares."""
    rows = [
        {"instruction": f"Say the number {number}.", "input": "", "output": f"{'very ' * (number % 5)}well: {number}"}
        for number in range(24)
    ]
    talks = [{"conversations": TOOL_TALK, "tools": TOOLS}, {"conversations": TALK}] * 12
    data = folder / "data"
    data.mkdir(parents=True)
    (data / "numbers.json").write_text(json.dumps(rows), encoding="utf-8")
    (data / "tools.json").write_text(json.dumps(talks), encoding="utf-8")
    weighted = [{"conversations": [{**message, "loss": n / 7} for n, message in enumerate(TALK, 3)]}] * 4
    weighted += [{"conversations": [*TALK[:3], {**TALK[3], "loss": [[0, 2, 0.5]]}]}, {"conversations": TALK}] * 2
    (data / "weighted.json").write_text(json.dumps(weighted), encoding="utf-8")
    (data / "pairs.json").write_text(json.dumps(PAIRS), encoding="utf-8")
    (data / "feedback.json").write_text(json.dumps(FEEDBACK), encoding="utf-8")
    (data / "plain.txt").write_text(
        "".join(f"This is line {n} of a plain text.\n" for n in range(60)), encoding="utf-8"
    )
    info = {
        "numbers": {"file_name": "numbers.json"},
        "tools": {
            "file_name": "tools.json",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "tools": "tools"},
        },
        "weighted": {"file_name": "weighted.json", "formatting": "sharegpt"},
        "pairs": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"},
        },
        "feedback": {
            "file_name": "feedback.json",
            "columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"},
        },
        "plain": {"file_name": "plain.txt", "columns": {"prompt": "text"}},
    }
    (data / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    return {
        "model_name_or_path": str(tiny_llama(folder / "model", max_position_embeddings=1024, **model_changes)),
        "dataset_dir": str(data),
        "dataset": "numbers",
        "template": "chatml",
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "cutoff_len": 700,
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_shuffling": True,
        "output_dir": str(folder / "out"),
        "overwrite_output_dir": True,
    }


def losses(result: Any) -> list[float]:
    return [logs["loss"] for logs in result.log_history if "loss" in logs]


def small_letters(completions: list[str]) -> list[float]:
    """A reward: the share of small letters."""
    return [sum(letter.islower() for letter in text) / max(len(text), 1) for text in completions]
