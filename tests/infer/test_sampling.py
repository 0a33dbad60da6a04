"""Draws follow the distribution, and each answer has random numbers of its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.infer.batch import generate_answers
from luthier.infer.sampling import chosen_tokens, sample_tokens, uniforms
from luthier.infer.types import Settings

EOS = 260
PROMPTS = [[65, 66, 67], [70] * 9, [80], [1, 2], [5] * 30, [90, 91, 92, 93]]
SEEDS = [11, 12, 13, 2**62, 15, 16]


@pytest.fixture(scope="module")
def model(llama_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama_folder).eval()


def test_a_token_is_where_the_distribution_function_passes_the_number():
    """P = (0.5, 0, 0.25, 0.25), so F = (0.5, 0.5, 0.75, 1): the second token has no u that draws it."""
    scores = torch.tensor([[0.5, 0.0, 0.25, 0.25]]).log().expand(6, 4)
    numbers = torch.tensor([0.0, 0.499, 0.501, 0.749, 0.751, 1 - 2**-53], dtype=torch.float64)
    assert sample_tokens(scores, numbers).tolist() == [0, 0, 2, 2, 3, 3]


def test_tokens_are_drawn_as_often_as_they_are_likely():
    """chi^2 of 20000 draws from 8 tokens is about 7 with a deviation of about 4."""
    torch.manual_seed(0)
    scores, numbers = torch.randn(8), uniforms([3], 20_000)[0]
    counts = torch.bincount(sample_tokens(scores.expand(20_000, 8), numbers), minlength=8)
    expected = scores.softmax(0) * 20_000
    assert float(((counts - expected) ** 2 / expected).sum()) < 25


def test_random_numbers_are_those_of_the_seed_alone():
    numbers = uniforms([5, 6, 5], 4)
    assert torch.equal(numbers[0], numbers[2]) and not torch.equal(numbers[0], numbers[1])
    assert torch.equal(uniforms([6], 7)[0, :4], numbers[1])


@pytest.mark.parametrize(
    "cut", [{}, {"top_k": 5}, {"top_p": 0.5, "temperature": 0.7}, {"repetition_penalty": 1.3}], ids=str
)
def test_an_answer_does_not_depend_on_its_batch(model, tokenizer, cut):
    settings = Settings(**{"top_p": 1.0, "top_k": 0, "temperature": 1.0, "max_new_tokens": 12, **cut})

    def answers(chosen: list[int], batch_size: int) -> list[list[int]]:
        options = {"keeps_stop": True, "seeds": [SEEDS[index] for index in chosen]}
        prompts = [PROMPTS[index] for index in chosen]
        return list(generate_answers(model, tokenizer, prompts, settings, {EOS}, batch_size, **options))

    whole = answers([0, 1, 2, 3, 4, 5], 6)
    assert whole == answers([0, 1, 2, 3, 4, 5], 1) == answers([0, 1, 2, 3, 4, 5], 4)
    assert answers([4, 2], 2) == [whole[4], whole[2]]
    assert len({tuple(answer) for answer in whole}) == 6


def test_the_keys_shape_the_distribution_that_is_drawn_from(model, tokenizer):
    """With top_k: 1, or next to no temperature, the likeliest token is all there is."""
    greedy = list(generate_answers(model, tokenizer, PROMPTS, Settings(do_sample=False, max_new_tokens=6), {EOS}, 6))
    for cut in ({"top_k": 1}, {"temperature": 1e-7}, {"top_p": 1e-6}):
        settings = Settings(**{"top_p": 1.0, "top_k": 0, "temperature": 1.0, "max_new_tokens": 6, **cut})
        assert list(generate_answers(model, tokenizer, PROMPTS, settings, {EOS}, 6, seeds=SEEDS)) == greedy
    free = Settings(top_p=1.0, top_k=0, temperature=1.0, max_new_tokens=6)
    assert list(generate_answers(model, tokenizer, PROMPTS, free, {EOS}, 6, seeds=SEEDS)) != greedy


def test_greedy_answers_and_beams_are_what_they_are_without_seeds(model, tokenizer):
    for settings in (
        Settings(do_sample=False, max_new_tokens=6),
        Settings(do_sample=False, num_beams=2, max_new_tokens=6),
    ):
        plain, seeded = (
            list(generate_answers(model, tokenizer, PROMPTS, settings, {EOS}, 6, seeds=seeds))
            for seeds in (None, SEEDS)
        )
        assert plain == seeded


CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "sliding window": ("MistralConfig", {"sliding_window": 4}),
    "state of another kind": ("MambaConfig", {"state_size": 4}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_answers_are_those_of_generate_whatever_the_batch_shares(tokenizer, tmp_path, monkeypatch, kind):
    """Three answers to each prompt: it is read once, and an answer that has ended is computed no more."""
    import transformers

    from tests.tiny import TINY_LLAMA, save_tiny

    name, changes = CONFIGS[kind]
    folder = save_tiny(tmp_path / "model", getattr(transformers, name)(**{**TINY_LLAMA, **changes}))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    settings = Settings(top_p=1.0, top_k=0, temperature=1.0, max_new_tokens=12)
    prompts, seeds, stops = [prompt for prompt in PROMPTS for _ in range(3)], range(18), set(range(60, 100))

    def answers() -> tuple[list[list[int]], int]:
        """And how many tokens the model computes, padding included."""
        sizes: list[int] = []
        hook = model.get_input_embeddings().register_forward_pre_hook(lambda _, args: sizes.append(args[0].numel()))
        options = {"keeps_stop": True, "seeds": seeds}
        found = list(generate_answers(model, tokenizer, prompts, settings, stops, 18, **options))
        hook.remove()
        return found, sum(sizes)

    found, num_computed = answers()
    assert len({tuple(answer) for answer in found}) > 12 and len({len(answer) for answer in found}) > 3
    monkeypatch.setattr("luthier.infer.batching.can_batch", lambda model: False)
    expected, num_computed_by_generate = answers()
    assert found == expected
    if kind == "state of another kind":
        assert num_computed == num_computed_by_generate
    else:
        width = max(map(len, PROMPTS))
        assert num_computed <= len(PROMPTS) * width + sum(len(answer) - 1 for answer in found)
        assert num_computed_by_generate == 18 * (width + max(map(len, found)) - 1)


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([0, 1, 5, 100]),
    st.sampled_from([0.2, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 0.8]),
    st.floats(0, 0.999),
)
def test_tokens_are_chosen_among_the_candidates_of_transformers(seed, temperature, top_k, top_p, min_p, number):
    from transformers.generation import logits_process as process

    scores = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed))
    theirs = [process.TemperatureLogitsWarper(temperature)]
    theirs += [process.TopKLogitsWarper(top_k)] if top_k else []
    theirs += [process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs += [process.MinPLogitsWarper(min_p)] if min_p else []
    dense = scores
    for warper in theirs:
        dense = warper(None, dense)
    numbers = torch.tensor([number, (number + 0.4) % 1, number], dtype=torch.float64)
    expected = sample_tokens(dense, numbers).tolist()
    settings = Settings(temperature=temperature, top_k=top_k, top_p=top_p)
    assert chosen_tokens(scores, settings, numbers, min_p).tolist() == expected
    alone = [chosen_tokens(scores[row : row + 1], settings, numbers[row : row + 1], min_p) for row in range(3)]
    assert [int(token) for token in alone] == expected


@pytest.mark.parametrize("keys", [{}, {"top_k": 5}, {"top_p": 0.9}], ids=str)
def test_the_lowest_temperatures_choose_the_largest_logit(keys):
    """1e-40 is above zero in Python, and logits divided by it are infinite in float32."""
    scores = torch.randn(3, 300, generator=torch.Generator().manual_seed(0)) * 100
    settings = Settings(**{"do_sample": True, "temperature": 1e-40, "top_k": 0, "top_p": 1.0} | keys)
    numbers = torch.tensor([0.0, 0.5, 0.999], dtype=torch.float64)
    assert chosen_tokens(scores, settings, numbers).tolist() == scores.argmax(-1).tolist()
