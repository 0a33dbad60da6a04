"""What a server is started with: options as words, the length that model and run agree on, what cannot be served."""

import json
import shutil

import pytest

from luthier.config.load import load_infer
from luthier.core.errors import InvalidInput, ModelError, RunFailed
from luthier.core.kinds import ENGINES
from luthier.infer.servers.adapter import Limits
from luthier.infer.servers.start import options, plan_server
from luthier.model.files.sources import model_source
from tests import tiny
from tests.infer.servers.programs import Installed

LIMITS = Limits("vLLM", 32, "vllm_max_lora_rank")


def planned(folder, tokenizer, stop_ids=(258,), **keys):
    run = load_infer({"model_name_or_path": str(folder), "template": "chatml", "infer_backend": "vllm", **keys})
    return plan_server(run, model_source(run.model), tokenizer, stop_ids, LIMITS)


def test_options_are_words_of_the_command_line():
    given = {"max_len": 8, "eager": True, "swap-space": False, "a": None, "config": {"x": [1]}, "several": ["b", "c"]}
    assert options(given) == [
        *("--max-len", "8", "--eager", "--no-swap-space", "--config", '{"x": [1]}', "--several", "b", "c")
    ]


def test_the_model_is_named_by_its_whole_path(llama_folder, tokenizer, monkeypatch):
    monkeypatch.chdir(llama_folder.parent)
    found = planned(llama_folder.name, tokenizer)
    assert (found.model, found.revision, found.adapter, found.environ) == (str(llama_folder), None, None, {})
    assert found.num_devices == 1


def test_the_shorter_of_both_limits_holds(llama_folder, tokenizer, said):
    found = planned(llama_folder, tokenizer)
    assert found.num_positions(100) == 100 and not said
    assert found.num_positions(4096) == 512
    assert said == ["the model takes 512 tokens, so prompt and answer have 512 and not 4096"]


def test_generation_config_adds_end_tokens_and_min_p_and_names_what_is_not_served(
    llama_folder, tokenizer, tmp_path, said
):
    folder = shutil.copytree(llama_folder, tmp_path / "model")
    file = folder / "generation_config.json"
    own = {"eos_token_id": [260, 300], "min_p": 0.1, "no_repeat_ngram_size": 3, "typical_p": 0.9, "top_k": 7}
    own |= {"stop_strings": ["<end>", "###"]}
    file.write_text(json.dumps(own))
    found = planned(folder, tokenizer)
    assert (found.stop_ids, found.min_p, found.stops) == ({258, 260, 300}, 0.1, ("<end>", "###"))
    assert [line for line in said if "generation_config" in line] == [
        "warning: generation_config.json sets typical_p, no_repeat_ngram_size, which only"
        " infer_backend: huggingface follows"
    ]
    file.write_text('{"eos_token_id": "end"}')
    with pytest.raises(ModelError, match=r"its generation_config.json cannot be used .* -> correct it"):
        planned(folder, tokenizer)
    file.unlink()
    found = planned(folder, tokenizer)
    assert (found.stop_ids, found.min_p, found.stops) == ({258, 260}, None, ())  # the end token of config.json


@pytest.mark.thorough
def test_a_gguf_file_and_tokens_without_rows_are_refused(llama_folder, smollm2_folder):
    with pytest.raises(ModelError, match=r"a GGUF file is read by transformers only -> .*luthier export"):
        planned(smollm2_folder, None)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_tokens([f"<{number}>" for number in range(80)])
    with pytest.raises(ModelError, match="the tokenizer has 341 tokens and the model has rows for 320"):
        planned(llama_folder, tokenizer)


def test_an_adapter_goes_along(llama_folder, tokenizer, tmp_path):
    from tests.workflow.test_export import adapter

    lora = adapter(llama_folder, tmp_path / "lora")
    assert planned(llama_folder, tokenizer, adapter_name_or_path=str(lora)).adapter == lora


def test_files_on_the_hub_are_found_with_the_runs_cache_and_token(monkeypatch, tokenizer):
    from transformers import LlamaConfig

    config = LlamaConfig(**tiny.TINY_LLAMA)
    monkeypatch.setattr("luthier.model.loading.config.load_config", lambda source: config)
    keys = {"model_revision": "v2", "cache_dir": "/cache", "hf_hub_token": "hf_1"}
    found = planned("owner/model", tokenizer, **keys)
    assert (found.model, found.revision) == ("owner/model", "v2")
    assert found.environ == {"HF_HUB_CACHE": "/cache", "HF_TOKEN": "hf_1"} and "hf_1" not in repr(found)


@pytest.mark.parametrize("name", ["vllm", "sglang"])
class TestPrograms:
    def open(self, name, folder, tokenizer):
        run = load_infer({"model_name_or_path": str(folder), "template": "chatml", "infer_backend": name})
        return ENGINES.get(name).open(run, model_source(run.model), tokenizer, {258})

    def test_without_the_program_nothing_is_started(self, name, llama_folder, tokenizer, monkeypatch):
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(
            InvalidInput, match=f"infer_backend: {name}: there is no program {name} here -> pip install"
        ):
            self.open(name, llama_folder, tokenizer)

    def test_a_program_that_fails_is_an_error_with_its_words(
        self, name, llama_folder, tokenizer, tmp_path, monkeypatch
    ):
        script = f"echo '{name}: error: unrecognized arguments: --dtype' >&2; exit 2"
        for variable, value in Installed(tmp_path / "bad", name, script).environ.items():
            monkeypatch.setenv(variable, value)
        with pytest.raises(RunFailed, match=f"{name} ended before .* status 2 .*unrecognized arguments: --dtype"):
            self.open(name, llama_folder, tokenizer)
