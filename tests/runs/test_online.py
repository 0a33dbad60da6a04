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
luthier.train({**keys, **pushes})
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
    """(what the program wrote, the folder of the hub, the paths that it was asked for)."""
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
        return done.stdout, folder, list(hub.asked)


def test_results_arrive(online):
    stdout, folder, _ = online
    pushed, merged = (folder / "hub" / "models" / "me" / name for name in ("adapter", "merged"))
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= {file.name for file in pushed.iterdir()}
    assert json.loads((pushed / "adapter_config.json").read_text())["base_model_name_or_path"] == "someone/tiny"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in merged.iterdir()}
    assert "answer:" in stdout


def test_no_file_holds_a_token(online):
    _, folder, _ = online
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert len(files) > 50 and not [file for file in files if TOKEN.encode() in file.read_bytes()]


def test_a_short_stream_is_not_fetched_again_and_again(online):
    """Each pass over it takes several requests."""
    _, _, asked = online
    passes = asked.count("GET /api/datasets/someone/rows")
    assert passes < 40


def test_a_name_that_is_no_model_is_refused_with_its_reason(online):
    refused = [line for line in online[0].splitlines() if line.startswith("refused:")]
    assert len(refused) == 2
    assert "someone/none" in refused[0] and "(there is no such repository, or it is private)" in refused[0]
    assert "someone/rows" in refused[1] and "(it has no config.json)" in refused[1]
