"""What a run shards, as its keys say: FSDP, and stage 3 of ZeRO, whether its config is a mapping or a file."""

import json

import pytest

from luthier.config.keys.sharding import shards_weights, zero_stage
from luthier.config.load import load_train

TRAIN = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o"}


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("is_file", [False, True])
def test_the_stage_of_zero(tmp_path, stage, is_file):
    config = {"zero_optimization": {"stage": stage}}
    (tmp_path / "ds.json").write_text(json.dumps(config), encoding="utf-8")
    run = load_train({**TRAIN, "deepspeed": str(tmp_path / "ds.json") if is_file else config})
    assert zero_stage(run) == stage and shards_weights(run) == (stage == 3)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "{}", '{"zero_optimization": 3}'])
def test_a_config_that_says_no_stage(tmp_path, text):
    if text is not None:
        (tmp_path / "ds.json").write_text(text, encoding="utf-8")
    run = load_train({**TRAIN, "deepspeed": str(tmp_path / "ds.json")})
    assert zero_stage(run) is None and not shards_weights(run)


def test_settings_of_accelerate(tmp_path, monkeypatch):
    """Its launcher may give the stage alone, without a file."""
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    run = load_train(TRAIN)
    assert zero_stage(run) == 3 and shards_weights(run)
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}}', encoding="utf-8")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(tmp_path / "ds.json"))
    assert zero_stage(load_train(TRAIN)) == 2


def test_fsdp_shards_and_a_plain_run_does_not():
    assert shards_weights(load_train({**TRAIN, "fsdp": "full_shard"})) and not shards_weights(load_train(TRAIN))
