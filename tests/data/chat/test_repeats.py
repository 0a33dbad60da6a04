"""A text that repeats a token is tokenized as a whole, whatever it is made of and wherever it is cut."""

import random

import pytest

from luthier.data.chat.encoder import Encoder, TextWithSpans
from luthier.data.chat.repeats import Repeats
from tests.media_models import media_tokenizer

AUDIO, IMAGE = "<|AUDIO|>", "[IMG]"
PARTS = ("Hello ", "a", " ", "\n", "<|im_start|>", "<", "[", "<b><b><b><b>", AUDIO, AUDIO * 2, AUDIO * 3, IMAGE * 7)


@pytest.fixture(scope="module")
def tokenizer():
    return media_tokenizer(audio_token=AUDIO, image_token=IMAGE)


@pytest.fixture
def whole(monkeypatch):
    """Runs a function without shortening."""

    def run(work):
        with monkeypatch.context() as patch:
            patch.setattr(Repeats, "shortened", lambda *_: None)
            return work()

    return run


def rows(count):
    chance = random.Random(0)
    for _ in range(count):
        parts = chance.choices(PARTS, k=chance.randint(2, 12))
        text = "".join(parts)
        yield TextWithSpans(text, (*sorted(chance.choices(range(len(text)), k=3)), len(text)))


def test_the_ids_are_those_of_the_whole_text(tokenizer, whole):
    encoder, some = Encoder(tokenizer), list(rows(500))
    assert encoder.encode_spans(some) == whole(lambda: encoder.encode_spans(some))
    texts = [row.text for row in some]
    assert encoder.texts(texts) == whole(lambda: encoder.texts(texts)) == [encoder.text(text) for text in texts]


def test_only_two_of_a_token_are_tokenized(tokenizer):
    repeats = Repeats(tokenizer.backend_tokenizer)
    text = f"a{AUDIO * 100}b{IMAGE * 5}c"
    short = repeats.shortened(text, (1, text.index("b"), len(text)))
    assert (short.text, short.borders) == (f"a{AUDIO * 2}b{IMAGE * 2}c", (1, 19, 31))
    assert [(run.place, run.num_copies) for run in short.runs] == [(10, 100), (25, 5)]


@pytest.mark.parametrize("text", ["", "abc", AUDIO * 2, "<b><b><b>", "[1][1][1]"])
def test_other_texts_are_left_as_they_are(tokenizer, text):
    assert Repeats(tokenizer.backend_tokenizer).shortened(text) is None


def test_a_border_between_two_of_them(tokenizer):
    assert Repeats(tokenizer.backend_tokenizer).shortened(AUDIO * 5, (2 * len(AUDIO),)) is None


def test_tokens_that_look_at_their_neighbors_are_left_as_they_are(tokenizer):
    from transformers import AddedToken

    other = media_tokenizer(audio_token=AUDIO)
    other.add_tokens([AddedToken("<wide>", rstrip=True), AddedToken("<twice><twice>"), AddedToken("<twice>")])
    repeats = Repeats(other.backend_tokenizer)
    assert repeats.shortened("<wide>" * 4) is None and repeats.shortened("<twice>" * 5) is None


def test_special_tokens_read_as_plain_text(tokenizer, whole):
    encoder = Encoder(tokenizer, split_special_tokens=True)
    text = AUDIO * 4
    assert encoder.texts([text]) == whole(lambda: encoder.texts([text])) != Encoder(tokenizer).texts([text])


def test_a_token_that_is_not_where_it_has_to_be(tokenizer):
    short = Repeats(tokenizer.backend_tokenizer).shortened(AUDIO * 4)
    token = short.runs[0].token
    assert short.lengthened([([token, token], [0, 9])]) == [[token] * 4]
    assert short.lengthened([([token, token], [0, 8])]) is None
    assert short.lengthened([([token, token + 1], [0, 9])]) is None
