"""Judging a whole run: unknown, refused and unread keys, rules between keys, and all problems at once."""

import contextlib
import dataclasses
import math
from typing import get_args

import pytest

from luthier.config.key_table import catalog
from luthier.config.load import load_export, load_infer, load_train
from luthier.core.errors import ConfigError

BASE = {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True}
EVAL = {"val_size": 0.1}


def problems_of(loader, keys, *overrides):
    with pytest.raises(ConfigError) as caught:
        loader(keys, overrides)
    return {problem.key: problem for problem in caught.value.problems}


def without(*names):
    return {name: value for name, value in BASE.items() if name not in names}


def test_all_problems_come_at_once_in_the_order_of_the_lines(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "stage: sft\nlora_rank: eight\npref_bta: 0.1\nbf16: yess\nflash_attn: fa4\ndataset: d\nuse_galore: true\n"
        "output_dir: ${nowhere}\nval_size: 0.1\neval_dataset: d\n",
        encoding="utf-8",
    )
    with pytest.raises(ConfigError) as caught:
        load_train(path, ["cutoff_len=0"])
    found = [(problem.key, problem.line) for problem in caught.value.problems]
    assert found == [
        ("lora_rank", 2),
        ("pref_bta", 3),
        ("bf16", 4),
        ("flash_attn", 5),
        ("use_galore", 7),
        ("output_dir", 8),
        ("val_size", 9),
        ("model_name_or_path", None),
        ("cutoff_len", None),
    ]
    text = str(caught.value)
    assert text.startswith(f"{path}: 9 problems\n")
    assert f"{path}:3: pref_bta: 0.1: unknown key -> did you mean pref_beta?" in text
    assert "command line: cutoff_len: '0': must be at least 1" in text
    assert "fa4" in text and "did you mean fa" in text


def test_a_key_at_fault_is_not_blamed_by_rules_about_its_default():
    assert list(problems_of(load_train, {**BASE, "output_dir": ["no"]})) == ["output_dir"]


def test_unknown_keys_are_warnings_when_extra_keys_are_allowed(monkeypatch):
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "1")
    run = load_train({**BASE, "lora_rnk": 4})
    assert [warning.key for warning in run.warnings] == ["lora_rnk"] and "lora_rnk" not in run.given
    monkeypatch.setenv("ALLOW_EXTRA_ARGS", "0")
    assert "lora_rnk" in problems_of(load_train, {**BASE, "lora_rnk": 4})


@pytest.mark.parametrize(
    ("key", "value", "reader"),
    [
        ("pref_beta", 0.1, "stage: dpo or stage: kto"),
        ("ppo_epochs", 4, "stage: ppo"),
        ("freeze_trainable_modules", "mlp", "finetuning_type: freeze"),
        ("additional_target", "lm_head", "finetuning_type: oft"),
        ("galore_rank", 8, "use_galore: true"),
        ("quantization_type", "nf4", "quantization_bit: 4"),
        ("export_dir", "x", "`luthier export`"),
        ("task", "mmlu_test", "`luthier eval`"),
        ("vllm_maxlen", 4096, "`luthier chat` with infer_backend: vllm"),
        ("ray_num_workers", 4, "USE_RAY=1"),
    ],
)
def test_a_key_that_nobody_reads_is_a_warning_that_names_who_would(key, value, reader):
    keys = {**BASE, key: value}
    if key == "additional_target":
        keys["finetuning_type"] = "full"
        reader = "finetuning_type: lora or finetuning_type: oft"
    (warning,) = load_train(keys).warnings
    assert warning.key == key and warning.reason == f"is not read here, only by {reader}"
    assert warning.value == value and warning.file == "the given mapping"


def test_a_key_that_somebody_reads_is_no_warning():
    assert load_train({**BASE, "lora_rank": 4, "train_on_prompt": True}).warnings == ()
    assert [w.key for w in load_train({**BASE, "stage": "rm", "use_dft_loss": True}).warnings] == ["use_dft_loss"]


def test_a_key_that_must_be_read_is_an_error_where_nobody_reads_it():
    """Only where it would change something, and only in training: the same file serves for chat and export."""
    (problem,) = problems_of(load_train, {**BASE, "finetuning_type": "full", "use_dora": True}).values()
    assert problem.reason == "is for finetuning_type: lora only"
    assert problem.remedy == "set finetuning_type: lora, or leave it out"
    keys = {**BASE, "finetuning_type": "full"}
    (warning,) = load_train({**keys, "use_dora": False}).warnings
    assert warning.reason == "is not read here, only by finetuning_type: lora"
    keys = {"model_name_or_path": "m", "finetuning_type": "full", "use_dora": True}
    assert [warning.key for warning in load_infer(keys).warnings] == ["use_dora"]


@pytest.mark.parametrize(
    ("key", "value", "remedy"),
    [
        ("stage", "orpo", "set stage: dpo and pref_loss: orpo"),
        ("stage", "DAPO", "set stage: grpo and loss_type: dapo"),
        ("stage", "SFT", "did you mean sft?"),
        ("finetuning_type", "QLoRA", "set finetuning_type: lora and quantization_bit: 4"),
        ("finetuning_type", "pissa", "set finetuning_type: lora and pissa_init: true"),
        ("finetuning_type", "LoRA", "did you mean lora?"),
    ],
)
def test_a_method_that_belongs_to_another_key(key, value, remedy):
    assert problems_of(load_train, {**BASE, key: value})[key].remedy == remedy


def test_every_remedy_for_a_method_is_a_run_file_that_works():
    """What follows `set` is read as keys of a run file."""
    import re

    from luthier.config.key_table import catalog

    more = {
        "per_device_train_batch_size": 8,
        "reward_funcs": "f.py:f",
        "dpo_label_smoothing": 0.1,
        "teacher_model": "t",
    }
    for name in ("stage", "finetuning_type"):
        remedies = catalog()[name][0].remedies
        assert remedies
        for wrong, remedy in remedies.items():
            assert problems_of(load_train, {**BASE, name: wrong})[name].remedy == remedy
            keys = dict(re.findall(r"(\w+): (\w+)", remedy))
            needed = ("per_device_train_batch_size", "reward_funcs") if keys.get("stage") == "grpo" else ()
            needed += ("dpo_label_smoothing",) if keys.get("pref_loss") == "exo_pair" else ()
            needed += ("teacher_model",) if "teacher_model" in remedy else ()
            words = [f"{key}={value}" for key, value in {**BASE, **keys, **{key: more[key] for key in needed}}.items()]
            assert load_train(words)


def test_training_keys_in_a_file_for_chat_are_warnings():
    run = load_infer({"model_name_or_path": "m", "template": "qwen", "learning_rate": 1e-4, "use_dft_loss": False})
    assert [warning.reason for warning in run.warnings] == [
        "is not read here, only by `luthier train`",
        "is not read here, only by `luthier train` with stage: sft",
    ]


@pytest.mark.parametrize(("key", "default"), [("use_galore", False), ("use_unsloth", False)])
def test_a_refused_key_at_its_default_passes_silently(key, default):
    assert load_train({**BASE, key: default}).warnings == ()


def test_a_key_without_effect_is_a_warning_unless_it_has_its_default():
    assert load_train({**BASE, "label_names": None, "low_cpu_mem_usage": True}).warnings == ()
    warnings = load_train({**BASE, "label_names": "labels", "low_cpu_mem_usage": False}).warnings
    assert [warning.key for warning in warnings] == ["label_names", "low_cpu_mem_usage"]
    assert all(warning.reason.startswith("has no effect: ") for warning in warnings)


def test_a_key_without_effect_that_asks_for_what_happens_anyway_is_no_warning():
    assert load_train({**BASE, "remove_unused_columns": False, "overwrite_cache": True}).warnings == ()
    assert load_train({**BASE, "gradient_checkpointing": True}).warnings == ()
    assert len(load_train({**BASE, "gradient_checkpointing": False}).warnings) == 1


def test_former_names_are_stored_under_todays():
    run = load_train({**BASE, **EVAL, "evaluation_strategy": "steps", "no_cuda": True})
    assert run.training["eval_strategy"] == "steps" and run.training["use_cpu"] is True
    assert [warning.reason for warning in run.warnings] == [
        "now called eval_strategy, and stored there",
        "now called use_cpu, and stored there",
    ]


def test_a_former_switch_is_stored_as_the_value_that_it_is_today():
    run = load_train({**BASE, "group_by_length": True, "adafactor": True})
    assert (run.training["train_sampling_strategy"], run.training["optim"]) == ("group_by_length", "adafactor")
    assert [warning.reason for warning in run.warnings] == [
        "now written train_sampling_strategy: group_by_length, and stored so",
        "now written optim: adafactor, and stored so",
    ]
    off = load_train({**BASE, "group_by_length": False, "adafactor": False})
    assert off.warnings == () and off.training["optim"] == load_train(BASE).training["optim"]
    both = load_train({**BASE, "adafactor": True, "optim": "sgd"})
    assert both.training["optim"] == "sgd"


def test_the_keys_of_an_engine_are_read_if_it_is_chosen():
    keys = {
        "model_name_or_path": "m",
        "template": "chatml",
        "infer_backend": "vllm",
        "vllm_maxlen": 8,
        "sglang_maxlen": 9,
    }
    run = load_infer({**keys, "vllm_config": '{"max_num_seqs": 8}'})
    assert (run.vllm.vllm_maxlen, run.vllm.vllm_config) == (8, {"max_num_seqs": 8})
    assert [(warning.key, warning.reason) for warning in run.warnings] == [
        ("sglang_maxlen", "is not read here, only by infer_backend: sglang")
    ]
    assert set(problems_of(load_infer, {**keys, "vllm_maxlen": "much"})) == {"vllm_maxlen"}


def test_a_misspelt_variant_gets_the_nearest_name():
    assert "did you mean sft" in problems_of(load_train, {**BASE, "stage": "sftt"})["stage"].remedy


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"fp16": True, "bf16": True}, "fp16"),
        ({"fp16": True, "pure_bf16": True}, "pure_bf16"),
        ({"val_size": 0.1, "eval_dataset": "d"}, "val_size"),
        ({"val_size": -1}, "val_size"),
        ({"do_eval": True}, "do_eval"),
        ({"eval_strategy": "steps"}, "eval_strategy"),
        ({"predict_with_generate": True}, "predict_with_generate"),
        ({"do_predict": True, **EVAL}, "do_predict"),
        ({"stage": "pt", "predict_with_generate": True, **EVAL}, "predict_with_generate"),
        ({"train_on_prompt": True, "mask_history": True}, "mask_history"),
        ({"compute_accuracy": True, "predict_with_generate": True, **EVAL}, "compute_accuracy"),
        ({"packing": False, "neat_packing": True}, "neat_packing"),
        ({"interleave_probs": "0.5,0.5", "dataset": "a,b"}, "interleave_probs"),
        ({"interleave_probs": "0.5,0.5", "mix_strategy": "interleave_over"}, "interleave_probs"),
        ({"adapter_name_or_path": "a", "finetuning_type": "full"}, "adapter_name_or_path"),
        ({"early_stopping_steps": 3}, "early_stopping_steps"),
        ({"load_best_model_at_end": True, **EVAL}, "load_best_model_at_end"),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch", **EVAL}, "load_best_model_at_end"),
        ({"load_best_model_at_end": True, "save_strategy": "no", **EVAL}, "load_best_model_at_end"),
        ({"lora_rank": 0}, "lora_rank"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
        ({"warmup_ratio": 1.0}, "warmup_ratio"),
        ({"top_p": 1.5}, "top_p"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps"),
        ({"max_new_tokens": 0, "max_length": 0}, "max_new_tokens"),
        ({"tool_format": "no_such_syntax"}, "tool_format"),
        ({"max_samples": 0}, "max_samples"),
    ],
)
def test_a_broken_rule(more, key):
    problems = problems_of(load_train, {**BASE, **more})
    assert set(problems) == {key} and problems[key].reason


def test_all_impossible_values_of_generation_are_told_at_once():
    wrong = {
        "temperature": -1,
        "top_p": 2,
        "top_k": -1,
        "num_beams": 0,
        "repetition_penalty": 0,
        "length_penalty": "inf",
    }
    for load, base in ((load_train, BASE), (load_infer, {"model_name_or_path": "m"})):
        assert set(problems_of(load, {**base, **wrong})) == set(wrong)
    edges = {"temperature": 0, "top_p": 0, "top_k": 0, "repetition_penalty": 0.1, "length_penalty": -1}
    load_infer({"model_name_or_path": "m", **edges})


@pytest.mark.parametrize(
    "more",
    [
        {"bf16": True, "pure_bf16": True},
        {"do_eval": True, "eval_strategy": "steps", **EVAL},
        {"do_predict": True, "predict_with_generate": True, "eval_dataset": "e"},
        {"mix_strategy": "interleave_over", "interleave_probs": "0.5,0.5", "dataset": "a,b", "eval_dataset": "c,d"},
        {"stage": "pt", "packing": True},
        {"packing": False},
        {"packing": True},
        {"neat_packing": True},
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch", **EVAL},
        {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "best", **EVAL},
        {"early_stopping_steps": 3, "eval_strategy": "epoch", **EVAL},
        {"adapter_name_or_path": "a,b"},
        {"lora_dropout": 0.99, "top_p": 1.0, "tool_format": "qwen", "max_samples": 1},
    ],
)
def test_a_kept_rule(more):
    assert load_train({**BASE, **more}).warnings == ()


@pytest.mark.parametrize(
    ("more", "key"),
    [
        ({"init_special_tokens": "desc_init"}, "init_special_tokens"),
        ({"add_special_tokens": "<a>", "new_special_tokens_config": "t.yaml"}, "add_special_tokens"),
        ({"warmup_ratio": 0.1, "warmup_steps": 5}, "warmup_ratio"),
    ],
)
def test_a_rule_that_only_warns(more, key):
    assert [warning.key for warning in load_train({**BASE, **more}).warnings] == [key]


def test_a_run_with_a_dataset_and_no_task_trains_and_says_so():
    run = load_train(without("do_train"))
    assert run.trains and not run.training["do_train"]
    assert "this run trains" in run.warnings[0].reason
    only_eval = load_train({**without("do_train"), "do_eval": True, **EVAL})
    assert not only_eval.trains and only_eval.warnings == ()
    assert load_train({**BASE, "do_eval": True, **EVAL}).trains


def test_a_run_with_nothing_to_do_says_so():
    problems = problems_of(load_train, {"model_name_or_path": "m"})
    assert "nothing to do" in problems["dataset"].reason and set(problems) == {"dataset"}
    problems = problems_of(load_train, {**BASE, "do_train": False})
    assert "nothing to do" in problems["do_train"].reason and set(problems) == {"do_train"}


def test_what_a_training_run_cannot_do_without():
    assert set(problems_of(load_train, {"do_train": True})) == {"model_name_or_path", "dataset", "output_dir"}
    assert set(problems_of(load_infer, {})) == {"model_name_or_path"}
    assert set(problems_of(load_export, {"model_name_or_path": "m"})) == {"export_dir"}


def test_launchers_of_the_reference_are_refused(monkeypatch):
    monkeypatch.setenv("USE_V1", "1")
    problems = problems_of(load_train, BASE)
    assert set(problems) == {"USE_V1"} and problems["USE_V1"].file == "environment"
    load_infer({"model_name_or_path": "m"})


def test_the_keys_of_ray_are_read_with_use_ray(monkeypatch):
    monkeypatch.setenv("USE_RAY", "1")
    keys = {"ray_num_workers": 4, "ray_init_kwargs": '{"address": "auto"}', "resources_per_worker": {"GPU": 1}}
    run = load_train({**BASE, **keys, "fsdp": "full_shard"})
    assert run.warnings == () and run.ray.ray_num_workers == 4 and run.ray.ray_init_kwargs == {"address": "auto"}


def test_the_keys_of_megatron_are_read_with_use_mca(monkeypatch):
    keys = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "moe_token_dispatcher_type": "alltoall"}
    assert {warning.key for warning in load_train({**BASE, **keys}).warnings} == keys.keys()
    monkeypatch.setenv("USE_MCA", "1")
    run = load_train({**BASE, **keys, "finetuning_type": "full", "recompute_granularity": "full"})
    assert run.warnings == () and run.mcore.tensor_model_parallel_size == 2 and run.mcore.sequence_parallel


def test_the_keys_of_megatron_are_read_with_use_megatron_bridge(monkeypatch):
    keys = {"tensor_model_parallel_size": 2, "sequence_parallel": True, "mixed_precision": "fp16_mixed"}
    assert {warning.key for warning in load_train({**BASE, **keys}).warnings} == keys.keys()
    monkeypatch.setenv("USE_MEGATRON_BRIDGE", "1")
    run = load_train({**BASE, **keys, "use_distributed_optimizer": False})
    assert run.warnings == () and run.bridge.tensor_model_parallel_size == 2
    assert (run.bridge.mixed_precision, run.bridge.use_distributed_optimizer) == ("fp16_mixed", False)


def test_a_run_is_frozen():
    run = load_train({**BASE, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 1}})
    for thing in (run, run.model, run.data, run.adapter, run.method, run.finetuning, run.generating, run.training):
        field = dataclasses.fields(thing)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, field, None)
    with pytest.raises(TypeError):
        run.given["stage"] = "pt"
    with pytest.raises(TypeError):
        run.training.given["seed"] = 1


def test_training_keys_are_a_mapping_with_defaults():
    training = load_train({**BASE, "seed": 7}).training
    assert (training["seed"], training["per_device_train_batch_size"], training["report_to"]) == (7, 8, ("none",))
    assert (training["warmup_ratio"], training["overwrite_output_dir"]) == (0.0, False)
    assert dict(training.given) == {"output_dir": "o", "do_train": True, "seed": 7}
    assert len(list(training)) == len(training) and "seed" in training and "sede" not in training
    with pytest.raises(KeyError):
        training["sede"]


@pytest.mark.parametrize("value", [float("inf"), 10**30, -1, None, [], {"a": 1}], ids=str)
def test_no_value_of_a_key_is_a_traceback(value):
    """Every rule reads values that other rules refuse, since all problems are told at once."""
    base = {**BASE, "stage": "grpo", "reward_funcs": "r.py:f", "eval_strategy": "steps", "val_size": 0.1}
    for name in catalog():
        with contextlib.suppress(ConfigError):
            load_train({**base, name: value})


def test_numbers_are_finite_but_one():
    """Whoever reads them: a checkpoint of a diverged run is all that an infinite learning rate gives."""
    numbers = [name for name, (key, *_) in catalog().items() if float in (key.type, *get_args(key.type))]
    assert {"learning_rate", "neftune_noise_alpha", "pref_beta", "val_size", "interleave_probs"} <= {*numbers}
    problems = problems_of(load_train, {**BASE, **dict.fromkeys(numbers, float("inf"))})
    told = {name for name, problem in problems.items() if problem.reason == "must be a finite number"}
    assert {*numbers} - told == {"max_grad_norm"}
    assert load_train({**BASE, "max_grad_norm": "inf"}).training["max_grad_norm"] == math.inf


@pytest.mark.parametrize("key", ["tokenized_path", "deepspeed", "resume_from_checkpoint", "media_dir"])
def test_an_empty_text_names_no_path(key):
    """As an unset variable of a shell gives it. Python would take it for the current folder."""
    assert load_train({**BASE, key: ""}).given[key] is None


def test_an_empty_text_is_no_null_where_there_must_be_a_path():
    assert problems_of(load_train, {**BASE, "model_name_or_path": ""})["model_name_or_path"].reason == "is empty"


def test_a_former_name_with_null_leaves_the_default():
    assert load_train({**BASE, "per_gpu_train_batch_size": None}).training["per_device_train_batch_size"] == 8


@pytest.mark.parametrize("key", ["logging_steps", "save_steps", "eval_steps"])
def test_steps_are_whole_or_a_share(key):
    problems = problems_of(load_train, {**BASE, **EVAL, "eval_strategy": "steps", key: 2.5})
    assert "must be a whole number of steps" in problems[key].reason


def test_one_setting_that_a_schedule_lacks_is_refused_beside_those_that_it_has():
    kwargs = {"num_cycles": 2, "min_lr": 1e-6}
    problems = problems_of(load_train, {**BASE, "lr_scheduler_type": "cosine", "lr_scheduler_kwargs": kwargs})
    assert "does not fit lr_scheduler_type: cosine, which has num_cycles" in problems["lr_scheduler_kwargs"].reason


def test_export_and_infer_runs_hold_their_sections():
    run = load_export({"model_name_or_path": "m", "adapter_name_or_path": "a,b", "export_dir": "e", "export_size": 2})
    assert run.export.export_size == 2 and run.model.adapter_name_or_path == ("a", "b")
    chat = load_infer({"model_name_or_path": "m", "temperature": 0, "finetuning_type": "full"})
    assert chat.generating.temperature == 0.0 and chat.finetuning_type == "full"


def test_what_only_repeats_a_default_is_not_asked_for():
    """The run.yaml of a run holds every value in effect; taken as a run file it gives no more warnings than before."""
    defaults = {"eaft_alpha": 1.0, "asft_alpha": 0.1, "pissa_iter": 16, "freeze_trainable_layers": 2}
    assert load_train({**BASE, **defaults}).warnings == ()
    warned = load_train({**BASE, **{key: 2 * value for key, value in defaults.items()}}).warnings
    assert {warning.key for warning in warned} == set(defaults)
