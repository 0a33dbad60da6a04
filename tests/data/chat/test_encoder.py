"""Text to token ids: pieces, special tokens, the cache of the encoder."""

import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import ModelError
from luthier.data.chat.encoder import Encoder
from luthier.data.templates import Special, Token, get_template
from tests import tiny


@pytest.fixture(scope="module")
def encoder():
    return Encoder(tiny.byte_tokenizer())


def test_pieces_are_tokenized_one_by_one(encoder):
    assert encoder.pieces((Special("bos"), "<|im_start|>a", "", Special("eos"))) == [
        259,
        257,
        ord_id(encoder, "a"),
        260,
    ]


def ord_id(encoder, character):
    return encoder.tokenizer.convert_tokens_to_ids(character)


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(codec="utf-8"), max_size=30) | st.sampled_from(["x" * 3000, "<s>a</s>"]))
def test_fast_path_equals_the_tokenizer(encoder, text):
    """Also after a call that leaves padding and truncation switched on."""
    encoder.tokenizer("a b c", padding="max_length", truncation=True, max_length=2)
    expected = encoder.tokenizer.encode(text, add_special_tokens=False)
    encoder.tokenizer("a b c", padding="max_length", truncation=True, max_length=2)
    assert encoder.text(text) == encoder.texts([text])[0] == expected


def test_what_is_cached_cannot_be_changed(encoder):
    encoder.text("abc").append(0)
    assert len(encoder.text("abc")) == 3


def test_missing_special_tokens_are_nothing():
    encoder = Encoder(tiny.byte_tokenizer(bos_token=None))
    assert encoder.pieces((Special("bos"), Special("eos"))) == [260]


def test_split_special_tokens():
    tokenizer = tiny.byte_tokenizer()
    assert Encoder(tokenizer).text("<s>") == [259]
    assert len(Encoder(tokenizer, split_special_tokens=True).text("<s>")) == 3
    assert Encoder(tokenizer).text("<s>") == [259], "the setting belongs to the encoder, not to the tokenizer"


def test_tokens_by_name(encoder):
    assert encoder.pieces((Token("<|im_end|>"),)) == [258]
    with pytest.raises(ModelError, match="<sep>"):
        encoder.pieces(get_template("yuan").user)


def test_an_encoder_travels_to_workers(encoder):
    twin = pickle.loads(pickle.dumps(encoder))
    assert twin.pieces((Special("bos"), "a")) == encoder.pieces((Special("bos"), "a"))
