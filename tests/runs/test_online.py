"""A machine that reaches the hub: models and rows come from there, and results go there."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.hub_server import hub_at
from tests.small_world import small_world

TOKEN = "hf_of-this-test"
PROGRAM = """
import json, sys
import luthier
from luthier.core.errors import InvalidInput
keys = json.loads(sys.argv[1])
pushes = {"push_to_hub": True, "hub_model_id": "me/adapter", "hub_token": sys.argv[2], "hf_hub_token": sys.argv[2]}
checkpoints = {"hub_strategy": "all_checkpoints", "hub_always_push": True, "save_strategy": "steps", "save_steps": 1}
luthier.train({**keys, **pushes, **checkpoints, "save_total_limit": 1, "max_steps": 3})
infers = {"model_name_or_path": keys["model_name_or_path"], "template": keys["template"]}
merged = {"export_dir": keys["output_dir"] + "-merged", "export_hub_model_id": "me/merged"}
luthier.export({**infers, **merged, "adapter_name_or_path": "me/adapter", "hf_hub_token": sys.argv[2]})
print("answer:", luthier.chat({**infers, "model_name_or_path": "me/merged", "max_new_tokens": 1}).ask("hi"))
print("streams", file=sys.stderr, flush=True)
luthier.train({**keys, "streaming": True, "output_dir": keys["output_dir"] + "-streamed"})
for name in ("someone/none", "someone/rows"):
    try:
        luthier.train({**keys, "model_name_or_path": name, "output_dir": "out-refused"})
    except InvalidInput as fault:
        print("refused:", fault)
"""


@pytest.fixture(scope="module")
def online(tmp_path_factory):
    """(what the program wrote, the folder of all files, the hub)."""
    folder = tmp_path_factory.mktemp("world")
    keys = {**small_world(folder), "finetuning_type": "lora", "max_steps": 1, "output_dir": str(folder / "out")}
    models, rows = folder / "hub" / "models" / "someone", folder / "hub" / "datasets" / "someone" / "rows"
    shutil.copytree(keys["model_name_or_path"], models / "tiny")
    (models / "rows").mkdir()
    rows.mkdir(parents=True)
    talk = [{"instruction": f"Say {number}.", "output": f"well: {number}"} for number in range(20)]
    (rows / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    keys |= {"model_name_or_path": "someone/tiny", "dataset": "someone/rows", "dataset_dir": "ONLINE"}
    with hub_at(folder / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, json.dumps(keys), TOKEN],
            env={**os.environ, **hub.environment, "OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, folder, hub


def test_results_arrive(online):
    stdout, folder, _ = online
    pushed, merged = (folder / "hub" / "models" / "me" / name for name in ("adapter", "merged"))
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {file.name for file in pushed.iterdir()}
    assert json.loads((pushed / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in merged.iterdir()}
    assert "answer:" in stdout


def test_checkpoints_arrive_whole_though_they_are_removed_here(online):
    """The weights first, then all of it, to resume from."""
    _, folder, hub = online
    assert [file.name for file in (folder / "out").glob("checkpoint-*")] == ["checkpoint-3"]
    of_training = hub.commits[:6]
    for number, (weights, whole) in enumerate(zip(of_training[::2], of_training[1::2], strict=True), 1):
        assert {"adapter_model.safetensors", "tokenizer.json"} <= set(weights)
        assert not {"optimizer.pt", "rng_state.pth", "trainer_state.json", "manifest.json"} & set(weights)
        place = f"checkpoint-{number}"
        assert {f"{place}/adapter_model.safetensors", f"{place}/optimizer.pt", f"{place}/manifest.json"} <= set(whole)
        assert json.loads(whole[f"{place}/trainer_state.json"])["global_step"] == number
        assert whole[f"{place}/adapter_model.safetensors"] == weights["adapter_model.safetensors"]
    assert not [path for path in (folder / "out").iterdir() if path.name.startswith(".")]


def test_no_file_holds_a_token(online):
    _, folder, hub = online
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 50 and not [file for file in files if TOKEN.encode() in file.read_bytes()]
    assert not [path for commit in hub.commits for path, content in commit.items() if TOKEN.encode() in content]


def test_a_short_stream_is_not_fetched_again_and_again(online):
    """Each pass over it takes several requests."""
    _, _, hub = online
    passes = hub.asked.count("GET /api/datasets/someone/rows")
    assert passes < 40


def test_a_name_that_is_no_model_is_refused_with_its_reason(online):
    refused = [line for line in online[0].splitlines() if line.startswith("refused:")]
    assert len(refused) == 2
    assert "someone/none" in refused[0] and "(there is no such repository, or it is private)" in refused[0]
    assert "someone/rows" in refused[1] and "(it has no config.json)" in refused[1]
