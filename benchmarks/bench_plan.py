"""Planned against measured peak memory of training: `python benchmarks/bench_plan.py [NAME ...]`.

Each run is a process of its own that trains SmolLM2-135M for two steps, or a smaller model with random weights that
reads images. What it planned before it loaded the weights is
compared with the most memory that the system saw it hold. The exit status is 1 if a plan is wrong by more than 15 %.
"""

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GGUF = ROOT / "models" / "SmolLM2-135M-Instruct.gguf"
LIMIT = 0.15
OFF, ON = {"disable_gradient_checkpointing": True}, {"disable_gradient_checkpointing": False}
RUNS: dict[str, dict[str, Any]] = {
    "lora 1x1024": {"cutoff_len": 1024, **OFF},
    "lora 1x1024, GGUF": {"model_name_or_path": str(GGUF), "cutoff_len": 1024, **OFF},
    "lora 4x512, checkpointing": {"cutoff_len": 512, "per_device_train_batch_size": 4, **ON},
    "lora bf16 4x512": {"cutoff_len": 512, "per_device_train_batch_size": 4, "bf16": True, **OFF},
    "lora bf16 8x128, checkpointing": {"cutoff_len": 128, "per_device_train_batch_size": 8, "bf16": True, **ON},
    "full 2x256": {"finetuning_type": "full", "cutoff_len": 256, "per_device_train_batch_size": 2, **OFF},
    "full bf16 1x512, checkpointing": {"finetuning_type": "full", "cutoff_len": 512, "bf16": True, **ON},
    "freeze 4x256": {"finetuning_type": "freeze", "cutoff_len": 256, "per_device_train_batch_size": 4, **OFF},
    "qlora 2x512": {"quantization_bit": 4, "cutoff_len": 512, "per_device_train_batch_size": 2, **OFF},
    "dpo lora 1x512": {"stage": "dpo", "dataset": "pairs", "cutoff_len": 512, **OFF},
    "rm lora 2x256": {
        "stage": "rm", "dataset": "pairs", "cutoff_len": 256, "per_device_train_batch_size": 2, **OFF,
    },
    "kto lora 4x256, checkpointing": {
        "stage": "kto", "dataset": "feedback", "cutoff_len": 256, "per_device_train_batch_size": 4, **ON,
    },
    "pt full 1x1024, accumulated": {
        "stage": "pt", "dataset": "plain", "finetuning_type": "full", "cutoff_len": 1024,
        "gradient_accumulation_steps": 2, **ON,
    },
    "muon full 2x256": {
        "use_muon": True, "finetuning_type": "full", "cutoff_len": 256, "per_device_train_batch_size": 2, **OFF,
    },
    "galore by layers, 16 bits, 2x256": {
        "use_galore": True, "galore_layerwise": True, "pure_bf16": True, "finetuning_type": "full", "cutoff_len": 256,
        "per_device_train_batch_size": 2, **OFF,
    },
}  # fmt: skip
EYES = {"freeze_vision_tower": False, "freeze_multi_modal_projector": False}
SEEING: dict[str, dict[str, Any]] = {
    "llava full 4 images, all learn": {"finetuning_type": "full", **EYES, **OFF},
    "llava full 4 images, checkpointing": {"finetuning_type": "full", **EYES, **ON},
    "llava lora 4 images": {"finetuning_type": "lora", **OFF},
}
"""Two images in each of two rows."""
WORDS = tuple(chr(97 + first) + chr(97 + second) for first in range(6) for second in range(6))


def write_data(folder: Path) -> None:
    drawn = random.Random(0)

    def text(fewest: int, most: int) -> str:
        return " ".join(drawn.choices(WORDS, k=drawn.randint(fewest, most)))

    files = {
        "long": [{"instruction": text(20, 60), "output": text(100, 1100)} for _ in range(64)],
        "pairs": [
            {"instruction": text(20, 60), "chosen": text(100, 500), "rejected": text(100, 500)} for _ in range(32)
        ],
        "feedback": [
            {"instruction": text(20, 60), "output": text(100, 500), "good": bool(number % 2)} for number in range(32)
        ],
    }
    for name, rows in files.items():
        (folder / f"{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    (folder / "plain.txt").write_text("\n".join(text(200, 400) for _ in range(40)), encoding="utf-8")
    columns = {"prompt": "instruction", "chosen": "chosen", "rejected": "rejected"}
    info = {
        "long": {"file_name": "long.json"},
        "pairs": {"file_name": "pairs.json", "ranking": True, "columns": columns},
        "feedback": {
            "file_name": "feedback.json",
            "columns": {"prompt": "instruction", "response": "output", "kto_tag": "good"},
        },
        "plain": {"file_name": "plain.txt", "columns": {"prompt": "text"}},
    }
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")


def write_safetensors(folder: Path) -> Path:
    """The model as a folder of safetensors, which loads without de-quantizing."""
    code = (
        "import sys, luthier; luthier.export({'model_name_or_path': sys.argv[1], 'export_dir': sys.argv[2],"
        " 'infer_dtype': 'float32', 'template': 'smollm2'})"
    )
    subprocess.run([sys.executable, "-c", code, str(GGUF), str(folder)], check=True, capture_output=True)
    return folder


def write_seeing(folder: Path) -> dict[str, Any]:
    """LLaVA with random weights, 576 tokens for an image. Returns the keys that its runs share."""
    from transformers import AutoModelForImageTextToText, CLIPImageProcessorPil, LlavaConfig, LlavaProcessor

    from tests.media_models import IMAGES_FIRST, TEXT, draw, media_tokenizer

    tokenizer = media_tokenizer(image_token="<image>")
    part = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    LlavaProcessor(
        image_processor=part, tokenizer=tokenizer, patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=IMAGES_FIRST,
    ).save_pretrained(folder / "seeing")  # fmt: skip
    layers = {"num_hidden_layers": 8, "num_attention_heads": 8}
    text = {"hidden_size": 512, "intermediate_size": 1408, "num_key_value_heads": 8, "head_dim": 64}
    vision = {"hidden_size": 384, "intermediate_size": 1536, "image_size": 336, "patch_size": 14}
    config = LlavaConfig(
        text_config={**TEXT, **layers, **text, "max_position_embeddings": 4096, "model_type": "llama"},
        vision_config={**vision, **layers, "model_type": "clip_vision_model"},
        image_token_index=tokenizer.image_token_id,
    )
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder / "seeing")
    images = [str(draw(folder / f"{number}.png", height=336, width=400, seed=number)) for number in range(8)]
    rows = [
        {
            "messages": [{"role": "user", "content": "<image><image>what"}, {"role": "assistant", "content": "red"}],
            "images": images[number : number + 2],
        }
        for number in range(0, 8, 2)
    ]
    (folder / "see.json").write_text(json.dumps(rows), encoding="utf-8")
    info = json.loads((folder / "dataset_info.json").read_text("utf-8"))
    columns = {"messages": "messages", "images": "images"}
    info["see"] = {"file_name": "see.json", "formatting": "openai", "columns": columns}
    (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
    places = {"model_name_or_path": str(folder / "seeing"), "dataset": "see", "template": "auto"}
    return {**places, "per_device_train_batch_size": 2, "cutoff_len": 2048}


def measure(keys: dict[str, Any], folder: Path) -> tuple[int, int, float, float]:
    """(planned bytes, measured bytes, planned seconds, seconds)."""
    run_file, output = folder / "run.json", folder / "out"
    run_file.write_text(json.dumps({**keys, "output_dir": str(output)}), encoding="utf-8")
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [sys.executable, "-m", "luthier", "train", str(run_file)], stdout=log, stderr=log, preexec_fn=lambda: os.nice(5)
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit((folder / "log").read_text(encoding="utf-8"))
    plan = json.loads((output / "manifest.json").read_text(encoding="utf-8"))["plan"]
    return plan["planned_peak_bytes"], usage.ru_maxrss * 1024, plan["planned_seconds"], plan["seconds"]


def main(names: list[str]) -> int:
    is_wrong = False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder)
        seeing = write_seeing(folder)
        runs = RUNS | {title: {**seeing, **keys} for title, keys in SEEING.items()}
        names = names or list(runs)
        model = folder / "model" if set(names) <= set(SEEING) else write_safetensors(folder / "model")
        shared = {
            "model_name_or_path": str(model), "dataset_dir": name, "dataset": "long", "template": "smollm2",
            "stage": "sft", "do_train": True, "finetuning_type": "lora", "per_device_train_batch_size": 1,
            "max_steps": 2, "save_strategy": "no", "overwrite_output_dir": True, "logging_steps": 1,
        }  # fmt: skip
        print(f"{'run':<34}{'planned GB':>11}{'measured GB':>12}{'ratio':>7}{'planned s':>11}{'s':>7}", flush=True)
        for title in names:
            planned, measured, planned_seconds, seconds = measure({**shared, **runs[title]}, folder)
            ratio = planned / measured
            is_wrong |= abs(ratio - 1) > LIMIT
            print(
                f"{title:<34}{planned / 1e9:>11.3f}{measured / 1e9:>12.3f}{ratio:>7.2f}"
                f"{planned_seconds:>11.1f}{seconds:>7.1f}",
                flush=True,
            )
            time.sleep(0.1)
    return 1 if is_wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
