"""Text to token ids: pieces, special tokens, the cache of the encoder."""

import pickle
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luthier.core.errors import ModelError
from luthier.data.chat.encoder import Encoder, TextWithSpans
from luthier.data.templates import Special, Token, get_template
from tests import tiny
from tests.trait_programs import merging_tokenizer


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


BORDERS = [
    ("q\n", "\na"),
    ("q\n", "a"),
    ("q ", " a"),
    ("q", "a"),
    ("q]", "\n\na"),
    ("q\n\n", "\n"),
    ("", "a"),
    ("q\n", ""),
]


@pytest.mark.parametrize(("prompt", "answer"), BORDERS)
def test_a_row_begins_with_the_ids_of_its_prompt(prompt, answer):
    tokenizer = merging_tokenizer("x")
    encoder = Encoder(tokenizer)
    row = TextWithSpans(prompt + answer, (len(prompt), len(prompt + answer)))
    (((first, second),),) = encoder.encode_spans([row])
    assert first == tokenizer.encode(prompt) and tokenizer.decode(second) == answer
    whole = tokenizer.encode(prompt + answer)
    assert encoder.straddles(prompt, answer) == (whole[: len(first)] != first)
    if not encoder.straddles(prompt, answer):
        assert first + second == whole


def test_where_no_token_spans_a_border_the_text_is_tokenized_as_a_whole():
    tokenizer = merging_tokenizer("x")
    text = "q\nab  c\nd"
    (turns,) = Encoder(tokenizer).encode_spans([TextWithSpans(text, (2, 4, 8, 9))])
    assert [i for turn in turns for part in turn for i in part] == tokenizer.encode(text)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(st.sampled_from("a\n ]é🙂"), max_size=5), min_size=2, max_size=6))
def test_the_beginnings_of_tokens_belong_to_the_ids(parts):
    tokenizer = merging_tokenizer("x")
    encoder, text = Encoder(tokenizer), "".join(parts)
    borders = tuple(accumulate(map(len, parts[: len(parts) // 2 * 2])))
    row = TextWithSpans(text[: borders[-1]], borders)
    (turns,) = encoder.encode_spans([row])
    sides = [side for turn in turns for side in turn]
    begins = encoder.begins_of(row)
    assert [len(side) for side in sides] == [len(part) for part in begins]
    for side, part, start, end in zip(sides, begins, (0, *borders), borders, strict=False):
        assert all(start <= begin < end for begin in part)
        for token, begin in zip(side, part, strict=True):
            text = tokenizer.decode([token])
            assert text == "\ufffd" or row.text.startswith(text, begin)


def test_a_tokenizer_that_puts_a_blank_before_words_does_not_put_one_into_an_answer():
    """As in tokenizers of SentencePiece: a text begins with a blank, a text after a line break does not."""
    from tokenizers import Tokenizer, models, normalizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate("▁ab:\n<")}
    backend = Tokenizer(models.BPE(vocab=letters | {"▁a": 6}, merges=[("▁", "a")], unk_token="<"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    encoder = Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<"))
    (((prompt, answer),),) = encoder.encode_spans([TextWithSpans("b: ab", (3, 5))])
    assert encoder.tokenizer.convert_ids_to_tokens(prompt) == ["▁", "b", ":", "▁"]
    assert encoder.tokenizer.convert_ids_to_tokens(answer) == ["a", "b"]
