"""`use_unsloth`: what is handed to the library, what is made of what it gives, and every refusal.

Its kernels need a GPU. In its place stands a module of a few lines on `sys.path` with the calls of unsloth 2026.10.
Like the library's own, its forward function computes logits at all positions, whatever `logits_to_keep` says.
"""

import json
import sys

import pytest
import torch
import torch.nn.functional as F

from luthier.config.load import load_export, load_infer, load_train
from luthier.core.errors import ConfigError, MissingExtra, ModelError
from luthier.core.machine import Machine
from luthier.model.backends import load_for_inference, load_for_training
from luthier.model.backends.unsloth import PADDING_REASON, import_unsloth, longest_row
from luthier.model.files.sources import ModelSource
from luthier.model.heads.output_head import inspect_head, summed_loss, token_logps
from luthier.model.tokenizer import fit_tokenizer, load_tokenizer
from tests.tiny import tiny_llama

LIBRARY = """
import json, pathlib, types
CALLS = []

class FastLanguageModel:
    @staticmethod
    def from_pretrained(
        model_name, max_seq_length, dtype, load_in_4bit, load_in_8bit, full_finetuning=False, token=None,
        device_map=None, trust_remote_code=False, use_gradient_checkpointing="unsloth", revision=None,
        use_exact_model_name=False, fix_tokenizer=True, float32_mixed_precision=None, random_state=3407, **kwargs,
    ):
        CALLS.append(("from_pretrained", dict(locals())))
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        adapter = pathlib.Path(model_name, "adapter_config.json")
        base = json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else model_name
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        forward = model.forward

        def fast(self, *args, logits_to_keep=0, **kwargs):
            kwargs["logits_to_keep"] = logits_to_keep if isinstance(logits_to_keep, int) else 0
            return forward(*args, **kwargs)

        model.forward = types.MethodType(fast, model)
        return (PeftModel.from_pretrained(model, model_name, is_trainable=True) if base != model_name else model), None

    @staticmethod
    def get_peft_model(
        model, r, target_modules, lora_alpha, lora_dropout, use_gradient_checkpointing, random_state, use_rslora,
        modules_to_save, target_parameters, **kwargs,
    ):
        CALLS.append(("get_peft_model", dict(locals())))
        import peft
        return peft.get_peft_model(model, peft.LoraConfig(
            r=r, target_modules=target_modules, lora_alpha=lora_alpha, lora_dropout=lora_dropout, task_type="CAUSAL_LM",
            use_rslora=use_rslora, modules_to_save=modules_to_save, target_parameters=target_parameters, **kwargs,
        ))

    @staticmethod
    def for_inference(model):
        CALLS.append(("for_inference", {"model": model}))
        return model.eval()
"""
GPU = Machine(
    device="cuda", num_accelerators=1, bf16=True, fp16=True, memory_bytes=1, device_memory_bytes=1, num_cpus=1
)
CPU = Machine(
    device="cpu", num_accelerators=0, bf16=False, fp16=False, memory_bytes=1, device_memory_bytes=1, num_cpus=1
)


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """The library, and what it was asked: (function, its arguments)."""
    (tmp_path / "site" / "unsloth").mkdir(parents=True)
    (tmp_path / "site" / "unsloth" / "__init__.py").write_text(LIBRARY)
    monkeypatch.delitem(sys.modules, "unsloth", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    import unsloth

    yield unsloth.CALLS
    sys.modules.pop("unsloth", None)


def keys_of(folder, tmp_path, **keys):
    keys = {"model_name_or_path": str(folder), "use_unsloth": True, "cutoff_len": 100, "max_new_tokens": 20, **keys}
    return keys | {"dataset": "x", "output_dir": str(tmp_path / "out"), "do_train": True}


def loaded_for_training(folder, tmp_path, **keys):
    run = load_train(keys_of(folder, tmp_path, **keys))
    return load_for_training(run, fit_tokenizer(load_tokenizer(ModelSource(str(folder)))), GPU)


class TestLoading:
    def test_lora(self, calls, llama_folder, tmp_path):
        keys = {"lora_rank": 3, "lora_target": "q_proj,v_proj", "lora_dropout": 0.25, "use_rslora": True, "seed": 5}
        loaded = loaded_for_training(llama_folder, tmp_path, **keys, bf16=True)
        (first, base), (second, adapter) = calls
        assert (first, second) == ("from_pretrained", "get_peft_model")
        assert base["model_name"] == str(llama_folder) and base["dtype"] == loaded.dtype == torch.bfloat16
        assert base["max_seq_length"] == 128  # 100 + 20 tokens, in steps of 64
        assert base["device_map"] == {"": "cuda:0"}
        assert not any(base[key] for key in ("load_in_4bit", "load_in_8bit", "full_finetuning", "fix_tokenizer"))
        assert base["use_exact_model_name"] and base["kwargs"] == {"local_files_only": True}
        assert base["use_gradient_checkpointing"] == adapter["use_gradient_checkpointing"] == "unsloth"
        expected = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.25, "use_rslora": True, "random_state": 5}
        assert {key: adapter[key] for key in expected} == expected
        assert adapter["target_modules"] == ["q_proj", "v_proj"] and adapter["kwargs"] == {"use_dora": False}
        learning = {name: weight for name, weight in loaded.model.named_parameters() if weight.requires_grad}
        assert all("lora_" in name and weight.dtype == torch.float32 for name, weight in learning.items())
        assert loaded.num_trainable == sum(weight.numel() for weight in learning.values()) > 0
        assert loaded.padding_reason == PADDING_REASON
        assert loaded.model.get_base_model().name_or_path == str(llama_folder)
        assert loaded.model.training and not loaded.model.config.use_cache

    def test_full(self, calls, llama_folder, tmp_path):
        loaded = loaded_for_training(llama_folder, tmp_path, finetuning_type="full", bf16=True)
        ((_, base),) = calls
        assert base["full_finetuning"] and base["float32_mixed_precision"] is True
        assert {weight.dtype for weight in loaded.model.parameters()} == {torch.float32}
        pure = loaded_for_training(llama_folder, tmp_path, finetuning_type="full", pure_bf16=True)
        assert calls[-1][1]["float32_mixed_precision"] is False
        assert {weight.dtype for weight in pure.model.parameters()} == {torch.bfloat16}

    @pytest.mark.parametrize(
        ("keys", "expected"),
        [
            ({"disable_gradient_checkpointing": True}, {"use_gradient_checkpointing": False}),
            ({"use_unsloth_gc": True}, {"use_gradient_checkpointing": "unsloth"}),
            ({"trust_remote_code": True}, {"trust_remote_code": True}),
            ({"cutoff_len": 500, "max_new_tokens": 300}, {"max_seq_length": 512}),
        ],
    )
    def test_what_a_key_becomes(self, calls, llama_folder, tmp_path, keys, expected):
        loaded_for_training(llama_folder, tmp_path, **keys)
        assert {key: calls[0][1][key] for key in expected} == expected

    @pytest.mark.parametrize("bits", [4, 8])
    def test_bits(self, calls, llama_folder, tmp_path, bits):
        loaded_for_training(llama_folder, tmp_path, quantization_bit=bits)
        assert (calls[0][1]["load_in_4bit"], calls[0][1]["load_in_8bit"]) == (bits == 4, bits == 8)

    def test_an_adapter_goes_on_learning_on_the_model_of_the_run(self, calls, llama_folder, tmp_path):
        """Not on the one that its config names, which may have been moved since."""
        first = loaded_for_training(llama_folder, tmp_path, lora_rank=3)
        first.model.save_pretrained(tmp_path / "adapter")
        settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = "/gone"
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
        calls.clear()
        again = loaded_for_training(llama_folder, tmp_path, adapter_name_or_path=str(tmp_path / "adapter"))
        assert [name for name, _ in calls] == ["from_pretrained"]
        assert again.num_trainable == first.num_trainable
        assert again.model.peft_config["default"].base_model_name_or_path == str(llama_folder)
        assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == settings
        keys = {"model_name_or_path": str(llama_folder), "adapter_name_or_path": str(tmp_path / "adapter")}
        model = load_for_inference(load_infer({**keys, "use_unsloth": True, "template": "default"}), GPU)
        assert calls[-1][0] == "for_inference" and calls[-2][1]["max_seq_length"] == 512
        assert any("lora_A" in name for name, _ in model.named_parameters())
        assert not model.training and model.config.use_cache

    def test_the_loss_is_that_of_the_model(self, calls, llama_folder, tmp_path):
        """Of a padded batch: the sum of -log p of the labeled tokens, whether the head is linear or not."""
        loaded = loaded_for_training(llama_folder, tmp_path, lora_target="q_proj")
        model = loaded.model.float().eval()
        head = inspect_head(model)
        assert head.linear is model.get_base_model().lm_head and not head.takes_positions
        ids = torch.tensor([[5, 6, 7, 8, 9], [10, 11, 12, 256, 256]])
        inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])}
        positions, targets = torch.tensor([1, 3, 5, 6]), torch.tensor([7, 9, 11, 12])
        logits = model(**inputs).logits.flatten(0, 1)[positions]
        expected = F.cross_entropy(logits, targets, reduction="sum")
        for known in (head, type(head)(None, takes_positions=False)):
            loss, best = summed_loss(model, known, inputs, positions, targets)
            torch.testing.assert_close(loss, expected)
            assert torch.equal(best, logits.argmax(-1))
            logps, _ = token_logps(model, known, inputs, positions, targets)
            torch.testing.assert_close(-logps.sum(), expected)


def test_rows_longer_than_the_window_are_an_error(calls, llama_folder, tmp_path):
    """The library would stretch the positions without a word."""
    with pytest.raises(ModelError, match=r"cutoff_len: 600: the model reads 512 tokens.*set cutoff_len: 512"):
        loaded_for_training(llama_folder, tmp_path, cutoff_len=600)


def test_no_window_is_no_bound():
    from transformers import MambaConfig

    config = MambaConfig()
    assert longest_row(config, 100, 29) == 192
    assert longest_row(config, 100, -1) == 128


class TestRefusals:
    def test_without_a_gpu(self, calls, llama_folder, tmp_path):
        run = load_train(keys_of(llama_folder, tmp_path))
        words = r"use_unsloth: its kernels need a GPU .* computes on its CPU -> leave it out"
        with pytest.raises(ModelError, match=words):
            load_for_training(run, fit_tokenizer(load_tokenizer(ModelSource(str(llama_folder)))), CPU)
        keys = {"model_name_or_path": str(llama_folder), "use_unsloth": True}
        with pytest.raises(ModelError, match=words):
            load_for_inference(load_infer(keys), CPU)
        assert calls == []

    def test_without_the_library(self, llama_folder, tmp_path, monkeypatch):
        monkeypatch.setattr("luthier.config.rules.unsloth.is_installed", lambda module: False)
        monkeypatch.setattr("luthier.model.backends.unsloth.is_installed", lambda module: False)
        for load in (load_train, load_infer):
            with pytest.raises(ConfigError) as caught:
                load(keys_of(llama_folder, tmp_path))
            (problem,) = caught.value.problems
            assert problem.key == "use_unsloth" and "pip install --no-deps unsloth unsloth_zoo" in problem.remedy
        with pytest.raises(MissingExtra, match="pip install --no-deps unsloth unsloth_zoo"):
            import_unsloth(GPU)

    @pytest.mark.parametrize(
        ("keys", "blamed"),
        [
            ({"deepspeed": {"zero_optimization": {"stage": 3}}}, "use_unsloth"),
            ({"fsdp": "full_shard"}, "use_unsloth"),
            ({"stage": "rm"}, "use_unsloth"),
            ({"stage": "ppo", "reward_model": "a", "reward_model_type": "lora"}, "reward_model_type"),
            ({"finetuning_type": "freeze"}, "finetuning_type"),
            ({"finetuning_type": "oft"}, "finetuning_type"),
            ({"adapter_name_or_path": "a,b"}, "adapter_name_or_path"),
            ({"adapter_name_or_path": "a", "create_new_adapter": True}, "create_new_adapter"),
            ({"rope_scaling": "yarn"}, "rope_scaling"),
            ({"mixture_of_depths": "load"}, "mixture_of_depths"),
            ({"model_name_or_path": "a.gguf"}, "model_name_or_path"),
            ({"quantization_bit": 4, "quantization_method": "hqq"}, "quantization_bit"),
            ({"shift_attn": True}, "shift_attn"),
            ({"train_from_scratch": True}, "train_from_scratch"),
            ({"resize_vocab": True}, "resize_vocab"),
            ({"add_tokens": "<a>"}, "add_tokens"),
            ({"moe_aux_loss_coef": 0.1}, "moe_aux_loss_coef"),
            ({"pissa_init": True}, "pissa_init"),
            ({"loftq_init": True, "quantization_bit": 4}, "loftq_init"),
            ({"use_llama_pro": True}, "use_llama_pro"),
        ],
        ids=str,
    )
    def test_what_it_does_not_go_with(self, calls, llama_folder, tmp_path, keys, blamed):
        with pytest.raises(ConfigError) as caught:
            load_train(keys_of(llama_folder, tmp_path, **keys))
        assert any(problem.key == blamed and "unsloth" in str(problem) for problem in caught.value.problems)
        without = keys_of(llama_folder, tmp_path, **keys) | {"use_unsloth": False}
        try:
            load_train(without)
        except ConfigError as error:
            assert not any("unsloth" in str(problem) for problem in error.problems)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            *(("flash_attn", "fa2"), ("upcast_layernorm", True), ("upcast_lmhead_output", True)),
            *(("checkpoint_every", 2), ("use_reentrant_gc", False)),
        ],
    )
    def test_what_it_decides_by_itself_is_a_warning(self, calls, llama_folder, tmp_path, key, value):
        warnings = load_train(keys_of(llama_folder, tmp_path, **{key: value})).warnings
        assert any(warning.key == key and "unsloth decides" in warning.reason for warning in warnings)

    def test_an_export_does_not_read_it(self, calls, llama_folder, tmp_path):
        keys = {"model_name_or_path": str(llama_folder), "export_dir": str(tmp_path / "e"), "use_unsloth": True}
        assert any(warning.key == "use_unsloth" for warning in load_export(keys).warnings)

    def test_a_reward_model_and_an_adapter_of_another_method(self, calls, tmp_path):
        from transformers import AutoConfig

        folder = tiny_llama(tmp_path / "model")
        (tmp_path / "oft").mkdir()
        (tmp_path / "oft" / "adapter_config.json").write_text('{"peft_type": "OFT"}')
        (tmp_path / "oft" / "adapter_model.bin").touch()
        run = load_infer(
            {"model_name_or_path": str(folder), "adapter_name_or_path": str(tmp_path / "oft"), "use_unsloth": True}
        )
        with pytest.raises(ModelError, match="adapters of LoRA only"):
            load_for_inference(run, GPU)
        config = AutoConfig.from_pretrained(folder)
        config.architectures = ["LlamaForSequenceClassification"]
        config.num_labels = 1
        config.save_pretrained(folder)
        with pytest.raises(ModelError, match="this is a reward model"):
            load_for_inference(load_infer({"model_name_or_path": str(folder), "use_unsloth": True}), GPU)
