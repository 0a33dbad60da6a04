"""SGLang as a child process: `sglang serve`, asked through its own /generate. Written for SGLang 0.5.23.

Prompts and answers are token ids, so the chat format stays luthier's own. SGLANG_RETURN_ORIGINAL_LOGPROB makes the
log-probabilities those of the raw logits. Grammars are held by llguidance, as they are by `infer_backend: huggingface`.
https://docs.sglang.ai/basic_usage/sampling_params.html
"""

import json
import secrets
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from luthier.infer.engines import Engine, Generating
from luthier.infer.servers.model import Ask, Event
from luthier.infer.types import Settings, Token, UnsupportedSetting

if TYPE_CHECKING:
    from luthier.config.runs import InferRun
    from luthier.infer.servers.start import ServerPlan
    from luthier.model.files.sources import ModelSource

ADAPTER = "adapter"
_SEED_BITS = 31
_DETERMINISTIC = "enable_deterministic_inference"


class SglangDialect:
    name = "sglang"
    path = "/generate"
    install_hint = "install a version of SGLang from 0.5.23 on"

    def __init__(self, adapter: str | None, *, takes_seeds: bool) -> None:
        """`takes_seeds`: the server runs with --enable-deterministic-inference; without it a seed has no effect."""
        self._adapter, self._takes_seeds = adapter, takes_seeds

    def check(self, settings: Settings) -> None:
        if settings.repetition_penalty != 1:
            raise UnsupportedSetting(
                "repetition_penalty",
                "SGLang leaves the tokens of the prompt out of it -> use presence_penalty or frequency_penalty",
            )
        if settings.seed is not None and not settings.is_greedy and not self._takes_seeds:
            raise UnsupportedSetting(
                "seed",
                f"SGLang answers repeatably only with `sglang_config: {{{_DETERMINISTIC}: true}}` in the run file",
            )

    def body(self, ask: Ask) -> dict[str, Any]:
        settings = ask.settings
        sampling = {
            "max_new_tokens": max(ask.num_new_tokens, 0),
            "stop_token_ids": sorted(ask.stop_ids),
            "ignore_eos": settings.ignore_eos,  # then its own stop ids too; they end the answer here
            **ask.choice,
            "top_k": settings.top_k if settings.top_k > 0 else -1,
        }
        if settings.seed is not None:
            sampling["sampling_seed"] = settings.seed
        elif self._takes_seeds and not settings.is_greedy:
            # It would sample with the seed 42, so that all answers to a prompt would be the same one.
            sampling["sampling_seed"] = secrets.randbits(_SEED_BITS)
        if settings.grammar is not None:
            sampling |= _structured(settings.grammar)
        body: dict[str, Any] = {"input_ids": list(ask.prompt_ids), "stream": True, "sampling_params": sampling}
        if settings.num_logprobs is not None:
            body |= {"return_logprob": True, "top_logprobs_num": settings.num_logprobs}
        if settings.prompt_logprobs:
            body["logprob_start_len"] = 0
        if self._adapter is not None:
            body["lora_path"] = self._adapter
        return body

    def read(self, event: Mapping[str, Any], ask: Ask) -> Event:
        meta, ids = event["meta_info"], event["output_ids"]
        ended = meta.get("finish_reason")
        if ended is not None and ended["type"] not in ("stop", "length"):
            return Event(fault=str(ended.get("message") or ended["type"]))
        reason = None if ended is None else ended["type"]
        if ask.settings.num_logprobs is None:
            return Event(tokens=tuple(map(Token, ids)), finish_reason=reason)
        prompt: tuple[Token, ...] = ()
        if ask.settings.prompt_logprobs:
            prompt = _tokens(meta["input_token_logprobs"], meta.get("input_top_logprobs"), ask.settings.num_logprobs)
        tokens = _tokens(meta["output_token_logprobs"], meta.get("output_top_logprobs"), ask.settings.num_logprobs)
        if len(tokens) != len(ids):
            raise ValueError(f"{len(ids)} tokens come with {len(tokens)} log-probabilities")
        return Event(tokens=tokens, prompt_tokens=prompt, finish_reason=reason)


def command(program: str, run: "InferRun", plan: "ServerPlan", port: int, key: str) -> list[str]:
    """The arguments of `sglang serve`. It takes the key of its API in no other way."""
    from luthier.infer.servers.start import options

    keys = run.sglang
    words: dict[str, Any] = {
        "model_path": plan.model,
        "host": plan.host,
        "port": port,
        "api_key": key,
        "dtype": run.model.infer_dtype,
        "context_length": plan.num_positions(keys.sglang_maxlen),
        "mem_fraction_static": keys.sglang_mem_fraction,
        "tp_size": plan.num_devices if keys.sglang_tp_size == -1 else keys.sglang_tp_size,
        "grammar_backend": "llguidance",
        "incremental_streaming_output": True,
        "revision": plan.revision,
    }
    if run.model.trust_remote_code:
        words["trust_remote_code"] = True
    if plan.adapter is not None:
        words |= {
            "lora_paths": {"lora_name": ADAPTER, "lora_path": str(plan.adapter)},
            "max_loras_per_batch": 2,  # the model alone, which its own first request asks, counts as one
            "lora_backend": keys.sglang_lora_backend,
        }
    given = {name: value for name, value in (keys.sglang_config or {}).items() if value is not False}
    return [program, "serve", *options(words), *options(given)]


def open_model(run: "InferRun", source: "ModelSource", tokenizer: Any, stop_ids: Collection[int]) -> Generating:
    from luthier.infer.servers.adapter import Limits
    from luthier.infer.servers.start import plan_server, start

    plan = plan_server(run, source, tokenizer, stop_ids, Limits("SGLang", None, one_scale=True))
    config = {name.replace("-", "_"): value for name, value in (run.sglang.sglang_config or {}).items()}
    return start(
        ENGINE,
        lambda program, port, key: (
            command(program, run, plan, port, key),
            {"SGLANG_RETURN_ORIGINAL_LOGPROB": "1"},
        ),
        SglangDialect(None if plan.adapter is None else ADAPTER, takes_seeds=bool(config.get(_DETERMINISTIC))),
        plan,
    )


def _structured(grammar: str) -> dict[str, Any]:
    from luthier.infer.grammar import schema_of

    schema = schema_of(grammar)
    return {"ebnf": grammar} if schema is None else {"json_schema": json.dumps(schema)}


def _tokens(chosen: Sequence[Any], tops: Sequence[Any] | None, num_top: int) -> tuple[Token, ...]:
    """Entries are [log-probability, token id, text]. The first token of a prompt has no log-probability."""
    others = tops if tops and num_top else [()] * len(chosen)
    return tuple(
        Token(token_id, logprob, tuple((other_id, value) for value, other_id, _ in (top or ())[:num_top]))
        for (logprob, token_id, _), top in zip(chosen, others, strict=True)
    )


ENGINE = Engine(
    name="sglang",
    open=open_model,
    program="sglang",
    install="pip install sglang (here, or in an environment of its own whose program sglang is on PATH)",
)
