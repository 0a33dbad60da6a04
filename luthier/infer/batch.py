"""Answers to many prompts, for `predict_with_generate` and rollouts.

They share a batch in which an ended answer makes place for the next prompt (`luthier.infer.batching`). Beam search,
prompts with images, and models whose answers cannot share one, go through `generate` in batches of a fixed size, padded
on the left, since the last prompt token must be in the last column. Longer prompts come first, so that prompts that are
read together need little padding. Answers come back in the order of the prompts.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from luthier.core.machine import available_memory_bytes
from luthier.infer.decoding import stop_strings, stop_strings_apart
from luthier.infer.types import Answer, Settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from luthier.data.pixels import Prompts
    from luthier.infer.engines import Delivery
    from luthier.infer.row import Row


MIN_STEPS_PACKED = 64
"""Packing SmolLM2-135M in float32 takes as long as about 20 steps save with eight rows, and 60 with one."""


def generate_answers(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    stop_ids: Collection[int],
    batch_size: int,
    *,
    keeps_stop: bool = False,
    seeds: Sequence[int] | None = None,
    seen: "Prompts | None" = None,
    fast_path: bool = True,
    is_done: Callable[[], None] = lambda: None,
) -> Iterator[list[int]]:
    """The new token ids of each prompt, without padding and, unless `keeps_stop`, without the stop token.

    A prompt that fills the context gets an empty answer. Whenever an answer is yielded, the model's train/eval mode and
    the random state are as before, so an evaluation during training does not change the training. Without `seeds` each
    answer is sampled from the seed of the settings plus its number, so the answers can be reproduced.

    `seeds`: one per prompt. Its answer is then sampled from this seed whatever else is in the batch, up to rounding:
    if a sum differs in the last bit, the sampled token can differ. Beam search uses the first seed only.

    `seen`: the prompts with their images, which go through `generate`. No answer has a token that stands for an image.

    `fast_path`: answers take faster ways to the same numbers, up to rounding. `is_done`: called after each answer,
    before it is yielded.
    """
    from luthier.infer.batching import can_batch

    longest_first = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    if settings.num_beams == 1 and can_batch(model) and seen is None:
        own_seeds = [(settings.seed or 0) + number for number in range(len(prompts))] if seeds is None else seeds
        asked = [(number, prompts[number], replace(settings, seed=own_seeds[number])) for number in longest_first]
        found = _in_one_batch(model, tokenizer, asked, frozenset(stop_ids), batch_size, is_done, fast_path=fast_path)
        yield from (found[number] if keeps_stop else _without_stop(found[number], stop_ids) for number in sorted(found))
        return
    waiting: dict[int, list[int]] = {}
    next_index = 0
    for start in range(0, len(prompts), batch_size):
        chosen = longest_first[start : start + batch_size]
        own = [(settings.seed or 0) + start] if seeds is None else [seeds[index] for index in chosen]
        answers = _generate_batch(
            model,
            tokenizer,
            [prompts[index] for index in chosen],
            settings,
            stop_ids,
            own,
            samples_apart=seeds is not None and not settings.is_greedy and settings.num_beams == 1,
            seen=None if seen is None else (seen, chosen),
        )
        if not keeps_stop:
            answers = [_without_stop(answer, stop_ids) for answer in answers]
        waiting.update(zip(chosen, answers, strict=True))
        for _ in answers:
            is_done()
        while next_index in waiting:
            yield waiting.pop(next_index)
            next_index += 1


def _in_one_batch(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    asked: Sequence[tuple[int, Sequence[int], Settings]],
    stop_ids: frozenset[int],
    batch_size: int,
    is_done: Callable[[], None],
    *,
    fast_path: bool,
) -> dict[int, list[int]]:
    """The answers of a batch in which up to `batch_size` rows come and go. `asked`: number, prompt and settings."""
    from luthier.infer.batching import RowBatch, num_read_together
    from luthier.infer.lean_layers import lean_layers
    from luthier.infer.products import Products

    batch = RowBatch(model, tokenizer, stop_ids, fast_path=fast_path)
    answers: dict[int, list[int]] = {}
    waiting = deque(_row(model, tokenizer, *one, stop_ids, answers, is_done) for one in asked)
    num_steps = sum(row.num_new_tokens for row in waiting) // batch_size
    with _as_at_rest(model), ExitStack() as stack:
        if fast_path:
            stack.enter_context(lean_layers(model))
            stack.enter_context(Products(model, _free_bytes(num_steps)).in_use())
        while len(answers) < len(asked):
            fitting = list(islice(waiting, batch_size - len(batch.rows)))
            if fitting:
                batch.add([waiting.popleft() for _ in range(num_read_together(fitting))])
            else:
                batch.step()
    return answers


def _free_bytes(num_steps: int) -> int | None:
    """The memory for packed weights; None for answers so short that packing takes longer than it saves."""
    return available_memory_bytes() if num_steps >= MIN_STEPS_PACKED else None


def _row(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    number: int,
    prompt: Sequence[int],
    settings: Settings,
    stop_ids: frozenset[int],
    answers: dict[int, list[int]],
    is_done: Callable[[], None],
) -> "Row":
    """A row that puts its answer into `answers` under its number."""
    from luthier.infer.decoding import num_positions
    from luthier.infer.row import Row

    def deliver(item: "Delivery") -> None:
        if isinstance(item, Answer):
            answers[number] = [token.id for token in item.tokens]
            is_done()
        elif isinstance(item, Exception):
            raise item

    settings = replace(settings, stop=(*settings.stop, *stop_strings(model)))
    return Row(
        prompt,
        settings,
        num_new_tokens=max(settings.num_new_tokens(len(prompt), num_positions(model)), 0),
        stop_ids=stop_ids,
        tokenizer=tokenizer if settings.stop else None,
        deliver=deliver,
    )


def _without_stop(answer: list[int], stop_ids: Collection[int]) -> list[int]:
    return answer[:-1] if answer and answer[-1] in stop_ids else answer


@contextmanager
def _as_at_rest(model: "PreTrainedModel") -> Iterator[None]:
    """A context in which the model is in evaluation mode; afterwards its mode and the random state are as before."""
    import torch

    was_training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    model.eval()
    try:
        with stop_strings_apart(model), torch.random.fork_rng(devices=devices):
            yield
    finally:
        model.train(was_training)


def _generate_batch(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    stop_ids: Collection[int],
    seeds: Sequence[int],
    *,
    samples_apart: bool,
    seen: "tuple[Prompts, Sequence[int]] | None" = None,
) -> list[list[int]]:
    """`samples_apart`: each answer is sampled from its own seed; else the first seed is that of the batch. `seen`: the
    prompts with images, and the numbers of these."""
    import torch

    from luthier.infer.decoding import generation_config, num_positions

    limit = num_positions(model)
    budgets = [settings.num_new_tokens(len(prompt), limit) for prompt in prompts]
    with_room = [index for index, budget in enumerate(budgets) if budget > 0]
    answers: list[list[int]] = [[] for _ in prompts]
    if not with_room:
        return answers
    width = max(len(prompts[index]) for index in with_room)
    padding = [[tokenizer.pad_token_id] * (width - len(prompts[index])) for index in with_room]
    input_ids = torch.tensor([[*pad, *prompts[index]] for pad, index in zip(padding, with_room, strict=True)])
    attention_mask = torch.tensor([[0] * len(pad) + [1] * (width - len(pad)) for pad in padding])
    num_new_tokens = max(budgets[index] for index in with_room)
    config = generation_config(
        settings,
        model=model,
        num_prompt_tokens=width,
        num_new_tokens=num_new_tokens,
        stop_ids=stop_ids,
        pad_token_id=tokenizer.pad_token_id,
    )
    options: dict[str, Any] = {"generation_config": config}
    if seen is not None:
        images, numbers_of = seen
        more = images.inputs([numbers_of[index] for index in with_room], input_ids)
        options |= {name: values.to(model.device) for name, values in more.items()}
        config.suppress_tokens = images.pixels.placeholders  # training on such an answer would look for an image
    if samples_apart:
        from luthier.infer.sampling import PerAnswerSampler, uniforms

        numbers = uniforms([seeds[index] for index in with_room], num_new_tokens).to(model.device)
        options["custom_generate"] = PerAnswerSampler(numbers, width).sample
    with _as_at_rest(model):
        options = _with_features(model, options)
        torch.manual_seed(seeds[0])
        generate: Any = model.generate
        output = generate(
            input_ids=input_ids.to(model.device), attention_mask=attention_mask.to(model.device), **options
        )
    for index, row in zip(with_room, output[:, width:].tolist(), strict=True):
        ids = _until_stop(row[: budgets[index]], stop_ids)
        answers[index] = _until_text(ids, tokenizer, (*settings.stop, *stop_strings(model)))
    return answers


def _with_features(model: "PreTrainedModel", options: Mapping[str, Any]) -> dict[str, Any]:
    """Media that several prompts share as features, which are computed once for all steps of `generate`."""
    import torch

    from luthier.model.media.towers import FEATURES, SHARED, features_of
    from luthier.model.modules import unwrap

    found = dict(options)
    shared = found.pop(SHARED, None)
    if shared is not None:
        with torch.no_grad():
            found[FEATURES] = features_of(unwrap(model), shared)
    return found


def _until_text(ids: list[int], tokenizer: "PreTrainedTokenizerBase", words: Sequence[str]) -> list[int]:
    """Up to the token that completes a stop string, which is included."""

    def has_stop(length: int) -> bool:
        text = tokenizer.decode(ids[:length])
        return any(word in text for word in words)

    return ids[: bisect_left(range(len(ids)), True, key=has_stop)] if words else ids


def _until_stop(ids: list[int], stop_ids: Collection[int]) -> list[int]:
    """Up to the first stop token, which is included."""
    end = next((position for position, token_id in enumerate(ids) if token_id in stop_ids), len(ids))
    return ids[: end + 1]
