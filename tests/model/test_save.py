"""Saved models load in plain transformers, in a process that knows nothing of this project."""

import json
import resource
import signal
import subprocess
import sys

import pytest
import torch

from luthier.core.errors import RunFailed
from luthier.core.files import save_folder_atomically
from luthier.model.files.sources import ModelSource
from luthier.model.loading.load import load_model
from luthier.model.save import WEIGHT_FILES, copy_value_head, num_bytes, write_model
from luthier.model.tokenizer import load_tokenizer
from tests.tiny import byte_tokenizer, tiny_llama

PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = tokenizer("plain", return_tensors="pt").input_ids
    print(tokenizer.padding_side, model(ids).logits.double().sum().item())
assert not any(name.startswith("luthier") for name in sys.modules)
"""


def save_model(model, tokenizer, target, **options):
    with save_folder_atomically(target, needed_bytes=num_bytes(model), replaces=WEIGHT_FILES) as folder:
        write_model(folder, model, tokenizer, **options)


@pytest.mark.thorough
def test_saved_models_load_in_plain_transformers(tmp_path):
    """With tied embeddings and without."""
    expected, folders = [], []
    for tied in (True, False):
        base, saved = tmp_path / f"base {tied}", tmp_path / f"saved {tied}"
        model = load_model(ModelSource(str(tiny_llama(base, tie_word_embeddings=tied))), dtype=torch.float32)
        tokenizer = load_tokenizer(ModelSource(str(base)))
        model.config.use_cache = False
        save_model(model, tokenizer, saved, max_shard_size="100KB")
        assert (saved / "model.safetensors.index.json").is_file()
        assert json.loads((saved / "config.json").read_text())["use_cache"] is True
        assert tokenizer.padding_side == "right"
        with torch.no_grad():
            expected.append(model(tokenizer("plain", return_tensors="pt").input_ids).logits.double().sum().item())
        folders.append(str(saved))
    words = [sys.executable, "-c", PLAIN, *folders]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=True)
    sides, totals = zip(*(line.split() for line in done.stdout.splitlines()), strict=True)
    assert sides == ("left", "left")
    assert [float(total) for total in totals] == pytest.approx(expected, abs=1e-4)


def test_sampling_settings_without_sampling_can_be_saved(tmp_path):
    folder = tiny_llama(tmp_path / "base")
    (folder / "generation_config.json").write_text(json.dumps({"do_sample": False, "temperature": 0.6, "top_p": 0.9}))
    model = load_model(ModelSource(str(folder)), dtype=torch.float32)
    save_model(model, byte_tokenizer(), tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert saved["do_sample"] is True
    assert saved["temperature"] == 0.6


def test_a_disk_that_fills_up_while_saving_leaves_the_old_model(tmp_path):
    model = load_model(ModelSource(str(tiny_llama(tmp_path / "base"))), dtype=torch.float32)
    tokenizer = load_tokenizer(ModelSource(str(tmp_path / "base")))
    save_model(model, tokenizer, tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    old_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    old_limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, old_limits[1]))
    try:
        with pytest.raises(RunFailed, match="what was there before is kept"):
            save_model(model, tokenizer, tmp_path / "saved")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limits)
        signal.signal(signal.SIGXFSZ, old_handler)
    assert {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "saved"]


def test_the_value_head_of_the_first_folder_that_has_one(tmp_path):
    for name in ("none", "first", "second", "target"):
        (tmp_path / name).mkdir()
    (tmp_path / "first" / "value_head.bin").write_bytes(b"1")
    (tmp_path / "second" / "value_head.safetensors").write_bytes(b"2")
    sources = [str(tmp_path / name) for name in ("none", "first", "second")]
    assert copy_value_head(sources[:1], tmp_path / "target") is None
    assert copy_value_head(sources, tmp_path / "target") == tmp_path / "target" / "value_head.bin"
    assert [file.name for file in (tmp_path / "target").iterdir()] == ["value_head.bin"]
