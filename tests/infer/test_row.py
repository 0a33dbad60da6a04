"""One answer: its penalties, its end, and what is delivered of it."""

import pytest
import torch
from transformers import LogitsProcessorList

from luthier.core.errors import InvalidInput, RunFailed
from luthier.infer.row import Chooser, Row, chosen_together, scored
from luthier.infer.row import new_row as row_of_model
from luthier.infer.types import Answer, Piece, Settings
from tests.tiny import byte_tokenizer

V, EOS = 320, 260
TOKENIZER = byte_tokenizer()
A, B = TOKENIZER.encode("AB", add_special_tokens=False)


def logits(*best):
    """(V,) logits with the given tokens on top, best first, one apart."""
    row = torch.zeros(V)
    for place, token_id in enumerate(best):
        row[token_id] = float(10 - place)
    return row


def chooser(prompt_ids=(1, 2), **keys):
    return Chooser(prompt_ids, Settings(**{"do_sample": False} | keys), LogitsProcessorList())


def new_row(num_new_tokens=10, **keys):
    arrived = []
    settings = Settings(**{"do_sample": False} | keys)
    row = Row([1], settings, num_new_tokens=num_new_tokens, stop_ids=[EOS], tokenizer=TOKENIZER, deliver=arrived.append)
    row.chooser = Chooser([1], settings, LogitsProcessorList())
    return row, arrived


def say(row, text):
    """Takes the bytes of a text, one token each. Returns whether the answer ended, and after how many."""
    for count, token_id in enumerate(TOKENIZER.encode(text, add_special_tokens=False), 1):
        if row.take(logits(token_id)):
            return count
    return None


def test_presence_and_frequency_penalties_are_openais():
    one = chooser(presence_penalty=0.6, frequency_penalty=0.7)
    # Token 7 is 1 ahead of token 8 and loses 0.6 + 0.7 once it is used, then 0.7 for each further use.
    assert [one.choose(logits(7, 8)) for _ in range(5)] == [7, 8, 7, 7, 8]
    assert [chooser((7, 7), presence_penalty=2.0).choose(logits(7, 8)) for _ in range(2)] == [7, 7]


def test_a_bias_moves_logits():
    assert chooser(logit_bias={8: 1.5}).choose(logits(7, 8)) == 8
    assert chooser(logit_bias={7: -100.0}).choose(logits(7, 8)) == 8


def test_only_plain_greedy_answers_skip_the_choice():
    assert chooser().takes_largest
    for keys in ({"do_sample": True}, {"logit_bias": {1: 1.0}}, {"presence_penalty": 0.1}, {"frequency_penalty": 0.1}):
        assert not chooser(**keys).takes_largest


@pytest.mark.parametrize("keys", [{}, {"logit_bias": {1: 1.0}}, {"do_sample": True, "top_k": 0, "top_p": 1.0}])
def test_logits_that_are_nan_end_their_answer(keys):
    """A model in float16 may overflow. The largest of NaN is the first token, which a tokenizer spells `!`."""
    scores = torch.zeros(2, V)
    scores[1] = torch.nan
    choosers = [chooser(**keys), chooser(**keys)]
    assert chosen_together(scores, choosers) == [None, None]
    assert choosers[0].choose(scores[0]) >= 0
    with pytest.raises(RunFailed, match="the logits of the model are NaN"):
        choosers[1].choose(scores[1])


def test_answers_with_the_same_settings_choose_together_what_they_choose_alone():
    """The others are left to choose by themselves."""
    free = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.5}
    keys = [
        free,
        {},
        {"do_sample": True, "top_k": 7},
        free,
        {**free, "logit_bias": {1: 2.0}},
        {},
        {**free, "min_p": 0.1},
    ]
    scores = torch.randn(len(keys), V, generator=torch.Generator().manual_seed(0))

    def choosers():
        return [chooser(seed=seed, **own) for seed, own in enumerate(keys)]

    together = chosen_together(scores, choosers())
    alone = [one.choose(row) for one, row in zip(choosers(), scores, strict=True)]
    assert together[4] is None and together == [*alone[:4], None, *alone[5:]]


def test_an_answer_without_text_has_the_same_tokens():
    row, arrived = new_row()
    bare = Row([1], row.settings, num_new_tokens=10, stop_ids=[EOS], tokenizer=None, deliver=arrived.append)
    bare.chooser = Chooser([1], row.settings, LogitsProcessorList())
    for one in (row, bare):
        assert [one.take(logits(token)) for token in (A, B, EOS)] == [False, False, True]
    whole, without = (item for item in arrived if isinstance(item, Answer))
    assert (
        without.tokens == whole.tokens and without.finish_reason == "stop" and (whole.text, without.text) == ("AB", "")
    )


def test_without_a_seed_two_answers_differ():
    flat = torch.zeros(V)
    drawn = [
        [one.choose(flat) for _ in range(8)] for one in (chooser(do_sample=True, top_k=0, top_p=1.0) for _ in "ab")
    ]
    assert drawn[0] != drawn[1]


@pytest.mark.parametrize(
    ("text", "stop", "expected", "num_tokens", "reason"),
    [
        ("one two", ("two",), "one ", 7, "stop"),
        ("one tw", ("two",), "one tw", 6, "length"),
        ("abc", (), "abc", 3, "length"),
        ("naïve!", ("ï",), "na", 4, "stop"),
    ],
)
def test_the_end_of_an_answer(text, stop, expected, num_tokens, reason):
    row, arrived = new_row(num_new_tokens=len(text.encode()), stop=stop)
    assert say(row, text) == num_tokens
    answer = arrived[-1]
    assert isinstance(answer, Answer)
    assert (answer.text, answer.finish_reason, answer.num_new_tokens) == (expected, reason, num_tokens)
    pieces = [item for item in arrived if isinstance(item, Piece)]
    assert "".join(piece.text for piece in pieces) == expected
    assert sum(len(piece.tokens) for piece in pieces) == num_tokens


def test_end_tokens_are_those_of_the_model_and_of_the_caller():
    for keys, ends in (({}, EOS), ({"stop_token_ids": (B,)}, B), ({"stop_token_ids": (B,), "ignore_eos": True}, B)):
        row, arrived = new_row(**keys)
        assert not row.take(logits(A)) and row.take(logits(ends))
        assert (arrived[-1].text, arrived[-1].finish_reason) == ("A", "stop")
    row, _ = new_row(ignore_eos=True)
    assert not row.take(logits(EOS))


def test_a_canceled_row_is_silent():
    row, arrived = new_row(num_new_tokens=2)
    row.is_canceled = True
    say(row, "ab")
    row.fail(ValueError("late"))
    assert arrived == []


def test_the_score_of_a_token_is_its_log_probability():
    token = scored(7, logits(7, 8), 2)
    expected = logits(7, 8).log_softmax(-1)
    assert token.logprob == pytest.approx(float(expected[7])) and [i for i, _ in token.top] == [7, 8]
    assert scored(7, logits(7), None).logprob is None


@pytest.mark.parametrize(
    ("keys", "num_prompt_tokens", "num_positions", "num_new_tokens"),
    [
        ({"max_new_tokens": 10}, 3, None, 10),
        ({"max_new_tokens": 10}, 3, 13, 10),
        ({"max_new_tokens": 10}, 3, 12, 9),
        ({"max_new_tokens": 10}, 11, 12, 1),
        ({"max_new_tokens": 0, "max_length": 8}, 3, None, 5),
        ({"max_new_tokens": 0, "max_length": 8}, 3, 7, 4),
    ],
)
def test_prompt_and_answer_fill_the_context_and_no_more(keys, num_prompt_tokens, num_positions, num_new_tokens):
    given = {"stop_ids": [EOS], "tokenizer": TOKENIZER, "deliver": lambda item: None}
    row = row_of_model([1] * num_prompt_tokens, Settings(**keys), num_positions=num_positions, **given)
    assert row.num_new_tokens == num_new_tokens


def test_a_prompt_that_fills_the_context_has_no_answer_and_can_be_scored():
    given = {"num_positions": 4, "stop_ids": [EOS], "tokenizer": TOKENIZER, "deliver": lambda item: None}
    with pytest.raises(InvalidInput, match="no room for an answer"):
        row_of_model([1] * 4, Settings(max_new_tokens=1), **given)
    scored = Settings(max_new_tokens=1, num_logprobs=0, prompt_logprobs=True)
    assert row_of_model([1] * 4, scored, **given).num_new_tokens == 0
    with pytest.raises(InvalidInput, match="no room for an answer"):
        row_of_model([1] * 5, scored, **given)
