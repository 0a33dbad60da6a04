"""`luthier export`: the merged folder computes what base and adapters compute, and nothing is ever written over."""

import errno
import json
from pathlib import Path

import pytest
from huggingface_hub.errors import HTTPError

import luthier
from luthier.core.errors import ConfigError, ModelError, OutputError, RunFailed
from luthier.core.manifest import read_manifest, verify_folder
from luthier.model.files.sources import ModelSource
from luthier.model.save import write_model
from luthier.model.tokenizer import load_tokenizer
from luthier.run.export import main

PROMPT = [65, 66, 67, 68, 69]
TARGETS = ["q_proj", "v_proj", "down_proj"]


def adapter(base: Path, folder: Path, seed: int = 0, **lora) -> Path:
    """An adapter whose B is not zero."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    settings = {"r": 4, "lora_alpha": 16, "target_modules": TARGETS, "init_lora_weights": False}
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(task_type="CAUSAL_LM", **{**settings, **lora})
    )
    model.save_pretrained(folder)
    return folder


def logits(base: Path, *adapters: Path):
    """Of the base with its adapters beside it, each on top of the merged ones before."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for number, folder in enumerate(adapters, start=1):
        model = PeftModel.from_pretrained(model, folder).eval()
        if number < len(adapters):
            model = model.merge_and_unload()
    with torch.no_grad():
        return model(torch.tensor([PROMPT])).logits


def exported(base: Path, target: Path, *adapters: Path, **keys) -> Path:
    run = {"model_name_or_path": str(base), "template": "chatml", "export_dir": str(target), **keys}
    if adapters:
        run |= {"adapter_name_or_path": ",".join(map(str, adapters)), "finetuning_type": "lora"}
    return luthier.export(run)


@pytest.mark.parametrize(
    "variant",
    [{}, {"use_rslora": True}, {"use_dora": True}, {"lora_dropout": 0.5}, {"modules_to_save": ["lm_head"]}],
    ids=["lora", "rslora", "dora", "dropout", "modules_to_save"],
)
def test_the_merged_model_computes_what_base_and_adapter_compute(llama_folder, tmp_path, variant):
    lora = adapter(llama_folder, tmp_path / "lora", **variant)
    folder = exported(llama_folder, tmp_path / "merged", lora)
    expected = logits(llama_folder, lora)
    assert (logits(folder) - expected).abs().max() < 1e-4
    assert (expected - logits(llama_folder)).abs().max() > 1e-2  # the adapter does something


def test_several_adapters_are_merged_in_order(llama_folder, tmp_path):
    first, second = (adapter(llama_folder, tmp_path / name, seed) for seed, name in enumerate(["a", "b"]))
    folder = exported(llama_folder, tmp_path / "merged", first, second)
    assert (logits(folder) - logits(llama_folder, first, second)).abs().max() < 1e-4
    assert read_manifest(folder)["adapters"] == [str(first), str(second)]


def test_without_adapters_the_weights_are_those_of_the_base(llama_folder, tmp_path):
    import torch

    assert torch.equal(logits(exported(llama_folder, tmp_path / "out")), logits(llama_folder))


@pytest.mark.parametrize(
    ("saved", "asked", "found"),
    [("float32", "auto", "float32"), ("bfloat16", "auto", "bfloat16"), ("float32", "bfloat16", "bfloat16")],
)
def test_the_number_format_is_that_of_the_checkpoint_or_the_one_asked_for(llama_folder, tmp_path, saved, asked, found):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(llama_folder, dtype=getattr(torch, saved)).save_pretrained(base)
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(base)
    folder = exported(base, tmp_path / "out", infer_dtype=asked)
    assert {str(weight.dtype) for weight in load_file(folder / "model.safetensors").values()} == {f"torch.{found}"}
    assert json.loads((folder / "config.json").read_text())["dtype"] == found


def test_the_folder_holds_all_that_another_program_needs(llama_folder, tmp_path):
    from transformers import AutoTokenizer, GenerationConfig

    folder = exported(llama_folder, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.padding_side == "left"
    assert tokenizer.eos_token == "<|im_end|>"
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    ends = GenerationConfig.from_pretrained(folder).eos_token_id
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|im_end|>", "<|im_start|>", "</s>"]
    assert 'PARAMETER stop "<|im_end|>"' in (folder / "Modelfile").read_text()
    assert read_manifest(folder)["dtype"] == "float32"
    assert verify_folder(folder) == []


def test_the_models_own_chat_template_stays_unless_the_format_replaces_it(llama_folder, tmp_path):
    from tests.tiny import byte_tokenizer, tiny_llama

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages[0].content }}"
    base = tiny_llama(tmp_path / "base", tokenizer=tokenizer)
    kept = exported(base, tmp_path / "kept", template="smollm2")
    assert (kept / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    replaced = exported(base, tmp_path / "replaced", template="chatml")
    assert "<|im_start|>" in (replaced / "chat_template.jinja").read_text()


def test_a_chat_template_that_is_more_than_slots_is_exported_as_it_is(tmp_path):
    from tests.tiny import byte_tokenizer, tiny_llama

    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | upper }}{{ loop.length }}{% endfor %}"
    base = tiny_llama(tmp_path / "base", tokenizer=tokenizer)
    folder = luthier.export({"model_name_or_path": str(base), "export_dir": str(tmp_path / "out")})
    assert (folder / "chat_template.jinja").read_text() == tokenizer.chat_template
    assert not (folder / "Modelfile").exists()


def test_large_models_are_cut_into_files(llama_folder, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (auto.from_pretrained(llama_folder) for auto in (AutoModelForCausalLM, AutoTokenizer))
    write_model(tmp_path, model, tokenizer, max_shard_size="150KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) >= 3
    assert (logits(tmp_path) == logits(llama_folder)).all()


def test_the_command_names_what_it_wrote(llama_folder, tmp_path, capsys):
    target = tmp_path / "with space" / "out"
    assert main([f"model_name_or_path={llama_folder}", "template=default", f"export_dir={target}"]) == 0
    assert capsys.readouterr().out == f"exported: {target}\n"
    assert (target / "model.safetensors").is_file()


def test_an_upload_takes_the_whole_folder(llama_folder, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda self, name, **how: calls.append((name, self.token))
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, **how: calls.append(how["folder_path"]))
    folder = exported(llama_folder, tmp_path / "out", export_hub_model_id="me/mine", hf_hub_token="secret")
    assert calls == [("me/mine", "secret"), folder]


@pytest.mark.parametrize("kind", [ConnectionError, HTTPError])
def test_a_failed_upload_leaves_the_export(llama_folder, tmp_path, monkeypatch, kind):
    import huggingface_hub

    def refuse(self, name, **how):
        raise kind("no network")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(RunFailed, match=r"the upload failed \(no network\); the export itself is whole"):
        exported(llama_folder, tmp_path / "out", export_hub_model_id="me/mine")
    assert verify_folder(tmp_path / "out") == []


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_folder_with_weights_is_refused_and_untouched(llama_folder, tmp_path):
    target = tmp_path / "out"
    exported(llama_folder, target)
    before = snapshot(target)
    with pytest.raises(
        OutputError, match=r"holds weights already \(model.safetensors\) -> name a new folder, or remove"
    ):
        exported(llama_folder, target)
    assert snapshot(target) == before


def test_the_models_own_folder_is_refused(llama_folder, tmp_path):
    lora = adapter(llama_folder, tmp_path / "lora")
    for target in (llama_folder, tmp_path / "lora"):
        with pytest.raises(OutputError, match="which is read here -> name a new folder"):
            exported(llama_folder, target, lora)


def test_a_file_in_the_place_of_the_folder_is_refused(llama_folder, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="this is a file"):
        exported(llama_folder, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_notes_in_the_folder_stay(llama_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    folder = exported(llama_folder, tmp_path / "out")
    assert (folder / "notes.txt").read_text() == "mine"
    assert verify_folder(folder) == []


@pytest.mark.parametrize("fails", ["weights", "tokenizer"])
def test_a_full_disk_leaves_nothing_half_written(llama_folder, tmp_path, monkeypatch, fails):
    from safetensors import SafetensorError
    from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

    def no_weights(self, folder, **how):
        (Path(folder) / "model.safetensors").write_bytes(b"half")
        raise SafetensorError('Error while serializing: IoError(Os { code: 28, message: "No space left on device" })')

    def no_tokenizer(self, folder, **how):
        raise OSError(errno.ENOSPC, "No space left on device")

    if fails == "weights":
        monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", no_weights)
    else:
        monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", no_tokenizer)
    with pytest.raises(RunFailed, match="No space left on device"):
        exported(llama_folder, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_do_not_fit_the_format_are_not_written(llama_folder, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    with torch.no_grad():
        model.lm_head.weight[3, 5] = 1e6
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(llama_folder).save_pretrained(tmp_path / "base")
    with pytest.raises(RunFailed, match=r"lm_head.weight: not every number .* float16 -> set infer_dtype: bfloat16"):
        exported(tmp_path / "base", tmp_path / "out", infer_dtype="float16")
    assert not (tmp_path / "out").exists()


def test_adapters_are_not_merged_into_quantized_weights(llama_folder, tmp_path):
    from tests.tiny import tiny_llama

    base = tiny_llama(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"its weights are quantized \(gptq\), so adapters cannot be merged"):
        exported(base, tmp_path / "out", adapter(llama_folder, tmp_path / "lora"))


def test_an_adapter_of_another_model_is_refused(llama_folder, tmp_path):
    from tests.tiny import tiny_llama

    other = tiny_llama(tmp_path / "other", hidden_size=32, num_attention_heads=2, num_key_value_heads=2)
    lora = adapter(other, tmp_path / "lora")
    with pytest.raises(ModelError, match="does not fit"):
        exported(llama_folder, tmp_path / "out", lora)
    assert not (tmp_path / "out").exists()


def test_export_dir_is_asked_for(llama_folder):
    with pytest.raises(ConfigError, match="export_dir: is missing"):
        luthier.export({"model_name_or_path": str(llama_folder), "template": "chatml"})


def test_a_missing_model_is_one_error(tmp_path):
    with pytest.raises(ModelError):
        exported(tmp_path / "absent", tmp_path / "out")


def test_the_export_is_loaded_again_and_compared(llama_folder, tmp_path, said):
    first, second = (adapter(llama_folder, tmp_path / name, seed) for seed, name in enumerate(["a", "b"]))
    folder = exported(llama_folder, tmp_path / "out", first, second)
    found = json.loads((folder / "merge_check.json").read_text())
    assert found["mean_kl"] < 1e-9 < found["allowed_mean_kl"] == 1e-5
    assert found["top1_agreement"] == 1
    assert found["num_positions"] > 100
    (merge,) = found["adapters_before_the_last"]
    assert merge["mean_kl"] < 1e-9
    assert read_manifest(folder)["merge_check"] == found
    assert any(text.startswith("merge check: mean KL") and "100.0% of" in text for text in said)


@pytest.mark.parametrize("lost", [0, 1])
def test_an_adapter_that_is_lost_is_noticed_and_nothing_is_written(llama_folder, tmp_path, monkeypatch, lost):
    from peft.tuners.tuners_utils import BaseTuner

    merge, calls = BaseTuner.merge_and_unload, []

    def forget_one(self):
        calls.append(self)
        return self.unload() if len(calls) == lost + 1 else merge(self)

    monkeypatch.setattr(BaseTuner, "merge_and_unload", forget_one)
    first, second = (adapter(llama_folder, tmp_path / name, seed) for seed, name in enumerate(["a", "b"]))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(RunFailed, match=r"merge check: the export differs from base and adapters \(mean KL"):
        exported(llama_folder, tmp_path / "out", first, second)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


def test_the_check_can_be_tightened_and_left_out(llama_folder, tmp_path):
    lora = adapter(llama_folder, tmp_path / "lora")
    with pytest.raises(RunFailed, match=r"the limit is 1e-09 nats\), so it is not kept"):
        exported(llama_folder, tmp_path / "out", lora, infer_dtype="bfloat16", export_max_kl=1e-9)
    folder = exported(llama_folder, tmp_path / "out", lora, infer_dtype="bfloat16", export_check=False)
    assert not (folder / "merge_check.json").exists()
    assert "merge_check" not in read_manifest(folder)


@pytest.mark.parametrize("number_format", ["f16", "q8_0"])
def test_a_gguf_file_gives_the_same_greedy_answer(llama_folder, tmp_path, number_format):
    lora = adapter(llama_folder, tmp_path / "lora")
    folder = exported(llama_folder, tmp_path / "out", lora, export_gguf=number_format)
    file = folder / f"model-{number_format}.gguf"
    assert f"FROM ./{file.name}\n" in (folder / "Modelfile").read_text()
    found = json.loads((folder / "merge_check.json").read_text())["gguf"]
    assert found["mean_kl"] < 1e-4 < found["allowed_mean_kl"]
    assert verify_folder(folder) == []

    def answer(model: Path) -> str:
        keys = {"template": "chatml", "do_sample": False, "max_new_tokens": 12, "infer_dtype": "float32"}
        return luthier.chat({"model_name_or_path": str(model), **keys}).ask("Hello")

    assert answer(file) == answer(folder)
    # The file beside the tokenizer of the export has its own end token and chat template.
    own, exported_one = (load_tokenizer(ModelSource(str(path))) for path in (file, folder))
    assert own.eos_token == exported_one.eos_token is not None
    assert own.chat_template == exported_one.chat_template is not None
    assert own.name_or_path == str(folder)


def test_a_model_that_gguf_has_no_layout_for_is_refused_before_it_is_loaded(tmp_path):
    from transformers import GPT2Config

    from tests.tiny import save_tiny

    base = save_tiny(tmp_path / "base", GPT2Config(vocab_size=320, n_embd=32, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="models of type gpt2 cannot be written as GGUF"):
        exported(base, tmp_path / "out", export_gguf="f16")


def test_a_value_head_comes_along(llama_folder, tmp_path):
    import torch
    from safetensors.torch import load_file, save_file

    lora = adapter(llama_folder, tmp_path / "lora")
    head = {"v_head.summary.weight": torch.ones(1, 64), "v_head.summary.bias": torch.zeros(1)}
    save_file(head, lora / "value_head.safetensors")
    folder = exported(llama_folder, tmp_path / "out", lora)
    assert torch.equal(load_file(folder / "value_head.safetensors")["v_head.summary.weight"], torch.ones(1, 64))
    assert "value_head.safetensors" in read_manifest(folder)["files"]


def test_a_value_head_in_adapter_folder_comes_along(llama_folder, tmp_path):
    import torch
    from safetensors.torch import save_file

    lora = adapter(llama_folder, tmp_path / "outer" / "inner")
    save_file({"v_head.summary.weight": torch.ones(1, 64)}, lora / "value_head.safetensors")
    folder = exported(llama_folder, tmp_path / "out", tmp_path / "outer", adapter_folder="inner")
    assert (folder / "value_head.safetensors").read_bytes() == (lora / "value_head.safetensors").read_bytes()
