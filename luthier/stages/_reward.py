"""Keys and rules that ppo and grpo share: reward models and training on sampled answers."""

from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

from luthier.config.rules.engine import Rule, all_of, is_other_than, is_set, merged_once, not_
from luthier.config.rules.model import scores_with_adapter, trains_adapter
from luthier.core.addresses import is_address
from luthier.stages._pairs import NO_PACKING
from luthier.stages._reference import REFERENCE_RULES, ReferenceConfig, bits_of_other
from luthier.stages._served_rollouts import SERVED_RULES


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardConfig(ReferenceConfig):
    reward_model: str | None = None
    """The model that scores answers: an adapter, a model, or the address of a server."""
    reward_model_adapters: tuple[str, ...] = ()
    """Adapters of the reward model, merged in this order."""
    reward_model_quantization_bit: int | None = None
    """Bits to load the reward model with, 4 or 8, by bitsandbytes."""
    reward_model_type: Literal["lora", "full", "api"] = "lora"
    """What `reward_model` is: an adapter on the same base, a separate model, or a server."""
    reward_funcs: tuple[str, ...] = ()
    """Python functions that score answers: `file.py:function` or `module:function`."""
    reward_weights: tuple[float, ...] = ()
    """Weights of reward_funcs, in order, then of reward_model; unset means 1 each."""
    rollout_backend: Literal["huggingface", "vllm"] = "huggingface"
    """What samples the answers: the model in training itself, or vLLM, which gets its weights before each rollout."""
    rollout_server: str | None = None
    """The address of a running `vllm serve`, http://host:port; unset starts one beside each process that trains."""
    rollout_folder: str | None = None
    """Where weights are written for vLLM, a folder that trainer and server both see; unset means output_dir."""
    rollout_gpu_util: float = 0.3
    """Share of the memory of its device that a vLLM started by the run takes."""


ROLLOUT_RULES = (
    Rule(
        ("reward_model", "reward_funcs"),
        "is missing, and nothing else scores the answers",
        "name an adapter of stage: rm, a model (reward_model_type: full), a server (reward_model_type: api), or a"
        " function, e.g. reward_funcs: rewards.py:ends_well",
        lambda run: not run.method.reward_funcs and run.method.reward_model is None,
        for_rows=False,
    ),
    Rule(
        ("reward_funcs",),
        "a function is named by its file or module and its name",
        "write file.py:function or module:function",
        lambda run: any(":" not in name or not name.rpartition(":")[2] for name in run.method.reward_funcs),
    ),
    Rule(
        ("reward_funcs",),
        "names a function twice",
        "name it once, with a larger weight in reward_weights",
        lambda run: len(set(run.method.reward_funcs)) < len(run.method.reward_funcs),
    ),
    Rule(
        ("reward_weights", "reward_funcs", "reward_model"),
        "there must be one weight for each function, and one more for a reward_model",
        "give as many numbers",
        lambda run: (
            bool(run.method.reward_weights)
            and len(run.method.reward_weights) != len(run.method.reward_funcs) + (run.method.reward_model is not None)
        ),
    ),
    *REFERENCE_RULES,
    *bits_of_other("reward_model_quantization_bit", "reward_model"),
    merged_once("method", "reward_model_adapters"),
    Rule(
        ("reward_model_quantization_bit", "reward_model_type"),
        "is about a model that is loaded here, and a server loads its own",
        "leave it out",
        lambda run: run.method.reward_model_type == "api" and run.method.reward_model_quantization_bit is not None,
    ),
    Rule(
        ("shift_attn", "stage"),
        "attends within groups, and this stage generates answers, which needs attention to the whole text",
        "leave it out",
        is_set("features.shifted_attention", "shift_attn"),
    ),
    Rule(
        ("on_overlong", "stage"),
        "cuts a row into several, and here each row is a whole prompt",
        "set on_overlong: truncate, drop or error",
        lambda run: run.data.on_overlong == "split",
    ),
    *NO_PACKING,
    *(
        Rule(
            (key, "stage"),
            "has no answers to evaluate in this stage: the reward of its own answers is logged while it trains",
            "leave it out, or evaluate the trained model with stage: sft",
            is_set("training", key),
        )
        for key in ("do_eval", "do_predict", "predict_with_generate")
    ),
    Rule(
        ("eval_strategy", "stage"),
        "has no answers to evaluate in this stage: the reward of its own answers is logged while it trains",
        "leave it out",
        is_other_than("training", "eval_strategy", "no"),
    ),
    Rule(
        ("do_train", "stage"),
        "is all that this stage does",
        "write do_train: true",
        lambda run: not run.trains,
    ),
    Rule(
        ("do_sample", "temperature"),
        "the answers to a prompt must differ for the model to find better ones, and greedy answers do not",
        "set do_sample: true and a temperature above 0, e.g. 1.0",
        lambda run: not run.generating.do_sample or run.generating.temperature == 0,
    ),
    Rule(
        ("num_beams", "stage"),
        "searches for the likeliest answer, while this stage learns from sampled answers",
        "leave it out",
        lambda run: run.generating.num_beams > 1,
    ),
    Rule(
        ("streaming", "stage"),
        "prompts are sampled from the whole of a dataset",
        "leave it out",
        is_set("data", "streaming"),
    ),
    *SERVED_RULES,
    Rule(
        ("reward_model_type", "finetuning_type"),
        "an adapter on the same base is a reward model for runs that train an adapter on that base",
        "set reward_model_type: full, with the base as reward_model and the adapter as reward_model_adapters",
        all_of(scores_with_adapter, not_(trains_adapter)),
    ),
    Rule(
        ("reward_model", "reward_model_type"),
        "is not the address of a server",
        "write http://host:port/v1/score/evaluation, or set reward_model_type: lora or full",
        lambda run: run.method.reward_model_type == "api" and not is_address(run.method.reward_model or ""),
    ),
    Rule(
        ("reward_model",),
        "holds a user name or a password, which no request brings and every log shows",
        "leave it out; the environment variable REWARD_API_KEY holds the key of a server",
        lambda run: is_address(run.method.reward_model or "") and "@" in urlsplit(run.method.reward_model).netloc,
    ),
    Rule(
        ("reward_model", "reward_model_type"),
        "is the address of a server, not a model",
        "set reward_model_type: api",
        lambda run: run.method.reward_model_type != "api" and _looks_like_address(run.method.reward_model),
    ),
    Rule(
        ("reward_model_adapters", "reward_model"),
        "are merged into a reward model of its own, and there is none",
        "set reward_model to the base of the adapters, and reward_model_type: full",
        lambda run: (
            bool(run.method.reward_model_adapters)
            and (run.method.reward_model is None or run.method.reward_model_type != "full")
        ),
    ),
)


def _looks_like_address(name: str | None) -> bool:
    return name is not None and name.startswith(("http://", "https://"))
