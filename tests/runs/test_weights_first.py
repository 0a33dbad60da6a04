"""Weights outlive whatever cannot be saved beside them: a tokenizer, a config, settings, a processor, the arguments."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerBase

import luthier
from luthier.config.load import load_train
from luthier.core.errors import RunFailed
from luthier.model import save
from luthier.training import trainer as trainer_module
from luthier.workflow.training import train
from tests.small_world import small_world

KINDS: dict[str, dict[str, Any]] = {
    "full": {"finetuning_type": "full"},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "lora": {"finetuning_type": "lora"},
    "oft": {"finetuning_type": "oft", "oft_block_size": 16},
    "qlora": {"finetuning_type": "lora", "quantization_bit": 4},
    "scores": {"finetuning_type": "full", "stage": "rm", "dataset": "pairs"},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    keys = small_world(tmp_path_factory.mktemp("world"))
    return {**keys, "max_steps": 2, "save_strategy": "steps", "save_steps": 1, "report_to": "none"}


class Unknown(Exception):
    """Of no kind that anybody expects, as libraries written in Rust raise them."""


def fails(*args: Any, **options: Any) -> None:
    raise Unknown("it cannot be written")


PARTS = {
    "config.json": (LlamaConfig, "save_pretrained"),
    "generation_config.json": (GenerationConfig, "save_pretrained"),
    "the tokenizer": (PreTrainedTokenizerBase, "save_pretrained"),
    "the processor": (save, "copy_processor"),
    "training_args.bin": (trainer_module.torch, "save"),
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = folder.glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tokenizer_that_cannot_be_saved_costs_nothing_else(world, tmp_path, monkeypatch, kind):
    keys = {**world, **KINDS[kind]}
    train(load_train({**keys, "output_dir": str(tmp_path / "whole")}))
    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", fails)
    out = tmp_path / "out"
    with pytest.raises(
        RunFailed, match=r"out: the weights are saved, but not the tokenizer \(Unknown: it cannot"
    ) as caught:
        train(load_train({**keys, "output_dir": str(out)}))
    assert f"-> copy what is missing from {world['model_name_or_path']}" in str(caught.value)
    for folder in ("", "checkpoint-1", "checkpoint-2"):
        found, expected = weights(out / folder), weights(tmp_path / "whole" / folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    missing = {path.name for path in (tmp_path / "whole").iterdir()} - {path.name for path in out.iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json"} <= missing
    assert not {"config.json", "adapter_config.json", "training_args.bin"} & missing


@pytest.mark.parametrize("part", PARTS)
def test_nor_does_any_other_part(world, tmp_path, monkeypatch, part):
    out = tmp_path / "out"
    monkeypatch.setattr(*PARTS[part], fails)
    with pytest.raises(RunFailed, match=f"the weights are saved, but not {part} "):
        train(load_train({**world, "save_strategy": "no", "output_dir": str(out)}))
    assert len(weights(out)) > 10
    names = {"config.json", "generation_config.json", "tokenizer.json", "training_args.bin"} - {part}
    names -= {"tokenizer.json"} if part == "the tokenizer" else set()
    assert names <= {path.name for path in out.iterdir()}


@pytest.mark.parametrize("part", ["config.json", "generation_config.json", "the tokenizer", "the processor"])
def test_an_export_keeps_its_weights_too(world, tmp_path, monkeypatch, part):
    monkeypatch.setattr(*PARTS[part], fails)
    keys = {"model_name_or_path": world["model_name_or_path"], "template": "chatml"}
    with pytest.raises(RunFailed, match=f"merged: the weights are saved, but not {part} "):
        luthier.export({**keys, "export_dir": str(tmp_path / "merged")})
    assert len(weights(tmp_path / "merged")) > 10


def test_at_the_end_a_full_disk_keeps_the_weights_as_well(world, tmp_path, monkeypatch):
    def is_full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", is_full)
    with pytest.raises(RunFailed, match="No space left on device"):
        train(load_train({**world, "save_strategy": "no", "output_dir": str(tmp_path / "out")}))
    assert len(weights(tmp_path / "out")) > 10


def test_a_checkpoint_that_the_disk_does_not_take_is_none(world, tmp_path, monkeypatch):
    def is_full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", is_full)
    with pytest.raises(RunFailed, match="the weights are saved, but not the tokenizer"):
        train(load_train({**world, "output_dir": str(tmp_path / "out")}))
    assert not list((tmp_path / "out").glob("checkpoint-*"))
