"""The Hugging Face engine: whole characters, no stop token, the right finish reason, answers that can be stopped."""

import warnings

import pytest

from luthier.core.errors import InvalidInput
from luthier.infer.engines.huggingface import HuggingFaceModel
from luthier.infer.types import Settings
from tests.infer.scripted import say, scripted_model

PROMPT = [72, 105]
EOS, IM_END, ENDOFTEXT = 260, 258, 256
GREEDY = Settings(do_sample=False, max_new_tokens=64)


def says(tokenizer, script, stop_ids=(EOS,)):
    return HuggingFaceModel(scripted_model(script, len(PROMPT)), tokenizer, stop_ids)


@pytest.fixture(scope="module")
def llama(llama_folder, tokenizer):
    from transformers import AutoModelForCausalLM

    return HuggingFaceModel(AutoModelForCausalLM.from_pretrained(llama_folder).eval(), tokenizer, [EOS])


def test_the_pieces_are_the_answer_and_hold_whole_characters(tokenizer):
    text = "naïve 你好 🎻!"
    pieces = list(says(tokenizer, [*say(text), EOS]).stream(PROMPT, GREEDY))
    assert pieces == list(text)


@pytest.mark.parametrize("stop", [EOS, IM_END])
def test_any_stop_token_ends_the_answer_and_stays_out_of_it(tokenizer, stop):
    model = says(tokenizer, [*say("yes"), stop, *say("no")], stop_ids=(EOS, IM_END))
    answer = model.generate(PROMPT, Settings(do_sample=False, skip_special_tokens=False))
    assert (answer.text, answer.finish_reason) == ("yes", "stop")
    assert (answer.num_prompt_tokens, answer.num_new_tokens) == (2, 4)


def test_the_limit_ends_the_answer(tokenizer):
    answer = says(tokenizer, say("abcdef")).generate(PROMPT, Settings(do_sample=False, max_new_tokens=3))
    assert (answer.text, answer.finish_reason, answer.num_new_tokens) == ("abc", "length", 3)


def test_max_length_counts_the_prompt_and_only_without_max_new_tokens(tokenizer):
    model = says(tokenizer, say("abcdefgh"))
    assert model.generate(PROMPT, Settings(do_sample=False, max_new_tokens=0, max_length=6)).text == "abcd"
    assert model.generate(PROMPT, Settings(do_sample=False, max_new_tokens=2, max_length=6)).text == "ab"


def test_half_a_character_at_the_limit_is_not_printed(tokenizer):
    model = says(tokenizer, say("ok你"))
    assert "".join(model.stream(PROMPT, Settings(do_sample=False, max_new_tokens=4))) == "ok"


def test_special_tokens_are_shown_on_demand(tokenizer):
    model = says(tokenizer, [257, *say("x"), EOS])
    assert model.generate(PROMPT, GREEDY).text == "x"
    assert model.generate(PROMPT, Settings(do_sample=False, skip_special_tokens=False)).text == "<|im_start|>x"


@pytest.mark.parametrize(
    "greedy", [Settings(do_sample=False, max_new_tokens=5), Settings(temperature=0, max_new_tokens=5)]
)
def test_greedy_is_the_argmax_and_warns_of_nothing(llama, greedy, warned):
    import torch

    ids = list(PROMPT)
    with torch.no_grad():
        for _ in range(5):
            ids.append(int(llama.model(torch.tensor([ids])).logits[0, -1].argmax()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.model.generation_config.temperature = 0.6  # as model folders have it
        llama.model.generation_config.top_k = 20
        answer = llama.generate(PROMPT, greedy)
    assert answer.text == llama.tokenizer.decode(ids[2:], skip_special_tokens=True).rstrip("\ufffd")
    assert not warned


def test_a_seed_repeats_a_sampled_answer(llama):
    answers = {llama.generate(PROMPT, Settings(seed=seed, top_p=1.0, max_new_tokens=20)).text for seed in (1, 1, 2)}
    assert len(answers) == 2


def test_beams_answer_at_the_end(llama):
    beams = Settings(do_sample=False, num_beams=3, max_new_tokens=6)
    assert "".join(llama.stream(PROMPT, beams)) == llama.generate(PROMPT, beams).text


def test_an_answer_can_be_left_and_the_next_one_is_whole(tokenizer):
    model = says(tokenizer, say("a" * 300))
    pieces = model.stream(PROMPT, Settings(do_sample=False, max_new_tokens=300))
    assert next(pieces) == "a"
    pieces.close()
    assert model.generate(PROMPT, Settings(do_sample=False, max_new_tokens=5)).text == "aaaaa"


def test_what_fails_while_answering_is_raised(tokenizer):
    model = says(tokenizer, [])
    with pytest.raises(IndexError):
        model.generate([100_000, 5], GREEDY)  # no such row in the embedding


@pytest.mark.parametrize(
    ("num_prompt_tokens", "settings", "message"),
    [
        (512, GREEDY, "the prompt has 512 tokens and the model takes 512; start a new conversation"),
        (
            9,
            Settings(max_new_tokens=0, max_length=8),
            "has 9 tokens and max_length is 8; raise it or set max_new_tokens",
        ),
    ],
)
def test_a_prompt_without_room_for_an_answer_is_refused(llama, num_prompt_tokens, settings, message):
    with pytest.raises(InvalidInput, match=message):
        llama.generate([65] * num_prompt_tokens, settings)


def test_the_answer_stops_where_the_model_ends(llama):
    answer = llama.generate([65] * 500, Settings(do_sample=False, max_new_tokens=1024))
    assert answer.num_prompt_tokens + answer.num_new_tokens <= 512
