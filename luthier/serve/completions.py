"""POST /v1/completions: texts or token ids are continued, without a chat format."""

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from luthier.infer.types import Answer, Settings, Token
from luthier.serve.answers import Answers, Job
from luthier.serve.chat import usage
from luthier.serve.errors import ApiError
from luthier.serve.events import event
from luthier.serve.logprobs import completion_logprobs
from luthier.serve.model import ChatModel
from luthier.serve.protocol import CompletionRequest
from luthier.serve.settings import completion_settings, of_choice


@dataclass(frozen=True, slots=True)
class Completion:
    """A request that has been checked. Choice k belongs to prompt k // n."""

    request: CompletionRequest
    model: ChatModel
    prompts: list[tuple[str, list[int]]]
    """Text and ids of each prompt."""
    settings: Settings
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def num_each(self) -> int:
        return self.request.n or 1

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.num_each

    @property
    def jobs(self) -> list[Job]:
        each = range(self.num_each)
        return [Job(ids, of_choice(self.settings, k), "prompt") for _, ids in self.prompts for k in each]

    def prompt_of(self, number: int) -> tuple[str, list[int]]:
        return self.prompts[number // self.num_each]

    @property
    def drops_answer(self) -> bool:
        """Whether only the prompt was asked for."""
        return self.request.max_tokens == 0


def prepared(request: CompletionRequest, model: ChatModel) -> Completion:
    """Raises `ApiError` for whatever is wrong with the request. Slow for long texts."""
    settings = model.with_special_stops(completion_settings(request, model.settings, model.vocab_size))
    prompts = [_prompt(prompt, model) for prompt in _listed(request.prompt)]
    return Completion(request, model, prompts, settings)


def _listed(prompt: Any) -> list[Any]:
    """The prompts of a request, each a text or a list of ids."""
    return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt


def _prompt(prompt: str | list[int], model: ChatModel) -> tuple[str, list[int]]:
    if isinstance(prompt, str):
        ids = list(model.tokenizer.encode(prompt))
        if not ids:
            raise ApiError("prompt: the text is empty, and this tokenizer puts no token before it", param="prompt")
        return prompt, ids
    wrong = next((token_id for token_id in prompt if token_id >= model.vocab_size), None)
    if wrong is not None:
        raise ApiError(f"prompt: {wrong} is not a token id of this model (0 to {model.vocab_size - 1})", param="prompt")
    return str(model.tokenizer.decode(prompt)), prompt


async def whole(completion: Completion, answers: Answers) -> dict[str, Any]:
    """The body of an answer that is not streamed."""
    done: dict[int, Answer] = {}
    async for number, item in answers:
        if isinstance(item, Answer):
            done[number] = item
    choices = [_choice(completion, number, done[number]) for number in range(completion.num_choices)]
    num_new = 0 if completion.drops_answer else sum(answer.num_new_tokens for answer in done.values())
    return {**_head(completion), "choices": choices, "usage": _usage(completion, num_new)}


def _choice(completion: Completion, number: int, answer: Answer) -> dict[str, Any]:
    prompt, prompt_ids = completion.prompt_of(number)
    request, texts = completion.request, completion.model.texts
    tokens: Sequence[Token] = () if completion.drops_answer else answer.tokens
    text = "" if completion.drops_answer else answer.text
    shown = [*answer.prompt_tokens, *tokens] if request.echo else list(tokens)
    choice: dict[str, Any] = {
        "index": number,
        "text": prompt + text if request.echo else text,
        "logprobs": None if request.logprobs is None else completion_logprobs(shown, texts),
        "finish_reason": "length" if completion.drops_answer else answer.finish_reason,
    }
    if request.return_token_ids:
        choice |= {"prompt_token_ids": prompt_ids, "token_ids": [token.id for token in tokens]}
    return choice


async def events(completion: Completion, answers: Answers) -> AsyncGenerator[bytes]:
    """The events of a stream, without the end mark.

    The log-probabilities of a prompt are known at the end only, so with `echo` and `logprobs` each choice is one chunk.
    """
    request = completion.request
    has_usage = bool(request.stream_options and request.stream_options.include_usage)
    at_once = completion.drops_answer or (bool(request.echo) and request.logprobs is not None)
    offsets = [0] * completion.num_choices
    num_new = 0

    def chunk(number: int, text: str, tokens: Sequence[Token], reason: str | None) -> bytes:
        choice: dict[str, Any] = {"index": number, "text": text, "logprobs": None, "finish_reason": reason}
        if request.logprobs is not None and tokens:
            choice["logprobs"] = completion_logprobs(tokens, completion.model.texts, offsets[number])
            # Not the text so far: the end of a token is held back where a stop string may have begun.
            offsets[number] += sum(len(completion.model.texts.of(token.id)[0]) for token in tokens)
        if request.return_token_ids:
            choice["token_ids"] = [token.id for token in tokens]
        return event({**_head(completion), "choices": [choice], **({"usage": None} if has_usage else {})})

    if request.echo and not at_once:
        for number in range(completion.num_choices):
            yield chunk(number, completion.prompt_of(number)[0], (), None)
    async for number, item in answers:
        if isinstance(item, Answer):
            num_new += 0 if completion.drops_answer else item.num_new_tokens
        if isinstance(item, Answer) and at_once:
            choice = _choice(completion, number, item)
            yield event({**_head(completion), "choices": [choice], **({"usage": None} if has_usage else {})})
        elif isinstance(item, Answer):
            yield chunk(number, "", (), item.finish_reason)
        elif not at_once:
            yield chunk(number, item.text, item.tokens, None)
    if has_usage:
        yield event({**_head(completion), "choices": [], "usage": _usage(completion, num_new)})


def _head(completion: Completion) -> dict[str, Any]:
    return {
        "id": completion.id,
        "object": "text_completion",
        "created": completion.created,
        "model": completion.model.name,
    }


def _usage(completion: Completion, num_new_tokens: int) -> dict[str, int]:
    return usage(sum(len(ids) for _, ids in completion.prompts), num_new_tokens)
