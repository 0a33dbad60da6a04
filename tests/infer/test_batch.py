"""Batched answers equal single ones, whatever the padding, and come in the order of the prompts."""

from dataclasses import replace

import pytest

from luthier.infer.batch import generate_answers
from luthier.infer.types import Settings
from tests.infer.scripted import say, scripted_model

EOS = 260
PROMPTS = [[65, 66, 67], [70] * 9, [80], [1, 2], [5] * 30, [90, 91, 92, 93]]


@pytest.fixture(scope="module")
def model(llama_folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(llama_folder).eval()


@pytest.mark.parametrize("batch_size", [1, 2, 4, 10])
def test_greedy_answers_are_those_of_one_prompt_at_a_time(model, tokenizer, batch_size):
    import torch

    settings = Settings(do_sample=False, max_new_tokens=8)
    answers = list(generate_answers(model, tokenizer, PROMPTS, settings, {EOS}, batch_size))
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(8):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert answer == ids[len(prompt) :]


def test_an_answer_ends_before_its_stop_token(tokenizer):
    model = scripted_model([*say("ok"), EOS, *say("more")], num_prompt_tokens=2)
    assert list(generate_answers(model, tokenizer, [[1, 2], [3, 4]], Settings(do_sample=False), {EOS}, 2)) == [
        say("ok"),
        say("ok"),
    ]


@pytest.mark.parametrize("own", ["then", ["then"]])
def test_stop_strings_of_the_model_end_an_answer(tokenizer, own):
    model = scripted_model([*say("ok, then more"), EOS], num_prompt_tokens=2)
    model.generation_config.stop_strings = own
    asked = Settings(do_sample=False, max_new_tokens=20)
    assert list(generate_answers(model, tokenizer, [[1, 2]], asked, {EOS}, 1)) == [say("ok, then")]


def test_stop_strings_of_the_model_are_added_to_those_of_the_settings(llama_folder, tokenizer):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_folder).eval()
    asked = Settings(do_sample=False, max_new_tokens=12, stop=("\0",))
    whole = next(generate_answers(model, tokenizer, [[65, 66, 67]], asked, {EOS}, 1))
    stop = tokenizer.decode(whole[4:5])
    expected = next(generate_answers(model, tokenizer, [[65, 66, 67]], replace(asked, stop=("\0", stop)), {EOS}, 1))
    model.generation_config.stop_strings = [stop]
    assert next(generate_answers(model, tokenizer, [[65, 66, 67]], asked, {EOS}, 1)) == expected
    assert len(expected) < len(whole)


def test_max_length_is_counted_for_each_prompt_by_itself(model, tokenizer):
    settings = Settings(do_sample=False, max_new_tokens=0, max_length=10)
    answers = list(generate_answers(model, tokenizer, [[65] * 4, [66] * 9, [67] * 10, [68] * 600], settings, {EOS}, 4))
    assert [len(answer) for answer in answers] == [6, 1, 0, 0]


def test_training_goes_on_as_if_nothing_had_been_generated(model, tokenizer):
    import torch

    model.train()
    torch.manual_seed(3)
    before = torch.rand(1)
    torch.manual_seed(3)
    sampled = [
        list(generate_answers(model, tokenizer, PROMPTS, Settings(top_p=1.0, max_new_tokens=4), {EOS}, 2)) for _ in "ab"
    ]
    assert torch.rand(1) == before
    assert model.training
    assert sampled[0] == sampled[1]
    model.eval()


def test_no_prompts_no_answers(model, tokenizer):
    assert list(generate_answers(model, tokenizer, [], Settings(), {EOS}, 4)) == []


def test_a_model_in_training_answers_like_the_same_model_at_rest(llama_folder, tokenizer, warned):
    """With adapters, gradient checkpointing, no cache in its config and in train mode, as an evaluation finds it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = Settings(do_sample=False, max_new_tokens=6)
    lora = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM", lora_dropout=0.5)
    learning = get_peft_model(AutoModelForCausalLM.from_pretrained(llama_folder), lora)
    learning.config.use_cache = False
    learning.gradient_checkpointing_enable()
    learning.train()
    answers = list(generate_answers(learning, tokenizer, PROMPTS, settings, {EOS}, 3))
    assert learning.training
    assert not warned
    merged = learning.merge_and_unload().eval()
    merged.gradient_checkpointing_disable()
    assert answers == list(generate_answers(merged, tokenizer, PROMPTS, settings, {EOS}, 3))


def test_an_answer_of_rows_in_one_batch_ends_before_its_stop_token_or_with_it(model, tokenizer):
    settings = Settings(do_sample=False, max_new_tokens=8)
    (whole,) = generate_answers(model, tokenizer, PROMPTS[:1], settings, set(), 1)
    stop = whole[3]
    end = whole.index(stop)
    for keeps, expected in ((False, whole[:end]), (True, whole[: end + 1])):
        found = generate_answers(model, tokenizer, PROMPTS[:1], settings, {stop}, 1, keeps_stop=keeps)
        assert list(found) == [expected]


def test_without_seeds_of_their_own_answers_have_the_seed_of_the_settings_plus_their_number(model, tokenizer):
    settings = Settings(do_sample=True, temperature=2.0, top_k=0, top_p=1.0, max_new_tokens=8, seed=5)
    prompts = [PROMPTS[0]] * 3
    drawn = list(generate_answers(model, tokenizer, prompts, settings, {EOS}, 2))
    given = list(generate_answers(model, tokenizer, prompts, settings, {EOS}, 3, seeds=[5, 6, 7]))
    assert drawn == given and len(set(map(tuple, drawn))) == 3
