"""Fields of a request take the place of what the run file says."""

import pytest

from luthier.infer.types import Settings
from luthier.serve.errors import ApiError
from luthier.serve.protocol import ChatRequest, CompletionRequest
from luthier.serve.settings import chat_settings, completion_settings, of_choice

BASE = Settings(temperature=0.3, top_p=0.8, top_k=7, max_new_tokens=99, do_sample=True)


def chat(**fields):
    request = ChatRequest(messages=[{"role": "user", "content": "hi"}], **fields)
    return chat_settings(request, BASE, 320, None)


def test_absent_fields_take_the_value_of_the_run_file():
    assert chat() == BASE


def test_each_field_has_its_effect():
    found = chat(
        temperature=0,
        top_p=0.5,
        top_k=0,
        min_p=0.1,
        do_sample=False,
        seed=5,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.2,
        logit_bias={"7": -100, "8": 3},
        stop="x",
        stop_token_ids=[3],
        ignore_eos=True,
        skip_special_tokens=False,
        max_tokens=4,
        logprobs=True,
        top_logprobs=2,
    )
    assert found == Settings(
        temperature=0,
        top_p=0.5,
        top_k=0,
        min_p=0.1,
        do_sample=False,
        seed=5,
        presence_penalty=1,
        frequency_penalty=-1.5,
        repetition_penalty=1.2,
        logit_bias={7: -100.0, 8: 3.0},
        stop=("x",),
        stop_token_ids=(3,),
        ignore_eos=True,
        skip_special_tokens=False,
        max_new_tokens=4,
        num_logprobs=2,
    )


def test_the_presence_penalty_is_no_repetition_penalty():
    assert chat(presence_penalty=0.5).repetition_penalty == BASE.repetition_penalty


def test_the_newer_name_of_the_limit_wins():
    assert chat(max_tokens=3, max_completion_tokens=5).max_new_tokens == 5


def test_minus_one_is_all_tokens():
    assert chat(top_k=-1).top_k == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"320": 1}}, "logit_bias"),
        ({"logit_bias": {"hello": 1}}, "logit_bias"),
        ({"logit_bias": {"²": 1}}, "logit_bias"),
    ],
)
def test_fields_that_do_not_go_together(fields, param):
    with pytest.raises(ApiError) as caught:
        chat(**fields)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"), [({"suffix": "x"}, "suffix"), ({"best_of": 3}, "best_of"), ({"max_tokens": 0}, "max_tokens")]
)
def test_completions_that_are_refused(fields, param):
    with pytest.raises(ApiError) as caught:
        completion_settings(CompletionRequest(prompt="x", **fields), BASE, 320)
    assert caught.value.param == param


def test_the_prompt_is_scored_for_echo_with_logprobs():
    found = completion_settings(CompletionRequest(prompt="x", echo=True, logprobs=0, max_tokens=0), BASE, 320)
    assert (found.prompt_logprobs, found.num_logprobs, found.max_new_tokens) == (True, 0, 1)


def test_choices_have_seeds_of_their_own():
    assert [of_choice(Settings(seed=5), k).seed for k in range(3)] == [5, 6, 7]
    assert of_choice(Settings(), 2).seed is None
    assert of_choice(Settings(seed=2**63 - 1), 1).seed == -(2**63)
