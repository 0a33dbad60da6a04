"""Rules about `infer_backend: vllm` and `sglang`: what only transformers can do, and the values of their own keys.

The engines read the folder of the model themselves, so nothing that luthier changes while it loads reaches them.
"""

from dataclasses import replace

from luthier.config.rules.engine import (
    Condition,
    Rule,
    Rules,
    When,
    above,
    all_of,
    at_least,
    is_changed,
    is_given,
    is_turned_on,
    value_of,
    warning,
    within,
)
from luthier.core.kinds import STAGES

_EXPORT = "write the model with `luthier export` first, and give its folder as model_name_or_path"
_TRANSFORMERS_ONLY = "leave infer_backend out"
_OWN_OPTIONS = frozenset(
    (
        *("model", "model_path", "tokenizer", "tokenizer_path", "host", "port", "uds", "api_key", "served_model_name"),
        *("enable_lora", "lora_modules", "lora_paths", "generation_config", "skip_tokenizer_init"),
        *("incremental_streaming_output", "return_tokens_as_token_ids", "structured_outputs_config", "grammar_backend"),
    )
)
"""Options of the servers that luthier sets, since it could not speak to them otherwise."""


def _uses(*names: str) -> Condition:
    return lambda run: run.model.infer_backend in names


def _names_own_option(section: str, key: str) -> Condition:
    options = value_of(section, key)
    return lambda run: any(name.replace("-", "_") in _OWN_OPTIONS for name in options(run) or ())


def _if_read(rule: Rule) -> Rule:
    """The rule about a key of an engine, if that engine is chosen."""
    (key,) = rule.keys
    return replace(rule, broken=all_of(_uses(key.partition("_")[0]), rule.broken))


_elsewhere, _vllm, _sglang = When(_uses("vllm", "sglang")), When(_uses("vllm")), When(_uses("sglang"))

_CHANGES_THE_MODEL = ("mixture_of_depths", "train_from_scratch", "use_unsloth")
_NEW_TOKENS = ("add_tokens", "add_special_tokens", "new_special_tokens_config", "resize_vocab")
_OWN_WAY = {
    "flash_attn": "chooses the attention itself",
    "enable_liger_kernel": "has kernels of its own",
    "use_kv_cache": "always uses a KV cache",
    "offload_folder": "keeps the weights on the devices",
    "upcast_layernorm": "chooses number formats itself",
    "upcast_lmhead_output": "chooses number formats itself",
}

_COUNTS = (("vllm", "vllm_maxlen"), ("vllm", "vllm_max_lora_rank"), ("sglang", "sglang_maxlen"))
_SHARES = (("vllm", "vllm_gpu_util"), ("sglang", "sglang_mem_fraction"))

_MODEL_RULES = (
    _elsewhere.refuses(
        ("infer_backend", "stage"),
        "writes answers and does not score texts, which `stage: rm` asks for",
        _TRANSFORMERS_ONLY,
        lambda run: run.stage in STAGES.names and STAGES.get(run.stage).head == "score",
    ),
    _elsewhere.refuses(
        ("adapter_name_or_path", "infer_backend"),
        "the engine takes one adapter and merges none",
        f"merge them: {_EXPORT}",
        lambda run: len(run.model.adapter_name_or_path) > 1,
    ),
    _elsewhere.refuses(
        ("model_name_or_path", "infer_backend"),
        "a GGUF file is read by transformers only",
        _EXPORT,
        lambda run: run.model.model_name_or_path.lower().endswith(".gguf"),
    ),
    _elsewhere.refuses(
        ("quantization_bit", "infer_backend"),
        "the engine reads quantized models and does not quantize here",
        "leave it out, or give a model that is quantized already (export_quantization_bit of `luthier export`)",
        is_given("quantization", "quantization_bit"),
    ),
    _elsewhere.refuses(
        ("rope_scaling", "infer_backend"),
        "the engine takes positions as the model's own config.json has them",
        _EXPORT,
        is_given("features.rope_scaling", "rope_scaling"),
    ),
    *(
        _elsewhere.refuses(
            (key, "infer_backend"),
            "the engine loads the model as its folder has it",
            _TRANSFORMERS_ONLY,
            is_turned_on(key),
        )
        for key in _CHANGES_THE_MODEL
    ),
    *(
        _elsewhere.refuses(
            (key, "infer_backend"), "the engine has no rows for new tokens in the embedding", _EXPORT, is_turned_on(key)
        )
        for key in _NEW_TOKENS
    ),
    *(
        _elsewhere.warns((key, "infer_backend"), f"has no effect: the engine {reason}", "leave it out", is_changed(key))
        for key, reason in _OWN_WAY.items()
    ),
)

ENGINE_RULES = Rules(
    (
        *_MODEL_RULES,
        _elsewhere.refuses(
            ("num_beams", "infer_backend"),
            "the engine has no beam search that streams",
            "leave it out, or leave infer_backend out",
            lambda run: run.generating.num_beams > 1,
        ),
        _sglang.refuses(
            ("repetition_penalty", "infer_backend"),
            "SGLang leaves the tokens of the prompt out of it, so it would mean something else",
            "leave it out, or use another engine",
            lambda run: run.generating.repetition_penalty != 1,
        ),
        *(_if_read(at_least(part, key, 1)) for part, key in _COUNTS),
        *(_if_read(above(part, key, 0)) for part, key in _SHARES),
        *(_if_read(within(part, key, 0, 1, or_high=True)) for part, key in _SHARES),
        _sglang.refuses(
            ("sglang_tp_size",),
            "must be at least 1, or -1 for all devices",
            "",
            lambda run: run.sglang.sglang_tp_size < 1 and run.sglang.sglang_tp_size != -1,
        ),
        *(
            one.refuses(
                (key,),
                f"sets an option that luthier sets itself ({', '.join(sorted(_OWN_OPTIONS))})",
                "leave it out; the model, its adapter and its number type have keys of their own",
                _names_own_option(part, key),
            )
            for one, part, key in ((_vllm, "vllm", "vllm_config"), (_sglang, "sglang", "sglang_config"))
        ),
    )
)
"""For the commands that generate text."""

ENGINE_TRAINING_RULES = Rules(
    (
        Rule(
            ("infer_backend",),
            "is for chat and for the API; a training run generates with transformers",
            "leave it out",
            _uses("vllm", "sglang"),
        ),
    )
)
ENGINE_EXPORT_RULES = Rules(
    (
        warning(
            ("infer_backend",), "has no effect: an export generates no text", "leave it out", _uses("vllm", "sglang")
        ),
    )
)
