"""What prepares pictures stays with the weights: in checkpoints, adapters and exports."""

import json

import pytest
from transformers import AutoConfig, AutoModelForImageTextToText

from luthier.config.load import load_export, load_train
from luthier.model.load import load_for_export
from luthier.model.processor import PROCESSOR_FILES, copy_processor
from luthier.model.save import write_model
from luthier.run.train import train
from tests.model.test_parts import CLIP, LLAMA
from tests.tiny import byte_tokenizer

SETTINGS = {"image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor", "size": 32}


@pytest.fixture
def llava_folder(tmp_path):
    config = AutoConfig.for_model("llava", text_config=LLAMA, vision_config=CLIP)
    folder = tmp_path / "llava"
    AutoModelForImageTextToText.from_config(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(SETTINGS))
    return folder


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_run_on_text_trains_the_language_model_and_keeps_the_processor(llava_folder, tmp_path, kind):
    rows = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(4)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    out = tmp_path / "out"
    keys = {"model_name_or_path": str(llava_folder), "dataset": "rows", "dataset_dir": str(tmp_path)}
    keys |= {"output_dir": str(out), "template": "default", "max_steps": 2, "save_steps": 2, "finetuning_type": kind}
    train(load_train({**keys, "do_train": True, "report_to": "none"}))
    for folder in (out, out / "checkpoint-2"):
        assert json.loads((folder / "preprocessor_config.json").read_text()) == SETTINGS
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["computed_with"] == {"attention": "sdpa", "dtype": "float32"}


def test_an_export_has_it_too(llava_folder, tmp_path):
    keys = {"model_name_or_path": str(llava_folder), "export_dir": str(tmp_path / "merged")}
    write_model(tmp_path / "merged", load_for_export(load_export(keys)), byte_tokenizer())
    assert json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text()) == SETTINGS


def test_a_model_of_text_has_none_and_a_missing_one_is_said(llama_folder, llava_folder, tmp_path, said):
    from transformers import AutoModelForCausalLM

    copy_processor(AutoModelForCausalLM.from_pretrained(llama_folder), tmp_path)
    assert not said
    (llava_folder / "preprocessor_config.json").unlink()
    copy_processor(AutoModelForImageTextToText.from_pretrained(llava_folder), tmp_path)
    assert any("has no files of a processor" in line for line in said)
    assert not [name for name in PROCESSOR_FILES if (tmp_path / name).exists()]
