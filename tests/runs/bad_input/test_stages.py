"""Faults in what a stage is given beside its model: other models, functions, servers, memory."""

import json
import shutil
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from luthier.core.errors import RunFailed
from tests.tiny import byte_tokenizer, tiny_llama

PPO = {"stage": "ppo", "finetuning_type": "lora", "max_new_tokens": 4}
GRPO = {"stage": "grpo", "per_device_train_batch_size": 8, "max_new_tokens": 4}
OTHERS: dict[str, dict[str, Any]] = {
    "ref_model": {"stage": "dpo", "dataset": "pairs"},
    "teacher_model": {"stage": "gkd"},
    "reward_model": {**PPO, "reward_model_type": "full"},
}
"""Key that names a model -> a run that reads it."""


@pytest.fixture(scope="module")
def adapters(small_keys, tmp_path_factory) -> dict[str, str]:
    """One that writes, and one that scores."""
    import luthier

    folder = tmp_path_factory.mktemp("adapters")
    keys = {**small_keys, "finetuning_type": "lora", "max_steps": 1}
    luthier.train({**keys, "output_dir": str(folder / "writes")})
    luthier.train({**keys, "output_dir": str(folder / "scores"), "stage": "rm", "dataset": "pairs"})
    return {name: str(folder / name) for name in ("writes", "scores")}


@pytest.mark.parametrize("key", OTHERS)
def test_another_model_that_is_not_there(person, key):
    missing = str(person.folder / "none")
    said = person.is_refused(**OTHERS[key], **{key: missing})
    assert f"{key}: '{missing}': there is no such model file or folder" in said
    own = person.keys["model_name_or_path"]
    said = person.is_refused(**OTHERS[key], **{key: own, f"{key}_adapters": missing})
    assert f"{key}_adapters: '{missing}': there is no such adapter folder -> correct the path" in said


@pytest.mark.parametrize("key", OTHERS)
def test_another_model_that_is_damaged(person, model, key):
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    said = person.is_refused(**OTHERS[key], **{key: str(model)})
    assert f"{key}: '{model}': " in said
    assert "this file is cut off or damaged: 461,176 bytes instead of 462,176" in said


@pytest.mark.parametrize("key", OTHERS)
def test_an_adapter_where_a_model_is_wanted(person, adapters, key):
    said = person.is_refused(**OTHERS[key], **{key: adapters["writes"]})
    assert f"{key}: '{adapters['writes']}': this is an adapter, not a model" in said
    assert f"name its base model here, and the adapter as {key}_adapters" in said


def test_a_reward_model_of_another_kind(person, adapters):
    own = person.keys["model_name_or_path"]
    said = person.is_refused(**PPO, reward_model=own)
    assert f"reward_model: '{own}': this is a model, not an adapter -> set reward_model_type: full" in said
    said = person.is_refused(**PPO, reward_model=own, reward_model_type="full")
    assert (
        f"'{own}': this model has no reward head, so it cannot score answers -> name one that was trained with" in said
    )
    said = person.is_refused(**PPO, reward_model=adapters["writes"])
    assert (
        "this adapter has no reward head, so it cannot score answers -> name one that was trained with stage: rm"
        in said
    )
    assert person.trains(**PPO, reward_model=adapters["scores"], max_steps=1).status == 0
    keys = {**PPO, "reward_model": own, "reward_model_adapters": adapters["scores"], "reward_model_type": "full"}
    assert person.trains(**keys, max_steps=1, overwrite_output_dir=True).status == 0


def other_vocabulary(folder: Path) -> str:
    """The same tokens, and two of them the other way round."""
    tiny_llama(folder)
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    words = content["model"]["vocab"]
    words["a"], words["b"] = words["b"], words["a"]
    file.write_text(json.dumps(content))
    assert byte_tokenizer().convert_tokens_to_ids("a") != words["a"]
    return str(folder)


@pytest.mark.parametrize("key", OTHERS)
def test_another_model_of_another_vocabulary(person, adapters, key):
    other = other_vocabulary(person.folder / "other")
    more = {"reward_model_adapters": adapters["scores"]} if key == "reward_model" else {}
    said = person.trains(**OTHERS[key], **{key: other}, **more).complaint(2)
    assert said.startswith(f"luthier: {key}: {other}: its tokenizer is another one ('")
    assert "-> name a model with the same tokenizer" in said
    assert not list(person.out.glob("*.safetensors"))


@pytest.mark.parametrize("key", OTHERS)
def test_another_model_that_no_memory_holds(person, model, adapters, key):
    """A terabyte of zeros, which takes no room on the disk, as its embedding."""
    num_rows = 10**12 // 4 // 64
    shape = {"dtype": "F32", "shape": [num_rows, 64], "data_offsets": [0, num_rows * 256]}
    text = json.dumps({"model.embed_tokens.weight": shape}).encode()
    with (model / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + num_rows * 256)
    more = {"reward_model_adapters": adapters["scores"]} if key == "reward_model" else {}
    path = person.run_file(**OTHERS[key], **{key: str(model)}, **more)
    said = person.types("train", path).complaint(2)
    assert said.startswith(f"luthier: {key}: {model}: its weights take 1,000.000 GB of memory in float32, and ")
    assert "are free -> " in said


def test_memory_that_is_refused_is_one_clear_error():
    import torch

    from luthier.model.loading.memory_check import enough_memory

    asked = r"not enough memory: .*you tried to allocate 4000000000000000 bytes.* -> less"
    with pytest.raises(RunFailed, match=asked), enough_memory("less"):
        torch.empty(10**15)
    with pytest.raises(RunFailed, match="not enough memory: MemoryError -> less"), enough_memory("less"):
        bytearray(10**15)
    with pytest.raises(RuntimeError, match="must match"), enough_memory("less"):
        torch.ones(2) + torch.ones(3)


@pytest.fixture
def rewards(person) -> Path:
    """A file of functions that says when it is run."""
    path = person.folder / "rewards.py"
    path.write_text(
        "from pathlib import Path\n"
        "Path(__file__).with_suffix('.ran').touch()\n"
        "calls = []\n"
        "def letters(completions):\n"
        "    return [float(len(text)) for text in completions]\n"
        "def fails_at_the_third(completions):\n"
        "    calls.append(1)\n"
        "    return [float('nan') if len(calls) == 3 else 0.0 for _ in completions]\n"
    )
    return path


def test_a_missing_function_is_reported_before_its_file_is_run(person, rewards):
    said = person.is_refused(**GRPO, reward_funcs=f"{rewards}:leters")
    assert f"{rewards} has no function leters -> correct the name; it has letters, fails_at_the_third" in said
    said = person.is_refused(**GRPO, reward_funcs=f"{rewards}x.py:letters")
    assert f"there is no file {rewards}x.py -> correct the path (relative to {Path.cwd()})" in said
    said = person.is_refused(**GRPO, reward_funcs=str(rewards))
    assert "write file.py:function or module:function" in said
    rewards.write_text(rewards.read_text() + "def broken(:\n")
    said = person.is_refused(**GRPO, reward_funcs=f"{rewards}:letters")
    assert f"{rewards}, line 9, is not Python: " in said
    assert not rewards.with_suffix(".ran").exists()


@pytest.mark.parametrize(
    "line", ["from math import fsum as found", "found = max", "from math import *", "if True:\n    found = max"]
)
def test_a_name_that_a_file_has_in_another_way_is_believed(line, tmp_path):
    from luthier.workflow.preflight.frozen_models import _reason_against

    (tmp_path / "f.py").write_text(line + "\n")
    assert _reason_against(str(tmp_path / "f.py"), "found") is None
    assert (_reason_against(str(tmp_path / "f.py"), "other") is None) == line.endswith("*")


def test_checkpoints_saved_before_a_function_fails_are_kept(person, rewards):
    keys = {**GRPO, "reward_funcs": f"{rewards}:fails_at_the_third", "max_steps": 5}
    said = person.trains(**keys, save_strategy="steps", save_steps=1).complaint(1)
    assert f"reward_funcs: {rewards}:fails_at_the_third: the score of answer 0 is nan, not a finite number" in said
    assert sorted(path.name for path in person.out.glob("*checkpoint*")) == ["checkpoint-1", "checkpoint-2"]
    for step in (1, 2):
        assert person.types("verify", str(person.out / f"checkpoint-{step}")).status == 0


class Slow(BaseHTTPRequestHandler):
    """Does not answer as long as somebody waits."""

    is_over = threading.Event()

    def do_POST(self) -> None:
        self.is_over.wait()

    def log_message(self, *args: Any) -> None:
        pass


def test_a_server_that_is_slow():
    from luthier.training.rewards.server import RewardServer

    server = HTTPServer(("127.0.0.1", 0), Slow)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}/"
    with pytest.raises(RunFailed) as caught:
        RewardServer(address, timeout_seconds=0.1, pause_seconds=0.0)([])
    Slow.is_over.set()
    server.shutdown()
    assert str(caught.value) == (
        f"reward_model: {address}: no scores (timed out); earlier checkpoints are kept -> check the server"
    )


def test_unavailable_attention_is_replaced_and_reported_once_and_in_the_manifest(person):
    from luthier.core.machine import detect

    if detect().device != "cpu":
        pytest.skip("this machine may have it")
    outcome = person.trains(flash_attn="fa2", max_steps=1)
    assert outcome.status == 0
    reason = "FlashAttention-2 needs a GPU and this machine has none: sdpa attention runs instead"
    assert outcome.err.count(f"flash_attn: fa2: {reason}") == outcome.err.count("flash_attn") == 1
    manifest = json.loads((person.out / "manifest.json").read_text())
    assert manifest["not_as_asked"] == {"flash_attn": reason}
    shutil.rmtree(person.out)
    assert person.trains(flash_attn="sdpa", max_steps=1).status == 0
    assert "not_as_asked" not in json.loads((person.out / "manifest.json").read_text())


def test_qlora_trains_the_two_named_projections_and_nothing_else(person):
    """Two layers, each with A (8, 64) and B (64, 8) for q, and A (8, 64) and B (32, 8) for v."""
    pytest.importorskip("bitsandbytes")
    from safetensors.torch import load_file

    outcome = person.trains(finetuning_type="lora", lora_target="q_proj,v_proj", quantization_bit=4, max_steps=1)
    assert outcome.status == 0, outcome.err
    trainable = 2 * (8 * 64 + 64 * 8 + 8 * 64 + 32 * 8)
    total = trainable + 115_008
    assert f"trainable parameters: {trainable:,} of {total:,} ({trainable / total:.4%})" in outcome.err
    names = load_file(person.out / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}
    assert sum(weight.numel() for weight in names.values()) == trainable


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"finetuning_type": "lora", "lora_target": ""}, "lora_target: '': names no module -> write lora_target: all"),
        ({"finetuning_type": "lora", "lora_target": "all-linear"}, "is what peft calls it, and here it is called all"),
        ({"finetuning_type": "oft", "oft_target": ""}, "oft_target: '': names no module -> write oft_target: all"),
        ({"finetuning_type": "oft", "oft_rank": 1000}, "oft_rank: 1000: blocks of one number cannot be rotated"),
        (
            {"use_galore": True, "galore_target": ""},
            "galore_target: '': names no module, so nothing would be projected",
        ),
        (
            {"use_apollo": True, "apollo_target": ""},
            "apollo_target: '': names no module, so nothing would be projected",
        ),
        ({"use_galore": True, "galore_target": "q_prj"}, "luthier: galore_target: no module of this model is called"),
        (
            {"use_badam": True, "badam_start_block": 5},
            "luthier: badam_start_block: 5: this model has the blocks 0 to 1",
        ),
    ],
)
def test_no_trainable_parameters(person, keys, words):
    assert words in person.trains(**keys).complaint(2)


def test_what_stages_name_is_looked_at_without_torch(person):
    path = person.run_file(**OTHERS["ref_model"], ref_model=str(person.folder / "none"))
    program = (
        "import sys\n"
        "from luthier.cli import main\n"
        f"assert main(['train', {path!r}]) == 2\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "ref_model: " in done.stderr
