"""The tables of docs/plan.md: `luthier plan` for a Llama of 70 billion parameters on 8 and 64 accelerators.

    python -m tools.plan_table            print them
    python -m tools.plan_table --write    put them into docs/plan.md

The model is a config.json without weights, of the shape of Llama 3.3 70B, with a tokenizer of bytes. Rows are packed to
4,096 tokens, so the texts do not matter.
"""

import contextlib
import io
import json
import re
import sys
import tempfile
from pathlib import Path

from luthier.cli import main as luthier

PAGE = Path(__file__).resolve().parents[1] / "docs" / "plan.md"
MARKS = "<!-- python -m tools.plan_table -->\n", "<!-- end -->"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
}
RUNS = {
    "LoRA of rank 8 on all linear layers": ["finetuning_type=lora", "lora_target=all"],
    "All weights": ["finetuning_type=full"],
}
PROCESSES, ACCELERATOR = "8,64", "80GB"


def write_model(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in ("<s>", "</s>")])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")


def tables() -> str:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        (folder / "rows.txt").write_text("\n".join("word " * 2000 for _ in range(80)), encoding="utf-8")
        info = {"rows": {"file_name": "rows.txt", "columns": {"prompt": "text"}}}
        (folder / "dataset_info.json").write_text(json.dumps(info), encoding="utf-8")
        keys = [f"model_name_or_path={folder / 'model'}", f"dataset_dir={folder}", "dataset=rows", "stage=pt"]
        keys += ["do_train=true", "bf16=true", "packing=true", "cutoff_len=4096", "per_device_train_batch_size=1"]
        keys += ["max_steps=100", f"output_dir={folder / 'out'}", "overwrite_cache=true"]
        options = ["--processes", PROCESSES, "--accelerator", ACCELERATOR, "--table"]
        return "\n".join(f"{title}:\n\n{_planned([*keys, *more, *options])}" for title, more in RUNS.items())


def _planned(words: list[str]) -> str:
    found = io.StringIO()
    with contextlib.redirect_stdout(found):
        status = luthier(["plan", *words])
    assert status == 0, words
    return found.getvalue()


def main(argv: list[str]) -> int:
    text = tables()
    if argv != ["--write"]:
        print(text)
        return 0
    start, end = map(re.escape, MARKS)
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        re.sub(f"({start}).*?({end})", lambda m: f"{m[1]}\n{text}\n{m[2]}", page, flags=re.S), encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
