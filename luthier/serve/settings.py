"""From the fields of a request to the settings of an answer. Fields that are absent take the value of the run file."""

from dataclasses import replace
from typing import Any

from luthier.infer.types import Settings
from luthier.serve.errors import ApiError
from luthier.serve.protocol import ChatRequest, CompletionRequest, SamplingFields

_SAME_NAME = (
    *("temperature", "top_p", "min_p", "do_sample", "seed", "ignore_eos", "skip_special_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)
"""Fields that are called as in `Settings`."""


def chat_settings(request: ChatRequest, base: Settings, vocab_size: int, grammar: str | None) -> Settings:
    """Raises `ApiError` for fields that do not go together."""
    if request.top_logprobs is not None and not request.logprobs:
        raise ApiError("top_logprobs: needs logprobs: true", param="top_logprobs")
    settings = _settings(request, base, vocab_size)
    limit = request.max_completion_tokens or request.max_tokens
    num_logprobs = (request.top_logprobs or 0) if request.logprobs else None
    return replace(
        settings,
        max_new_tokens=settings.max_new_tokens if limit is None else limit,
        num_logprobs=num_logprobs,
        grammar=grammar,
    )


def completion_settings(request: CompletionRequest, base: Settings, vocab_size: int) -> Settings:
    """For `max_tokens: 0` one token is generated, which the answer leaves out. Raises `ApiError`."""
    if request.suffix:
        raise ApiError("suffix: this server does not fill in the middle of a text", param="suffix")
    if request.best_of not in (None, request.n or 1):
        raise ApiError("best_of: only the value of n is supported", param="best_of")
    if request.max_tokens == 0 and not request.echo:
        raise ApiError("max_tokens: 0 leaves nothing to answer, unless echo is true", param="max_tokens")
    settings = _settings(request, base, vocab_size)
    return replace(
        settings,
        max_new_tokens=settings.max_new_tokens if request.max_tokens is None else max(request.max_tokens, 1),
        num_logprobs=request.logprobs,
        prompt_logprobs=bool(request.echo) and request.logprobs is not None,
    )


def of_choice(settings: Settings, number: int) -> Settings:
    """With a seed, the choices of a request differ from each other and are the same each time."""
    return settings if settings.seed is None else replace(settings, seed=_int64(settings.seed + number))


def _settings(request: SamplingFields, base: Settings, vocab_size: int) -> Settings:
    if request.stream_options is not None and not request.stream:
        raise ApiError("stream_options: needs stream: true", param="stream_options")
    given: dict[str, Any] = {name: getattr(request, name) for name in _SAME_NAME}
    given = {name: value for name, value in given.items() if value is not None}
    if request.top_k is not None:
        given["top_k"] = max(request.top_k, 0)
    if request.stop is not None:
        given["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    if request.stop_token_ids is not None:
        given["stop_token_ids"] = tuple(request.stop_token_ids)
    if request.logit_bias:
        given["logit_bias"] = {_token_id(name, vocab_size): float(value) for name, value in request.logit_bias.items()}
    return replace(base, **given)


def _token_id(name: str, vocab_size: int) -> int:
    if not name.isascii() or not name.isdigit() or len(name) > 10 or int(name) >= vocab_size:
        raise ApiError(
            f"logit_bias: {name[:20]!r} is not a token id of this model (0 to {vocab_size - 1})", param="logit_bias"
        )
    return int(name)


def _int64(number: int) -> int:
    """Wraps around at the borders of 64 bits."""
    return (number + 2**63) % 2**64 - 2**63
