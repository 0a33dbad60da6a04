"""Vocabularies of tokenizers as GGUF names them: tokens, merges, scores, and how text is cut."""

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer, models

from luthier.core.errors import ModelError
from luthier.model.files.gguf.vocabulary import read_vocabulary
from tests.tiny import byte_tokenizer


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda split: split.Digits(individual_digits=True), "smollm"),
        (lambda split: _split(r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "llama-bpe"),
        (lambda split: _split(r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"), "qwen2"),
    ],
)
def test_how_text_is_cut_has_a_name(make, name):
    from tokenizers import pre_tokenizers

    tokenizer = byte_tokenizer()
    parts = [make(pre_tokenizers), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=name == "smollm")]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    assert read_vocabulary(tokenizer, 320).cut == name


def _split(pattern):
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(pattern), "isolated")


def test_an_unknown_way_to_cut_is_told(said):
    assert read_vocabulary(byte_tokenizer(), 320).cut == "gpt-2"
    assert any("GGUF has no known name for how this tokenizer cuts text" in text for text in said)


def test_tokenizers_of_other_families_are_refused():
    from tokenizers import Tokenizer, models

    words = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
    with pytest.raises(ModelError, match=r"its model is WordLevel\) -> leave export_gguf out"):
        read_vocabulary(words, 1)


def test_tokens_that_take_in_blanks_are_told(said):
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<left>", lstrip=True), AddedToken("<plain>")])
    read_vocabulary(tokenizer, len(tokenizer))
    (message,) = (text for text in said if "blanks" in text)
    assert "'<left>'" in message and "<plain>" not in message


def test_a_token_scores_by_the_first_merge_that_makes_it():
    """<unk> and the bytes come first, then a, b, c, ab, bc, abc; abc is made by the third merge and by the fourth."""
    vocabulary = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "a", "b", "c", "ab", "bc", "abc"]
    merges = [("a", "b"), ("b", "c"), ("ab", "c"), ("a", "bc")]
    ids = {token: index for index, token in enumerate(vocabulary)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True))
    found = read_vocabulary(transformers.PreTrainedTokenizerFast(tokenizer_object=backend), len(vocabulary))
    assert found.scores[-3:] == [-1.0, -2.0, -3.0]
    assert set(found.scores[-6:-3]) == {-5.0}  # after all merges
    assert set(found.scores[1:257]) == {0.0}
