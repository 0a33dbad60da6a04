"""Runs that break the rules, at least one for each rule: the keys, and the key that is blamed."""

import json
from dataclasses import dataclass, field, replace
from typing import Any

from luthier.config.keys.mcore import SIZES
from luthier.config.rules.optim import LIBRARIES, SETTINGS

BASES: dict[str, dict[str, Any]] = {
    "train": {"model_name_or_path": "m", "dataset": "d", "output_dir": "o", "do_train": True},
    "infer": {"model_name_or_path": "m"},
    "export": {"model_name_or_path": "m", "export_dir": "e"},
    "eval": {"model_name_or_path": "m", "task": "perplexity", "dataset": "d"},
}


@dataclass(frozen=True)
class Case:
    """A run that breaks a rule about the last of `keys`, or about `key`. `left_out` are keys of the base."""

    keys: dict[str, Any]
    key: str = ""
    command: str = "train"
    environment: dict[str, str] = field(default_factory=dict)
    has_libraries: bool = True
    left_out: tuple[str, ...] = ()

    @property
    def blamed(self) -> str:
        return self.key or list(self.keys)[-1]

    def __str__(self) -> str:
        return f"{self.command} {json.dumps(self.keys)} {' '.join((*self.environment, *self.left_out))}"


def cases(base: dict[str, Any], *changes: dict[str, Any], command: str = "train") -> list[Case]:
    return [Case({**base, **change}, list(change)[-1], command) for change in changes]


NO_TASK = {"dataset": "", "do_train": False}
NOT_TRAINING = {"do_train": False, "do_eval": True, "val_size": 0.1}
WATCHED = {"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 1}
BEST = {"val_size": 0.1, "load_best_model_at_end": True, "eval_strategy": "steps"}
ZERO_3 = {"deepspeed": {"zero_optimization": {"stage": 3}}}
FSDP = {"fsdp": "full_shard"}
FULL = {"finetuning_type": "full"}
REWARD = {"reward_model": "r"}
STAGES: dict[str, dict[str, Any]] = {
    **{name: {"stage": name} for name in ("pt", "rm", "dpo", "kto")},
    "sft": {},
    "gkd": {"stage": "gkd", "teacher_model": "t"},
    "ppo": {"stage": "ppo", **REWARD},
    "grpo": {"stage": "grpo", **REWARD},
}

OUT_OF_RANGE = {
    **dict.fromkeys(("val_size", "moe_aux_loss_coef", "temperature", "top_k", "learning_rate", "weight_decay"), -1),
    **dict.fromkeys(("max_grad_norm", "adam_epsilon", "neftune_noise_alpha", "dataloader_num_workers"), -1),
    **dict.fromkeys(("warmup_steps", "warmup_ratio", "adam_beta1", "adam_beta2", "seed", "data_seed", "top_p"), -1),
    **dict.fromkeys(("cutoff_len", "checkpoint_every", "max_samples", "preprocessing_batch_size", "buffer_size"), 0),
    **dict.fromkeys(("num_beams", "per_device_train_batch_size", "per_device_eval_batch_size", "max_steps"), 0),
    **dict.fromkeys(("gradient_accumulation_steps", "num_train_epochs", "logging_steps", "video_fps"), 0),
    **dict.fromkeys(("image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels"), 0),
    **dict.fromkeys(("video_maxlen", "audio_sampling_rate", "repetition_penalty"), 0),
    **dict.fromkeys(("eval_num_beams", "generation_num_beams"), -1),
}
"""Key -> a number that no training run takes."""
TOO_LARGE = {
    **dict.fromkeys(("num_beams", "eval_num_beams", "generation_num_beams", "max_steps", "num_train_epochs"), 10**30),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 10**30),
    "dataloader_num_workers": 1_000_000,
}
"""Key -> a number that libraries cannot count, or no machine can serve."""

COMPILING = ({"torch_compile": True}, {"torch_compile_backend": "inductor"}, {"torch_compile_mode": "default"})

MODEL = [
    *cases({}, {"torch_compile_backend": "fastest"}, {"torch_compile_mode": "fastest"}),
    *cases({}, *({key: value} for key, value in (*OUT_OF_RANGE.items(), *TOO_LARGE.items()))),
    *cases({}, {"repetition_penalty": -1.5}, {"temperature": -0.1}, {"top_p": 1.1}, command="infer"),
    *cases(
        {},
        {"model_name_or_path": ""},
        {"finetuning_type": "full", "adapter_name_or_path": "a"},
        {"adapter_name_or_path": "a,b,a"},
        {"init_special_tokens": "desc_init"},
        {"new_special_tokens_config": "t", "add_special_tokens": "<a>"},
        {"stage": "rm", "moe_aux_loss_coef": 0.1},
        {"shift_attn": True, "flash_attn": "fa2"},
        {**ZERO_3, "pure_bf16": True},
        {"offload_folder": "there"},
        {"disable_gradient_checkpointing": True, "use_unsloth_gc": True},
        {"disable_gradient_checkpointing": True, "checkpoint_every": 2},
        {**FSDP, "use_unsloth_gc": True},
        {"moe_aux_loss_coef": 0.1, "use_unsloth_gc": True},
        {"use_reentrant_gc": False, "use_unsloth_gc": True},
        {"max_length": 0, "max_new_tokens": 0},
        {"max_length": 4096},
        {"tool_format": "nowhere"},
        {"image_min_pixels": 5, "image_max_pixels": 4},
        {"video_min_pixels": 5, "video_max_pixels": 4},
    ),
    Case({"enable_liger_kernel": True}, has_libraries=False),
    *cases(
        {},
        {**FULL, **NOT_TRAINING, "mixture_of_depths": "convert"},
        *({**more, "mixture_of_depths": "convert"} for more in ({}, {"stage": "dpo"})),
        *(
            {**more, "mixture_of_depths": "load"}
            for more in (
                {"quantization_bit": 4},
                {"shift_attn": True},
                {"flash_attn": "disabled"},
                {"moe_aux_loss_coef": 0.1},
                FSDP,
            )
        ),
    ),
    *(
        Case({"mixture_of_depths": "convert", **({"export_dir": "e"} if command == "export" else {})}, key, command)
        for key, command in (("mixture_of_depths", "infer"), ("mixture_of_depths", "export"))
    ),
]

QUANTIZED = [
    *cases(
        {"quantization_bit": 4},
        {"quantization_method": "gptq"},
        {"adapter_name_or_path": "a,b"},
        {"quantization_method": "hqq", "quantization_device_map": "auto"},
        {"quantization_method": "hqq", "quantization_type": "fp4"},
        {"quantization_method": "hqq", "double_quantization": False},
        *({key: value} for key, value in (("resize_vocab", True), ("add_tokens", "a"), ("add_special_tokens", "a"))),
        {"new_special_tokens_config": "t"},
        {"train_from_scratch": True},
        {"quantization_device_map": "auto"},
    ),
    *cases(
        {},
        {**FULL, "quantization_bit": 4},
        {**FSDP, "quantization_bit": 8},
        {"bf16": True, "quantization_bit": 4},
        {**NOT_TRAINING, "quantization_bit": 4},
        *(
            {"quantization_method": name, "quantization_bit": bits}
            for name, bits in (("bnb", 3), ("eetq", 4), ("hqq", 7))
        ),
    ),
    Case({"quantization_bit": 4}, command="export"),
]

UNSLOTH = [
    Case({"use_unsloth": True}, has_libraries=False),
    *cases(
        {"use_unsloth": True},
        {"adapter_name_or_path": "a,b"},
        {"rope_scaling": "linear"},
        {"mixture_of_depths": "load"},
        {"model_name_or_path": "m.gguf"},
        {"quantization_method": "hqq", "quantization_bit": 4},
        {"finetuning_type": "oft"},
        {"train_from_scratch": True},
        {"moe_aux_loss_coef": 0.1},
        *({key: "t"} for key in ("add_tokens", "add_special_tokens", "new_special_tokens_config")),
        *({key: True} for key in ("shift_attn", "resize_vocab", "enable_liger_kernel", "upcast_layernorm")),
        *({key: True} for key in ("pissa_init", "loftq_init", "use_llama_pro", "create_new_adapter")),
        {"flash_attn": "fa2"},
        {"upcast_lmhead_output": True},
        {"checkpoint_every": 2},
        {"use_reentrant_gc": False},
        {**STAGES["ppo"], "reward_model_type": "lora"},
        {**STAGES["grpo"], "reward_model_type": "lora"},
    ),
    *cases({}, {**FSDP, "use_unsloth": True}, {"stage": "rm", "use_unsloth": True}),
    Case({"use_unsloth": True}, command="export"),
]

KT = [
    Case({"kt_cpu_activation": "retain"}),
    *cases(
        {"use_kt": True},
        {"disable_gradient_checkpointing": True, "kt_cpu_activation": "recompute"},
        *({key: True} for key in ("use_unsloth", "use_unsloth_gc", "gradient_checkpointing", "train_from_scratch")),
        {"fsdp_config": {"activation_checkpointing": True}},
        {"finetuning_type": "oft"},
        {"adapter_name_or_path": "a,b"},
        {"adapter_name_or_path": "a", "adapter_folder": "../b"},
        {"kt_config": {"kt_train_mode": "full"}},
        {**STAGES["ppo"], "reward_model_type": "lora"},
        {"mixture_of_depths": "load"},
        {"quantization_bit": 4},
    ),
    *cases({}, {"use_kt": True}, {**ZERO_3, "use_kt": True}, {"use_muon": True, "use_kt": True}),
    Case({"use_kt": True}, command="infer"),
]

DATA = [
    Case(NO_TASK, "dataset"),
    Case({"dataset": ""}),
    Case({"do_train": False}),
    Case({}, "do_train", left_out=("do_train",)),
    Case({"output_dir": ""}),
    *cases(
        {},
        {**NO_TASK, "do_eval": True, "val_size": 0.1},
        {"eval_dataset": "e", "val_size": 0.1},
        {"val_size": 1.5},
        {"dataset": "d,d"},
        {"eval_dataset": "e,e"},
        {"interleave_probs": "0.5,0.5"},
        {"mix_strategy": "interleave_under", "interleave_probs": "0.5,0.5"},
        {"dataset": "d,e", "mix_strategy": "interleave_under", "interleave_probs": "70,30"},
        {"dataset": "d,e", "mix_strategy": "interleave_under", "interleave_probs": "1.5,-0.5"},
        {"dataset": "d,e", "mix_strategy": "interleave_over", "interleave_probs": "1,0"},
        *({key: True} for key in ("do_eval", "do_predict", "predict_with_generate")),
        {"eval_strategy": "steps"},
        {"load_best_model_at_end": True},
        {**BEST, "eval_steps": 2, "save_steps": 3},
        {"save_strategy": "best"},
        {"logging_steps": 2.5},
        {"save_steps": 2.5},
        {"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 2.5},
        {"torch_empty_cache_steps": 0},
        {"eval_strategy": "steps", "val_size": 2, "logging_strategy": "no", "logging_steps": 2.5},
        {"debug": "everything"},
        {"accelerator_config": {"splits": True}},
        {"dataloader_prefetch_factor": 2},
        {"early_stopping_steps": 3},
        {"early_stopping_steps": 0},
        *({**WATCHED, "eval_tasks": tasks} for tasks in ("piqa", "pairwise", "harness/piqa")),
        {"eval_tasks": "mmlu_test"},
        *({**WATCHED, "stage": stage, "eval_tasks": "perplexity"} for stage in ("rm", "dpo")),
        {**WATCHED, "stage": "pt", "eval_tasks": "generation"},
        {**WATCHED, "eval_tasks": "mmlu_test", "deepspeed": "z3.json"},
        {
            **WATCHED,
            "eval_tasks": "perplexity",
            "metric_for_best_model": "perplexity_perplexity",
            "greater_is_better": True,
        },
        {"disable_shuffling": True, "train_sampling_strategy": "batch_rebalance"},
        {**STAGES["ppo"], "train_sampling_strategy": "group_by_length"},
        {"metric_for_best_model": "blue"},
        {**WATCHED, "metric_for_best_model": "accuracy"},
        {"eval_dataset": "e", "eval_on_each_dataset": True, "early_stopping_steps": 3, "metric_for_best_model": "loss"},
        {"val_size": 0.1, "eval_strategy": "steps", "eval_steps": 0},
        {"save_steps": 0},
        {"streaming": True},
        {"streaming": True, "max_samples": 5},
        {"streaming": True, "val_size": 0.1},
        {"streaming": True, "tokenized_path": "nowhere"},
        {"max_steps": 5, "tokenized_path": "ROWS", "streaming": True},
        {"max_steps": 5, "stage": "dpo", "streaming": True},
        {"streaming": True, "train_sampling_strategy": "group_by_length"},
        {"buffer_size": 5},
    ),
]

TRAINING = [
    *cases(
        {},
        {"freeze_vision_tower": False, "cache_media_features": True},
        {"freeze_multi_modal_projector": False, "cache_media_features": True},
        {"max_steps": 5, "streaming": True, "cache_media_features": True},
        {"bf16": True, "fp16": True},
        {"fp16": True, "pure_bf16": True},
        {"warmup_steps": 5, "warmup_ratio": 0.1},
        {"stage": "rm", "label_smoothing_factor": 0.1},
        *({key: "x"} for key in ("deepspeed", "fsdp")[:1]),
        FSDP,
        {"optim": "galore_adafactor_layerwise"},
        {"optim": "galore_adamw"},
        {"optim_target_modules": "all-linear"},
        {"gradient_accumulation_steps": 2, "optim": "lomo"},
        {"lr_scheduler_type": "greedy"},
        {"lr_scheduler_type": "cosine_with_min_lr"},
        *({"lr_scheduler_type": name, "lr_scheduler_kwargs": {"other": 1}} for name in SETTINGS),
        {"lr_scheduler_type": "constant", "warmup_steps": 5},
        {"lr_scheduler_type": "constant", "warmup_ratio": 0.1},
        *({"enable_torch_profiler": True, f"profiler_{key}_steps": -1} for key in ("wait", "warmup", "active")),
        {"enable_torch_profiler": True, "profiler_repeat": -1},
        *({**more, "fp8": True} for more in ({}, {"quantization_bit": 4})),
        {"fp8_enable_fsdp_float8_all_gather": True},
        {"fp8": True, "fp8_enable_fsdp_float8_all_gather": True},
        {"fp8": True, "fp8_backend": "te", "fp8_enable_fsdp_float8_all_gather": True},
        {"use_swanlab": True, "swanlab_mode": "local", "swanlab_api_key": "k"},
        {"use_swanlab": True, "swanlab_lark_secret": "s"},
    ),
    *(Case({"optim": values[0]}, has_libraries=False) for values, _ in LIBRARIES.values()),
    Case({"deepspeed": {"zero_optimization": {"stage": 2}, "tensor_parallel": {"autotp_size": 2}}}),
    Case({"deepspeed": {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}}}),
    *(
        Case(keys, environment={"RDZV_ID": "run", "MAX_RESTARTS": "3"})
        for keys in ({"overwrite_output_dir": True}, {"resume_from_checkpoint": "o/checkpoint-1"})
    ),
    Case({}, "USE_V1", environment={"USE_V1": "1"}),
    Case({"template": "minicpm_v_4_6"}, "DOWNSAMPLE_MODE", environment={"DOWNSAMPLE_MODE": "4x"}),
    Case({}, "USE_RAY", environment={"USE_RAY": "1", "FORCE_TORCHRUN": "1"}),
    Case({}, "MAX_RESTARTS", environment={"USE_RAY": "1", "MAX_RESTARTS": "many"}),
    *(
        Case({key: value}, environment={"USE_RAY": "1"})
        for key, value in (("ray_num_workers", 0), ("master_port", "x"), ("resources_per_worker", {"GPU": -1}))
    ),
]

ADAPTERS = [
    *cases(
        {"finetuning_type": "freeze"},
        {"freeze_trainable_layers": 0},
        {"use_llama_pro": True, "freeze_trainable_layers": -1},
        {"freeze_vision_tower": False},
    ),
    *cases(
        {},
        *({key: 0} for key in ("lora_rank", "lora_alpha")),
        {"lora_dropout": 1},
        {"lora_target": ""},
        {"lora_target": "all-linear"},
        {"quantization_bit": 4, "adapter_name_or_path": "a", "create_new_adapter": True},
        {"create_new_adapter": True},
        {"train_from_scratch": True},
        {"freeze_trainable_layers": 3},
        {"use_llama_pro": True, "freeze_trainable_layers": 0},
        *(
            {**more, "pissa_init": True}
            for more in ({"quantization_bit": 4}, {"use_dora": True}, {"stage": "dpo"}, FSDP)
        ),
        {"pissa_iter": -2},
        {"pissa_iter": 4},
        {"pissa_convert": True},
        {"loftq_init": True},
        {"use_dora": True, "loftq_init": True},
        *({"adapter_name_or_path": "a", key: True} for key in ("pissa_init", "loftq_init", "use_llama_pro")),
    ),
    *cases(
        {"finetuning_type": "oft"},
        {"oft_target": ""},
        {"oft_target": "all-linear"},
        {"oft_rank": -1},
        {"oft_block_size": 1},
        {"module_dropout": 1},
        {"oft_block_size": 8, "oft_rank": 4},
        {"lora_target": "q_proj", "oft_target": "v_proj"},
    ),
]

SERVED = {"rollout_server": "http://a:1", "rollout_folder": "f", "rollout_gpu_util": 0.2}
NOT_SERVED: tuple[dict[str, Any], ...] = (
    {"rollout_server": "a:1"},
    {"rollout_gpu_util": 2},
    {"quantization_bit": 4},
    {"rope_scaling": "linear"},
    {"train_from_scratch": True},
    {"mixture_of_depths": "convert"},
    {"resize_vocab": True},
    {"add_tokens": "a"},
    {"add_special_tokens": "<a>"},
    {"new_special_tokens_config": "tokens.yaml"},
    {"adapter_name_or_path": "a,b"},
)

STAGE = [
    *cases(
        STAGES["pt"],
        {"cutoff_len": 1},
        {"label_smoothing_factor": 1},
        *({key: True} for key in ("predict_with_generate", "do_predict", "neat_packing")),
    ),
    *cases(
        STAGES["dpo"],
        *({key: -1} for key in ("pref_beta", "pref_ftx", "pref_bco_weight", "simpo_gamma", "ld_alpha")),
        {"dpo_label_smoothing": 0.6},
        {"pref_loss": "ipo", "dpo_label_smoothing": 0.1},
        {"pref_loss": "robust", "dpo_label_smoothing": 0.5},
        {"pref_loss": "exo_pair"},
        {"pref_loss": "simpo", "pref_bco_weight": 1},
        {"simpo_gamma": 1},
        {"pref_loss": "simpo", "ref_model": "r"},
        {"pref_loss": "simpo", "ref_model_adapters": "a"},
        {"ref_model_adapters": "a"},
    ),
    *cases(
        STAGES["kto"], *({key: -1} for key in ("pref_beta", "pref_ftx", "kto_chosen_weight", "kto_rejected_weight"))
    ),
    *cases(STAGES["kto"], {"on_overlong": "split"}, {"ref_model_adapters": "a"}),
    *(Case({**STAGES[name], **NOT_TRAINING}, "ref_model") for name in ("dpo", "kto")),
    *cases(
        STAGES["rm"],
        {"on_overlong": "split"},
        *({key: True} for key in ("packing", "neat_packing", "predict_with_generate", "upcast_lmhead_output")),
    ),
    *cases({"use_asft_loss": True, "ref_model": "r"}, {"ref_model_adapters": "a,a"}),
    *(
        case
        for name in ("dpo", "kto")
        for case in cases({**STAGES[name], "ref_model": "r"}, {"ref_model_adapters": "a,a"})
    ),
    *(
        case
        for name in ("ppo", "grpo")
        for key in ("ref_model_adapters", "reward_model_adapters")
        for case in cases({**STAGES[name], "ref_model": "r", "reward_model_type": "full"}, {key: "a,a"})
    ),
    *cases(STAGES["dpo"], {"do_predict": True}, {"lora_dropout": 0.1}),
    *cases(
        {},
        {"label_smoothing_factor": 1},
        {"eaft_alpha": -1},
        {"asft_alpha": -1},
        {"use_eaft_loss": True, "use_dft_loss": True},
        {"use_asft_loss": True, "use_dft_loss": True},
        {"use_asft_loss": True, "use_eaft_loss": True},
        *({key: 2} for key in ("eaft_alpha", "asft_alpha")),
        *({key: "r"} for key in ("ref_model", "ref_model_adapters")),
        {"ref_model_quantization_bit": 3},
        {"ref_model_quantization_bit": 4},
        {"use_asft_loss": True, "ref_model_adapters": "a"},
        {"use_asft_loss": True, "label_smoothing_factor": 0.1},
        {"train_on_prompt": True, "mask_history": True},
        {"val_size": 0.1, "predict_with_generate": True, "compute_accuracy": True},
        {"do_predict": True},
        {"packing": False, "neat_packing": True},
    ),
    Case({"ref_model": "r", "ref_model_quantization_bit": 4}, has_libraries=False),
    *cases({"stage": "gkd"}, {"teacher_model": ""}),
    *cases(
        STAGES["gkd"],
        *({key: -1} for key in ("gkd_beta", "gkd_temperature", "gkd_lambda")),
        *({key: True} for key in ("predict_with_generate", "do_predict")),
        *({"gkd_lambda": 1, key: True} for key in ("packing", "neat_packing", "streaming", "train_on_prompt")),
        *({"gkd_lambda": 1, **more} for more in ({"on_overlong": "split"}, {"shift_attn": True})),
    ),
    Case({"stage": "ppo"}, "reward_model"),
    Case({**STAGES["ppo"], **NOT_TRAINING}, "do_train"),
    *cases(
        STAGES["ppo"],
        {"reward_funcs": "f"},
        {"reward_funcs": "f.py:g,f.py:g"},
        {"reward_weights": "1,2"},
        {"reward_model_quantization_bit": 3},
        {"reward_model_type": "api", "reward_model_quantization_bit": 4},
        {"reward_model": None, "reward_model_quantization_bit": 4},
        {"shift_attn": True},
        {"on_overlong": "split"},
        *({key: True} for key in ("do_eval", "do_predict", "predict_with_generate", "streaming")),
        {"eval_strategy": "steps"},
        {"do_sample": False},
        {"num_beams": 2},
        {**FULL, "reward_model_type": "lora"},
        {"reward_model_type": "api", "reward_model": "r"},
        {"reward_model_type": "api", "reward_model": "http://host:99999"},
        {"reward_model_type": "api", "reward_model": "http://user:word@host/v1/score/evaluation"},
        {"reward_model": "http://x"},
        {"reward_model_adapters": "a"},
        {"ref_model_adapters": "a"},
        *({key: 0} for key in ("ppo_buffer_size", "ppo_epochs", "ppo_target")),
    ),
    Case({**STAGES["ppo"], "reward_model_quantization_bit": 4}, has_libraries=False),
    *cases(
        {**STAGES["grpo"], "finetuning_type": "lora"},
        *({key: SERVED[key]} for key in ("rollout_server", "rollout_folder", "rollout_gpu_util")),
        *({"rollout_backend": "vllm", **more} for more in NOT_SERVED),
        {"finetuning_type": "oft", "rollout_backend": "vllm"},
    ),
    *cases(
        STAGES["grpo"],
        {"num_generations": 1},
        {"num_generations": 7},
        {"num_iterations": 0},
        *({key: -1} for key in ("grpo_beta", "epsilon", "epsilon_high")),
        *({key: "r"} for key in ("ref_model", "ref_model_adapters")),
        {"grpo_beta": 0.1, "ref_model_adapters": "a"},
    ),
]
SWITCHES = {
    **{name: {**FULL, f"use_{name}": True} for name in ("galore", "apollo", "badam", "adam_mini", "muon")},
    "loraplus": {"loraplus_lr_ratio": 16},
}
OPTIMIZERS = [
    *(
        Case({**keys, **more}, blamed or next(key for key in keys if key != "finetuning_type"))
        for name, keys in SWITCHES.items()
        for more, blamed in (
            ({"use_adam_mini": True} if name != "adam_mini" else {"use_muon": True}, ""),
            *(((FSDP, ""), (ZERO_3, ""), ({"optim": "lomo"}, "optim")) if name != "loraplus" else ()),
            *((({"finetuning_type": "lora"}, ""),) if name in ("galore", "apollo", "badam") else ()),
            *((({}, ""),) if name in ("galore", "apollo") else ()),
        )
    ),
    *(
        Case({**SWITCHES[name], f"{name}_{key}": value})
        for name in ("galore", "apollo")
        for key, value in (("target", ""), ("rank", 0), ("update_interval", 0), ("scale", -1))
    ),
    *(
        Case({**SWITCHES[name], f"{name}_layerwise": True, **more}, blamed or f"{name}_layerwise", environment=world)
        for name in ("galore", "apollo")
        for more, blamed, world in (
            ({"gradient_accumulation_steps": 2}, "", {}),
            ({"fp16": True}, "", {}),
            ({"max_grad_norm": 0.5}, "max_grad_norm", {}),
            ({}, "", {"WORLD_SIZE": "2"}),
            ({"on_nonfinite": "skip"}, "on_nonfinite", {}),
        )
    ),
    Case(SWITCHES["badam"], environment={"WORLD_SIZE": "2"}),
    *cases(
        SWITCHES["badam"],
        {"badam_switch_interval": 0},
        {"badam_update_ratio": 0},
        {"badam_start_block": -1},
        {"badam_verbose": 3},
        {"badam_mode": "ratio", "badam_start_block": 1},
        {"badam_mode": "ratio", "badam_switch_mode": "random"},
        {"badam_update_ratio": 0.5},
        {"badam_mask_mode": "scatter"},
    ),
    *cases({}, {**FULL, "loraplus_lr_ratio": 16}, {"loraplus_lr_ratio": -1}),
    *cases({"loraplus_lr_ratio": 16}, {"loraplus_lr_embedding": -1}),
]
ANSWERS_AND_EXPORT = [
    *cases(
        {},
        {"export_dir": ""},
        {"export_hub_model_id": "me/my model"},
        {"export_size": 0},
        {"export_max_kl": -1},
        {"export_check": False, "export_max_kl": 1},
        {"export_quantization_bit": 5},
        {"export_quantization_bit": 4},
        {"adapter_name_or_path": "a", "export_quantization_bit": 4},
        {"export_quantization_bit": 4, "export_gguf": "f16"},
        {"export_quantization_nsamples": 0},
        {"export_quantization_maxlen": 0},
        {"export_quantization_dataset": "d"},
        {"export_quantization_nsamples": 7},
        {"export_quantization_maxlen": 7},
        command="export",
    ),
]
ENGINE_KEYS = (
    *({"quantization_bit": 4}, {"rope_scaling": "linear"}, {"mixture_of_depths": "load"}, {"train_from_scratch": True}),
    *({"use_unsloth": True}, {"add_tokens": "a"}, {"add_special_tokens": "a"}, {"resize_vocab": True}),
    *({"new_special_tokens_config": "f"}, {"flash_attn": "sdpa"}, {"enable_liger_kernel": True}, {"num_beams": 2}),
    *({"use_kv_cache": False}, {"offload_folder": "f"}, {"upcast_layernorm": True}, {"upcast_lmhead_output": True}),
    *({"adapter_name_or_path": "a,b"}, {"model_name_or_path": "m.gguf"}),
)
ENGINES = [
    *cases({"infer_backend": "vllm"}, *ENGINE_KEYS, command="infer"),
    Case({"stage": "rm", "infer_backend": "vllm"}, command="infer"),
    *cases(
        {"infer_backend": "vllm"},
        {"vllm_maxlen": 0},
        {"vllm_max_lora_rank": 0},
        {"vllm_gpu_util": 0},
        {"vllm_gpu_util": 1.1},
        {"vllm_config": {"served-model-name": "x"}},
        command="infer",
    ),
    *cases(
        {"infer_backend": "sglang"},
        {"repetition_penalty": 1.1},
        {"sglang_maxlen": 0},
        {"sglang_mem_fraction": 0},
        {"sglang_mem_fraction": 2},
        {"sglang_tp_size": 0},
        {"sglang_config": {"api_key": "x"}},
        command="infer",
    ),
    *cases({}, {"infer_backend": "sglang"}),
    *cases({}, {"infer_backend": "vllm"}, command="export"),
]
RECOVERY = [
    *(
        Case({**keys, "on_nonfinite": action})
        for action, keys in (
            ("skip", ZERO_3),
            ("skip", {"optim": "lomo"}),
            ("rollback", {"save_strategy": "no"}),
            ("rollback", {"save_only_model": True}),
        )
    ),
    *cases({}, {"max_nonfinite_steps": 3}, {"max_nonfinite_steps": -1}, {"save_on_signal_seconds": 0}),
]
PARALLEL = [
    Case({"sp_size": 0}),
    Case({"stage": "rm", "sp_size": 2}),
    *cases(
        {"sp_size": 2},
        {"max_steps": 1, "streaming": True},
        {"accelerator_config": {"dispatch_batches": True}},
        {"train_sampling_strategy": "batch_rebalance"},
        *COMPILING,
        {"neftune_noise_alpha": 5},
        {"shift_attn": True},
        {"use_unsloth": True},
        {"finetuning_type": "full", "mixture_of_depths": "convert"},
        {"moe_aux_loss_coef": 0.1},
        {"flash_attn": "fa2"},
        {"use_asft_loss": True},
        {"compute_accuracy": True},
    ),
]
FULL = {"finetuning_type": "full", "dataset": "d"}
MEGATRON = [
    replace(case, environment={name: "1"})
    for name in ("USE_MCA", "USE_MEGATRON_BRIDGE")
    for case in (
        *cases(FULL, *({key: 0} for key in (*SIZES, "virtual_pipeline_model_parallel_size", "recompute_num_layers"))),
        *cases(FULL, {"sequence_parallel": True}),
        *cases(FULL, {"stage": "rm"}),
        Case({"finetuning_type": "freeze"}),
        Case({"finetuning_type": "lora", "quantization_bit": 4}),
        *cases(
            FULL,
            *({key: True} for key in ("enable_liger_kernel", "shift_attn", "use_unsloth", "use_kt")),
            {"mixture_of_depths": "convert"},
            *({key: True} for key in ("train_from_scratch", "resize_vocab", "fp8", "streaming")),
            *COMPILING,
            *({key: "new"} for key in ("add_tokens", "add_special_tokens", "new_special_tokens_config")),
            {"neftune_noise_alpha": 5},
            {"profile_modules": "*.mlp"},
            {"rope_scaling": "yarn"},
            *({key: True} for key in ("use_dft_loss", "use_eaft_loss", "use_asft_loss", "compute_accuracy")),
            {"label_smoothing_factor": 0.1},
            {"moe_aux_loss_coef": 0.1},
            {"eval_tasks": "perplexity"},
            *({key: True} for key in ("predict_with_generate", "do_predict", "neat_packing", "packing")),
            {"load_best_model_at_end": True},
            {"deepspeed": {"zero_optimization": {"stage": 2}}},
            {"fsdp": True},
            {"sp_size": 2},
            {"tp_size": 2},
            {"optim": "sgd"},
            {"on_nonfinite": "skip"},
            {"save_on_signal_seconds": 5},
        ),
    )
]
MEGATRON += [
    *(Case({}, name, environment={name: "1", "USE_RAY": "1"}) for name in ("USE_MCA", "USE_MEGATRON_BRIDGE")),
    Case({}, "USE_MEGATRON_BRIDGE", environment={"USE_MCA": "1", "USE_MEGATRON_BRIDGE": "1"}),
    *(
        replace(case, environment={"USE_MEGATRON_BRIDGE": "1"})
        for case in (
            *cases(
                {"finetuning_type": "lora"},
                *({key: True} for key in ("use_dora", "use_rslora", "pissa_init", "loftq_init", "use_llama_pro")),
                {"additional_target": "embed_tokens"},
                {"create_new_adapter": True},
                {"adapter_name_or_path": "a"},
                {"lora_target": "q_proj,v_proj"},
            ),
            *cases(
                FULL,
                {"use_packed_sequences": True},
                {"eval_on_each_dataset": True},
                {"enable_torch_profiler": True},
                {"early_stopping_steps": 2},
                {"lr_scheduler_kwargs": {"num_cycles": 2}},
                {"lr_scheduler_type": "polynomial"},
                {"fp16": True},
                {"save_strategy": "best"},
            ),
            Case({**FULL, "use_galore": True}, "optim"),
            Case({**FULL, **NOT_TRAINING}, "do_train"),
        )
    ),
]
SPLIT = {"tp_size": 2, "save_strategy": "no", "finetuning_type": "full"}
TENSOR_PARALLEL = [
    Case({"tp_size": 0}),
    Case({"save_strategy": "no", "finetuning_type": "full", "stage": "rm", "tp_size": 2}),
    Case({"save_strategy": "no", "finetuning_type": "oft", "tp_size": 2}),
    *cases(
        SPLIT,
        {"optim": "adafactor"},
        {"max_steps": 1, "streaming": True},
        *COMPILING,
        {"predict_with_generate": True},
        {"do_predict": True},
        {"eval_tasks": "perplexity"},
        {"use_asft_loss": True},
        {"enable_liger_kernel": True},
        {"shift_attn": True},
        {"use_unsloth": True},
        {"use_kt": True},
        {"fp8": True},
        {"train_from_scratch": True},
        {"mixture_of_depths": "convert"},
        {"moe_aux_loss_coef": 0.1},
        {"resize_vocab": True},
        {"add_tokens": "new"},
        {"add_special_tokens": "<new>"},
        {"new_special_tokens_config": "tokens.yaml"},
        {"sp_size": 2},
        {"fsdp": True},
        {"deepspeed": {}},
        {"accelerator_config": {"dispatch_batches": True}},
        {"train_sampling_strategy": "batch_rebalance"},
        {"on_nonfinite": "rollback"},
    ),
    *cases(
        {**SPLIT, "finetuning_type": "lora"},
        {"quantization_bit": 4},
        {"adapter_name_or_path": "a"},
        {"additional_target": "embed_tokens"},
        {"use_dora": True},
        {"pissa_init": True},
        {"use_llama_pro": True},
    ),
]

EVALUATED = [
    *cases(
        {},
        {"task": None},
        {"task": "mmlu"},
        {"task": "harness/"},
        {"task": "perplexity,perplexity"},
        {"html": "page.html"},
        {"do_train": True, "dataset": "d"},
        {"task": "generation", "dataset": ""},
        {"task": "generation", "stage": "dpo"},
        {"task": "pairwise", "judge_model": "j", "judge_url": None},
        {"task": "pairwise", "judge_url": "http://h/v1", "judge_model": None},
        {"stage": "rm"},
        {"stage": "dpo"},
        {"batch_size": 0},
        {"n_shot": -1},
        {"infer_backend": "vllm"},
        {"dataset": ""},
        command="eval",
    ),
]
CASES = [
    *(MODEL + QUANTIZED + UNSLOTH + KT + DATA + TRAINING),
    *(
        ADAPTERS
        + STAGE
        + OPTIMIZERS
        + ANSWERS_AND_EXPORT
        + ENGINES
        + RECOVERY
        + PARALLEL
        + TENSOR_PARALLEL
        + MEGATRON
        + EVALUATED
    ),
]
