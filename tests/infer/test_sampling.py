"""Draws follow the distribution, and each answer has random numbers of its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.infer.batch import generate_answers
from luthier.infer.sampling import chosen_token, group_size, sample_tokens, uniforms
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


def test_groups_of_equal_prompts():
    assert group_size([[1], [1], [2], [2]]) == 2 and group_size([[1, 2]] * 3) == 3
    assert group_size([[1], [1], [2]]) == 1 and group_size([[1], [2], [1], [2]]) == 1 and group_size([[1]]) == 1


CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "sliding window": ("MistralConfig", {"sliding_window": 4}),
    "state of another kind": ("MambaConfig", {"state_size": 4}),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_prompt_is_read_once_for_all_its_answers(tokenizer, tmp_path, monkeypatch, kind):
    """The answers stay what they are when every row is read by itself, be it from a cache that can be copied or not."""
    import transformers

    from tests.tiny import TINY_LLAMA, save_tiny

    name, changes = CONFIGS[kind]
    folder = save_tiny(tmp_path / "model", getattr(transformers, name)(**{**TINY_LLAMA, **changes}))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    settings = Settings(top_p=1.0, top_k=0, temperature=1.0, max_new_tokens=12)
    prompts, seeds = [prompt for prompt in PROMPTS for _ in range(3)], range(18)

    def answers() -> tuple[list[list[int]], int]:
        """And how many rows the first pass reads."""
        rows: list[int] = []
        hook = model.get_input_embeddings().register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        found = list(generate_answers(model, tokenizer, prompts, settings, {EOS}, 18, seeds=seeds))
        hook.remove()
        return found, rows[0]

    found, num_read = answers()
    assert num_read == (18 if kind == "state of another kind" else 6) and len({tuple(a) for a in found}) > 12
    assert "_prefill" not in vars(model)
    monkeypatch.setattr("luthier.infer.sampling.group_size", lambda prompts: 1)
    assert answers() == (found, 18)


@given(
    st.integers(0, 10**6),
    st.sampled_from([0.3, 1.0, 2.0]),
    st.sampled_from([0, 1, 5, 100]),
    st.sampled_from([0.2, 0.9, 1.0]),
    st.sampled_from([0.0, 0.1, 0.8]),
    st.floats(0, 0.999),
)
def test_one_token_is_chosen_among_the_candidates_of_transformers(seed, temperature, top_k, top_p, min_p, number):
    from transformers.generation import logits_process as process

    scores = torch.randn(40, generator=torch.Generator().manual_seed(seed))
    theirs = [process.TemperatureLogitsWarper(temperature)]
    theirs += [process.TopKLogitsWarper(top_k)] if top_k else []
    theirs += [process.TopPLogitsWarper(top_p)] if top_p < 1 else []
    theirs += [process.MinPLogitsWarper(min_p)] if min_p else []
    dense = scores[None]
    for warper in theirs:
        dense = warper(None, dense)
    expected = int(sample_tokens(dense, torch.tensor([number], dtype=torch.float64)))
    settings = Settings(temperature=temperature, top_k=top_k, top_p=top_p)
    assert chosen_token(scores, settings, number, min_p) == expected
