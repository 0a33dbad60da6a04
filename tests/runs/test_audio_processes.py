"""Runs on audio in several processes: workers of the data loader, two that train, and rows from a stream."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import luthier
from tests.runs.test_audio import NUM_ROWS, rows_of, write
from tests.runs.test_images import losses
from tests.runs.test_processes import start_two

pytest.importorskip("soundfile")
pytest.importorskip("soxr")


@pytest.fixture(scope="module")
def keys(tmp_path_factory) -> dict[str, Any]:
    """Rows have one, two and no sounds, in turn."""
    return write(tmp_path_factory.mktemp("hear"))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_resumed_run_with_workers_ends_with_the_same_bits(keys, tmp_path):
    keys = {**keys, "dataloader_num_workers": 2, "save_strategy": "steps", "save_steps": 2}
    luthier.train({**keys, "output_dir": str(tmp_path / "whole")})
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    luthier.train({**keys, "output_dir": str(tmp_path / "resumed"), "resume_from_checkpoint": checkpoint})
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "resumed")
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_report_tells_how_long_training_waited(keys, tmp_path):
    result = luthier.train({**keys, "max_steps": 1, "output_dir": str(tmp_path)})
    report = json.loads((tmp_path / "all_results.json").read_text())
    assert report["train_image_wait_seconds"] >= 0 and report["train_workers_needed"] == 0
    assert losses(result)


@pytest.mark.thorough
@pytest.mark.parametrize("packing", [False, True])
def test_a_stream_has_the_rows_of_the_table_and_trains(keys, tmp_path, packing):
    whole = rows_of(keys)[0].table
    data, _ = rows_of(keys, streaming=True, max_steps=1, buffer_size=1)
    rows, ledger = data.streamed.first(NUM_ROWS)
    assert rows == [whole[number] for number in range(NUM_ROWS)]
    assert sum(account.audios for account in ledger.accounts.values()) == 9
    given = {**keys, "streaming": True, "packing": packing, "neat_packing": packing, "output_dir": str(tmp_path)}
    found = losses(luthier.train(given))
    assert len(found) == 4 and found[-1] < found[0]
    before, after = weights(Path(keys["model_name_or_path"])), weights(tmp_path)
    assert any("audio_tower" in name and not torch.equal(after[name], before[name]) for name in after)


def test_packs_hold_the_sounds_of_their_rows_at_their_places(keys):
    plain, packed = rows_of(keys)[0].table, rows_of(keys, packing=True)[0].table
    blocks = {}
    for row in plain:
        for item, start, stop in zip(row["images"], row["blocks"][::2], row["blocks"][1::2], strict=True):
            blocks[item] = row["input_ids"][start:stop]
    assert len(packed) < len(plain) and sum(len(pack["images"]) for pack in packed) == len(blocks) == 9
    for pack in packed:
        for item, start, stop in zip(pack["images"], pack["blocks"][::2], pack["blocks"][1::2], strict=True):
            assert pack["input_ids"][start:stop] == blocks[item]


@pytest.mark.thorough
def test_two_processes_train_a_tower_though_one_of_them_hears_nothing(keys, tmp_path):
    """Each batch has two rows, and every third row has no sound. The weights are those of one process."""
    keys = {**keys, "disable_shuffling": True, "optim": "sgd", "learning_rate": 0.1}
    luthier.train({**keys, "per_device_train_batch_size": 2, "output_dir": str(tmp_path / "one")})
    run_file = tmp_path / "run.yaml"
    two = {**keys, "per_device_train_batch_size": 1, "output_dir": str(tmp_path / "two")}
    run_file.write_text(yaml.safe_dump(two), encoding="utf-8")
    done = start_two(run_file)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "a batch without audio gets a small one without content" in done.stderr
    one, other = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-6)
