"""Models that bring Python code of their own (`trust_remote_code`): trained, loaded, exported, and read elsewhere."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer

import luthier
from luthier.config.load import load_train
from luthier.core.errors import ModelError
from luthier.core.manifest import verify_folder
from luthier.model.files.hubs import hub_access
from luthier.model.files.sources import ModelSource
from luthier.model.media.processor import FittedProcessor, copy_processor, fit_processor
from luthier.run.template import main
from luthier.workflow.training import train
from tests.small_world import small_world

CONFIGURATION = """
from transformers import LlamaConfig

class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZATION = """
from transformers import PreTrainedTokenizerFast

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
PROCESSING = """
from transformers import ProcessorMixin

class OwnProcessor(ProcessorMixin):
    def __init__(self, tokenizer=None, **kwargs):
        super().__init__(tokenizer, **kwargs)
"""
CODE = {"configuration_own.py": CONFIGURATION, "modeling_own.py": MODELING, "tokenization_own.py": TOKENIZATION}


def add_code(folder: Path) -> None:
    """Makes the Llama in `folder` a model of a class that only its own files know."""
    for name, text in CODE.items():
        (folder / name).write_text(text)
    for name, changes in {
        "config.json": {
            "model_type": "own_llama",
            "architectures": ["OwnForCausalLM"],
            "auto_map": {
                "AutoConfig": "configuration_own.OwnConfig",
                "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
            },
        },
        "tokenizer_config.json": {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
        },
    }.items():
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict[str, Any]:
    keys = small_world(tmp_path_factory.mktemp("own"))
    add_code(Path(keys["model_name_or_path"]))
    return {**keys, "trust_remote_code": True, "max_steps": 2, "report_to": "none"}


def plain_logits(folder: Path, **how: Any) -> torch.Tensor:
    """By plain transformers, tokenizer included."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32, **how)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        return model(**tokenizer("plain words", return_tensors="pt")).logits


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_code_stays_with_the_weights_and_is_run_only_if_asked_for(world, tmp_path, kind):
    out, merged = tmp_path / "out", tmp_path / "merged"
    train(load_train({**world, "finetuning_type": kind, "output_dir": str(out)}))
    keys = {"model_name_or_path": world["model_name_or_path"], "adapter_name_or_path": str(out)}
    keys = {"model_name_or_path": str(out)} if kind == "full" else {**keys, "finetuning_type": "lora"}
    luthier.export({**keys, "template": "chatml", "export_dir": str(merged), "trust_remote_code": True})
    assert verify_folder(merged) == []
    assert all((merged / name).is_file() for name in CODE)
    if kind == "full":
        torch.testing.assert_close(plain_logits(merged), plain_logits(out), atol=1e-6, rtol=0)
    with pytest.raises(ModelError, match=r"Python code of its own.* -> .*set trust_remote_code: true"):
        luthier.export({"model_name_or_path": str(merged), "template": "chatml", "export_dir": str(tmp_path / "no")})
    again = {"model_name_or_path": str(merged), "template": "chatml", "trust_remote_code": True}
    luthier.export({**again, "export_dir": str(tmp_path / "again")})
    assert torch.equal(plain_logits(tmp_path / "again"), plain_logits(merged))


def test_the_code_of_a_processor_stays_with_it(world, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    for file in Path(world["model_name_or_path"]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "processing_own.py").write_text(PROCESSING)
    settings = {"processor_class": "OwnProcessor", "auto_map": {"AutoProcessor": "processing_own.OwnProcessor"}}
    (folder / "processor_config.json").write_text(json.dumps(settings))
    fitted = FittedProcessor((folder / "processor_config.json", folder / "processing_own.py"))
    saved = tmp_path / "saved"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(saved)
    AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(saved)
    copy_processor(model, saved, fitted)
    assert type(AutoProcessor.from_pretrained(saved, trust_remote_code=True)).__name__ == "OwnProcessor"


def test_files_of_a_processor_are_fetched_as_the_model_was(monkeypatch, tmp_path):
    """From the branch, the cache and with the token of the run."""
    import transformers.utils.hub

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(transformers.utils.hub, "cached_file", lambda *names, **how: asked.append(how))
    keys = {"model_name_or_path": "org/sees", "model_revision": "v2", "cache_dir": str(tmp_path), "hf_hub_token": "t"}
    run = load_train(
        {**keys, "template": "default", "do_train": True, "dataset": "rows", "output_dir": str(tmp_path / "out")}
    )
    config: Any = SimpleNamespace(_name_or_path="org/sees", sub_configs={"vision_config": object})
    model: Any = SimpleNamespace(config=config)
    copy_processor(model, tmp_path, fit_processor(run, ModelSource("org/sees", hub_access(run.model))))
    assert {(one["revision"], one["cache_dir"], one["token"]) for one in asked} == {("v2", str(tmp_path), "t")}


def test_the_chat_format_of_a_tokenizer_with_code_is_checked(world, tmp_path, capsys):
    keys = {name: value for name, value in world.items() if name != "trust_remote_code"}
    file = tmp_path / "run.yaml"
    model = world["model_name_or_path"]
    (Path(model) / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    file.write_text(json.dumps({**keys, "output_dir": str(tmp_path / "out")}))
    with pytest.raises(ModelError, match="Python code of its own"):
        main(["check", model, "auto"])
    assert main(["check", model, "auto", "--trust-remote-code", "--data", str(file), "--rows", "2"]) in (0, 1)
    file.write_text(json.dumps({**world, "output_dir": str(tmp_path / "out")}))
    assert main(["check", model, "auto", "--data", str(file), "--rows", "2"]) in (0, 1)
    assert f"serving with the chat template of {model}" in capsys.readouterr().out
