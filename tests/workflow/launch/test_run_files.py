"""A run file that is handed to another process says the same and holds no secret."""

from luthier.config.load import load, load_train, read_text
from luthier.workflow.launch.run_files import run_file

KEYS = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True, "learning_rate": 3e-5}
MORE = {"run_name": "a\\${b}", "hub_token": "hf_${x}", "hub_model_id": "1e5"}
MORE |= {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_cycles": 2, "decay_type": "\\${y}"}}


def test_it_says_the_same(monkeypatch):
    monkeypatch.setenv("TOKEN", "hf_$x")
    run = load_train({**KEYS, **MORE, "hub_token": "${oc.env:TOKEN}", "lora_target": "q_proj,v_proj"})
    file = run_file(run.given)
    assert "hf_" not in file.text and file.environment == {"LUTHIER_HUB_TOKEN": "hf_$x"}
    assert file.keys["hub_token"] == "${oc.env:LUTHIER_HUB_TOKEN}" and file.keys["lora_target"] == ["q_proj", "v_proj"]
    for name, secret in file.environment.items():
        monkeypatch.setenv(name, secret)
    written = read_text(file.text, "run.yaml")
    assert not written.problems
    again = load("train", written)
    assert again.given == run.given
    assert again.given["run_name"] == "a${b}" and again.given["lr_scheduler_kwargs"]["decay_type"] == "${y}"
