"""Sampled answers are the same whatever number of them memory holds at once."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from luthier.infer.batch import generate_answers
from luthier.infer.batching import RowBatch
from luthier.infer.types import Settings
from luthier.model.fitting import FittingBatch
from tests.tiny import TINY_LLAMA, byte_tokenizer

PROMPTS = [[65, 66, 67], [70] * 9, [80], [1, 2], [5] * 12, [90, 91, 92, 93], [3], [4, 4]]
SEEDS = range(100, 108)
STOP_IDS = set(range(0, 320, 12))
REFUSAL = "out of memory: tried to allocate 2.00 GiB"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY_LLAMA)).eval()


@pytest.fixture(params=["shared", "fixed"])
def generate(request, model, monkeypatch):
    """In a batch that rows join and leave, and in batches of a fixed size."""
    if request.param == "fixed":
        monkeypatch.setattr("luthier.infer.batching.can_batch", lambda model: False)
    settings = Settings(temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=12)

    def run(numbers, num_together):
        prompts, seeds = [PROMPTS[n] for n in numbers], [SEEDS[n] for n in numbers]
        return generate_answers(
            model, byte_tokenizer(), prompts, settings, STOP_IDS, num_together, keeps_stop=True, seeds=seeds
        )

    return run


def fitting():
    return FittingBatch("answers generated")


def answers_of(batch, generate):
    return batch.results(generate, len(PROMPTS), len(PROMPTS))


def limit_memory(monkeypatch, model, most, place):
    """A pass over more than `most` rows, of prompts or of single tokens, is refused memory."""
    sizes, forward = [], model.forward

    def limited(*args, **given):
        rows, width = given["input_ids"].shape
        sizes.append(rows)
        if rows > most and (place == "anywhere" or width == 1):
            raise torch.OutOfMemoryError(REFUSAL)
        return forward(*args, **given)

    limited.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(model, "forward", limited)
    return sizes


@pytest.mark.parametrize(("most", "limit"), [(6, 4), (3, 2), (1, 1)])
@pytest.mark.parametrize("place", ["anywhere", "step"])
def test_answers_are_the_same_and_later_ones_begin_with_the_size_that_fits(
    monkeypatch, said, model, generate, most, limit, place
):
    expected = answers_of(fitting(), generate)
    assert len({len(answer) for answer in expected}) > 1
    sizes, batch = limit_memory(monkeypatch, model, most, place), fitting()
    assert answers_of(batch, generate) == expected
    assert batch.limit == limit
    sizes.clear()
    assert answers_of(batch, generate) == expected and max(sizes) <= limit + (place == "step") * len(PROMPTS)
    warnings = [line for line in said if line.startswith("warning: ")]
    assert len(warnings) == {6: 1, 3: 2, 1: 3}[most]
    told = "warning: out of memory with 8 answers generated at once; from now on 4 at once, with equal results"
    assert warnings[0] == told


def test_memory_for_a_part_of_the_answers_keeps_them():
    asked = []

    def generate(numbers, num_together):
        asked.append(list(numbers))
        for number in numbers:
            if number == 2 and num_together > 2:
                raise torch.OutOfMemoryError(REFUSAL)
            yield [number]

    assert fitting().results(generate, 4, 4) == [[0], [1], [2], [3]]
    assert asked == [[0, 1, 2, 3], [2, 3]]


def test_a_single_answer_that_does_not_fit_is_an_error(monkeypatch, model, generate):
    limit_memory(monkeypatch, model, 0, "anywhere")
    with pytest.raises(torch.OutOfMemoryError, match="tried to allocate"):
        answers_of(fitting(), generate)


def test_any_other_error_is_one(monkeypatch, generate):
    def fails(*_, **__):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(RowBatch, "add", fails)
    monkeypatch.setattr(LlamaForCausalLM, "generate", fails)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        answers_of(fitting(), generate)
