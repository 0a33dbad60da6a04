"""The pieces of a stream add up to the decoded whole, whatever the tokens, and a long stream takes linear time."""

import random

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import Metaspace
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from luthier.infer.decoding import MAX_WAITING, UNFINISHED, TextStream
from tests.tiny import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


class Counted:
    """Counts the ids that are decoded."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.num_ids = tokenizer, 0

    def decode(self, ids, **options):
        self.num_ids += len(ids)
        return self.tokenizer.decode(ids, **options)


def halves(tokenizer) -> list[int]:
    """The ids of bytes that are no characters."""
    return [i for i in range(len(tokenizer)) if tokenizer.decode([i]) == UNFINISHED]


@pytest.mark.parametrize("skips", [True, False])
@pytest.mark.parametrize("pool", ["halves", "all", "mixed"])
def test_the_pieces_are_the_whole(tokenizer, pool, skips):
    draw = random.Random(pool)
    text = tokenizer.encode("héllo wörld €😀 ", add_special_tokens=False)
    ids = {
        "halves": halves(tokenizer),
        "all": list(range(len(tokenizer))),
        "mixed": [*halves(tokenizer)[:9], *text, tokenizer.eos_token_id],
    }[pool]
    for length in (1, 3, 7, MAX_WAITING, 4 * MAX_WAITING) * 20:
        said = draw.choices(ids, k=length)
        stream = TextStream(tokenizer, skips)
        found = "".join(map(stream.push, said)) + stream.finish()
        whole = tokenizer.decode(said, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
        assert found.rstrip(UNFINISHED) == whole.rstrip(UNFINISHED)


@pytest.mark.parametrize("text", ["€", "😀", "é", "a😀b"])
@pytest.mark.parametrize("num_broken", range(MAX_WAITING - 8, MAX_WAITING + 9))
def test_a_character_after_broken_bytes_is_whole_wherever_they_are_cut(tokenizer, text, num_broken):
    said = [halves(tokenizer)[0]] * num_broken + tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, skip_special_tokens=True)
    assert "".join(map(stream.push, said)) + stream.finish() == UNFINISHED * num_broken + text


def test_half_a_character_is_given_once_it_is_whole_and_dropped_at_the_end(tokenizer):
    first, *rest = tokenizer.encode("€", add_special_tokens=False)
    stream = TextStream(tokenizer, skip_special_tokens=True)
    assert [stream.push(first), *map(stream.push, rest)] == ["", *[""] * (len(rest) - 1), "€"]
    assert (stream.push(first), stream.finish()) == ("", "")


@pytest.mark.parametrize("kind", ["words", "broken bytes", "special tokens"])
def test_the_work_grows_with_the_tokens_and_not_with_their_square(tokenizer, kind):
    """`ignore_eos` makes a model repeat its end token; a model that has diverged writes bytes that are no text."""
    counted = Counted(tokenizer)
    repeated = {
        "words": tokenizer.encode("a", add_special_tokens=False)[0],
        "broken bytes": halves(tokenizer)[0],
        "special tokens": tokenizer.eos_token_id,
    }[kind]
    stream = TextStream(counted, skip_special_tokens=True)
    for _ in range(2000):
        stream.push(repeated)
    assert counted.num_ids <= 2000 * 6 * MAX_WAITING


def test_a_space_that_a_tokenizer_leaves_out_at_the_start_of_a_text_stays_inside_it():
    """The decoder of SentencePiece drops the first space of whatever it is given."""
    words = Tokenizer(WordLevel({"\u2581a": 0, "\u2581b": 1, "c": 2}, unk_token="c"))
    words.decoder = Metaspace()
    stream = TextStream(PreTrainedTokenizerFast(tokenizer_object=words), skip_special_tokens=True)
    assert [stream.push(i) for i in (0, 1, 2, 1, 0)] == ["a", " b", "c", " b", " a"]
