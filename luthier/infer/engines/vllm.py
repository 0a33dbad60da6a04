"""vLLM as a child process: `vllm serve`, asked through /v1/completions. Written for vLLM 0.33.

Prompts and answers are token ids (`return_token_ids`), so the chat format stays luthier's own. Log-probabilities are
those of the raw logits, vLLM's default. Grammars are held by llguidance, as they are by `infer_backend: huggingface`.
https://docs.vllm.ai/en/stable/serving/openai_compatible_server
"""

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.infer.engines import Engine, Generating
from luthier.infer.servers.model import Ask, Event
from luthier.infer.types import Settings, Token

if TYPE_CHECKING:
    from luthier.config.runs import InferRun
    from luthier.infer.servers.start import ServerPlan
    from luthier.model.files.sources import ModelSource

BASE, ADAPTER = "base", "adapter"
"""How the model is called, without and with its adapter."""
_FINISHED = {"stop": "stop", "length": "length"}


class VllmDialect:
    name = "vllm"
    path = "/v1/completions"
    install_hint = "install a version of vLLM from 0.33 on"

    def __init__(self, model: str) -> None:
        self._model = model

    def check(self, settings: Settings) -> None:
        """vLLM has all of them."""

    def body(self, ask: Ask) -> dict[str, Any]:
        settings = ask.settings
        body = {
            "model": self._model,
            "prompt": list(ask.prompt_ids),
            "stream": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "max_tokens": max(ask.num_new_tokens, 0),
            # The end tokens of the model are among these, unless the caller wants them ignored.
            "stop_token_ids": sorted(ask.stop_ids),
            "ignore_eos": True,
            **ask.choice,
            "top_k": max(settings.top_k, 0),
        }
        if settings.seed is not None:
            body["seed"] = settings.seed
        if settings.num_logprobs is not None:
            body["logprobs"] = settings.num_logprobs
        if settings.prompt_logprobs:
            body["echo"] = True
        if settings.grammar is not None:
            body["structured_outputs"] = _structured(settings.grammar)
        return body

    def read(self, event: Mapping[str, Any], ask: Ask) -> Event:
        if not event["choices"]:
            return Event()
        choice = event["choices"][0]
        reason = choice.get("finish_reason")
        if reason is not None and reason not in _FINISHED:
            return Event(fault=f"the answer ended with {reason}")
        ids, logprobs = choice["token_ids"] or (), choice.get("logprobs")
        if logprobs is None:
            return Event(tokens=tuple(map(Token, ids)), finish_reason=reason)
        tokens = _tokens(logprobs, ask.settings.num_logprobs or 0)
        # With `echo` the prompt is scored in the first event, which also names its tokens.
        num_prompt = len(choice.get("prompt_token_ids") or ()) if ask.settings.prompt_logprobs else 0
        return Event(tokens=tokens[num_prompt:], prompt_tokens=tokens[:num_prompt], finish_reason=reason)


def command(program: str, run: "InferRun", plan: "ServerPlan", port: int) -> list[str]:
    """The arguments of `vllm serve`."""
    from luthier.infer.servers.start import options

    keys = run.vllm
    words: dict[str, Any] = {
        "host": plan.host,
        "port": port,
        "served_model_name": BASE,
        "dtype": run.model.infer_dtype,
        "max_model_len": plan.num_positions(keys.vllm_maxlen),
        "gpu_memory_utilization": keys.vllm_gpu_util,
        "tensor_parallel_size": plan.num_devices,
        "generation_config": "vllm",  # the settings of each answer are complete
        "structured_outputs_config": {"backend": "guidance"},
        "revision": plan.revision,
    }
    if keys.vllm_enforce_eager:
        words["enforce_eager"] = True
    if run.model.trust_remote_code:
        words["trust_remote_code"] = True
    if plan.adapter is not None:
        words |= {
            "enable_lora": True,
            "max_lora_rank": keys.vllm_max_lora_rank,
            "lora_modules": {"name": ADAPTER, "path": str(plan.adapter)},
        }
    return [program, "serve", plan.model, *options(words), *options(keys.vllm_config or {})]


def open_model(run: "InferRun", source: "ModelSource", tokenizer: Any, stop_ids: Collection[int]) -> Generating:
    from luthier.infer.servers.adapter import Limits
    from luthier.infer.servers.start import plan_server, start

    limits = Limits("vLLM", run.vllm.vllm_max_lora_rank, "vllm_max_lora_rank")
    plan = plan_server(run, source, tokenizer, stop_ids, limits)
    return start(
        ENGINE,
        lambda program, port, key: (command(program, run, plan, port), {"VLLM_API_KEY": key}),
        VllmDialect(BASE if plan.adapter is None else ADAPTER),
        plan,
    )


def _structured(grammar: str) -> dict[str, Any]:
    from luthier.infer.grammar import schema_of

    schema = schema_of(grammar)
    return {"grammar": grammar} if schema is None else {"json": schema}


def _tokens(logprobs: Mapping[str, Any], num_top: int) -> tuple[Token, ...]:
    """Tokens are written `token_id:17`. vLLM adds the chosen one to the most likely ones."""
    found = []
    tops: Sequence[Mapping[str, float] | None] = logprobs["top_logprobs"]
    for word, logprob, top in zip(logprobs["tokens"], logprobs["token_logprobs"], tops, strict=True):
        best = sorted((top or {}).items(), key=lambda item: -item[1])[:num_top]
        found.append(Token(_id(word), logprob, tuple((_id(other), value) for other, value in best)))
    return tuple(found)


def _id(word: str) -> int:
    return int(word.removeprefix("token_id:"))


ENGINE = Engine(
    name="vllm",
    open=open_model,
    program="vllm",
    install="pip install vllm (here, or in an environment of its own whose program vllm is on PATH)",
)
