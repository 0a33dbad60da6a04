"""What a command has imported when it is done. A library that it does not need would cost every run its start."""

import json
import os
import subprocess
import sys

from tests.hub_cache import put_into_cache
from tests.tiny import tiny_llama

TABLES = {"datasets", "pandas"}
NUMBERS = {"torch._C", "torch._dynamo", "accelerate", "peft", "scipy", "sympy", "bitsandbytes"}
"""`torch._C` is there once torch is executed."""
NEVER_NEEDED = TABLES | {"sklearn", "matplotlib", "tensorboard", "tensorflow", "IPython", "scipy", "fastapi", "gguf"}
NEVER_NEEDED |= {"deepspeed"}
COMPILER = "torch._inductor.compile_fx"
CODE = """
import contextlib, io, json, sys
from luthier.cli import main
for command in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()):
        status = main(command)
    assert status == 0, command
    print(json.dumps(sorted(sys.modules)))
"""


def modules_after(*commands: list[str]) -> list[set[str]]:
    """The modules that are there after each command. They run one after the other in one process."""
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", CODE, json.dumps(commands)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    return [set(json.loads(line)) for line in done.stdout.splitlines()]


def run_file(folder):
    rows = [{"instruction": f"Who are you {number}?", "input": "", "output": "An assistant."} for number in range(4)]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "dataset_info.json").write_text('{"rows": {"file_name": "rows.json"}}')
    keys = {
        "model_name_or_path": str(tiny_llama(folder / "model")),
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "template": "chatml",
        "dataset": "rows",
        "dataset_dir": str(folder),
        "output_dir": str(folder / "out"),
        "max_steps": 1,
        "val_size": 0.25,
        "report_to": "none",
    }
    (folder / "run.json").write_text(json.dumps(keys))
    (folder / "chat.json").write_text(
        json.dumps({"model_name_or_path": keys["model_name_or_path"], "template": "chatml", "max_new_tokens": 1})
    )
    (folder / "model" / "chat_template.jinja").write_text(
        "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}</s>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return str(folder / "run.json")


def test_rows_and_chat_formats_need_no_torch(tmp_path):
    run = run_file(tmp_path)
    put_into_cache(tmp_path / "model", "someone/llama", tmp_path)
    by_name = ["model_name_or_path=someone/llama", f"cache_dir={tmp_path}"]
    commands = (
        *(["data", run], ["data", run, "--json"], ["template", "check", str(tmp_path / "model")]),
        ["data", run, *by_name],
    )
    for command, modules in zip(commands, modules_after(*commands), strict=True):
        assert not modules & (NUMBERS | NEVER_NEEDED), command


def test_chat_without_adapters_needs_no_peft(tmp_path):
    run_file(tmp_path)
    (modules,) = modules_after(["chat", str(tmp_path / "chat.json"), "--once", "hi"])
    assert not modules & {"peft", "bitsandbytes"}


def test_training_and_chat_import_nothing_that_they_do_not_need(tmp_path):
    run = run_file(tmp_path)
    commands = (["train", run], ["chat", str(tmp_path / "chat.json"), "--once", "hi"])
    for command, modules in zip(commands, modules_after(*commands), strict=True):
        assert "torch._C" in modules and not modules & (NEVER_NEEDED | {COMPILER}), command
