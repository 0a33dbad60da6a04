"""The added tokens of a byte-level GGUF vocabulary, and whether transformers still loses some."""

import pytest
import transformers
from tokenizers import AddedToken
from transformers import AutoTokenizer

from luthier.model.files.gguf.writer import write_gguf
from luthier.model.files.sources import ModelSource
from luthier.model.tokenizer import load_tokenizer
from tests.model.files.gguf.test_writer import saved, trained
from tests.tiny import TINY_LLAMA

TEXTS = ["<｜User｜>", "<a b>", "<ctrl>", "猫", "<|endoftext|>", "<|im_end|>", "the cat"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(the tokenizer of a model, the folder of its GGUF file)"""
    tokenizer, folder = trained("gpt2"), tmp_path_factory.mktemp("gguf")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("<a b>", "<ctrl>", "猫")])
    tokenizer.add_special_tokens({"eos_token": AddedToken("<｜User｜>", normalized=False)})
    tokenizer.chat_template = "{{ messages[0].content }}"
    config = transformers.LlamaConfig(**{**TINY_LLAMA, "vocab_size": len(tokenizer)})
    saved(folder / "model", config, tokenizer)
    (folder / "alone").mkdir()
    write_gguf(folder / "model", folder / "alone" / "m.gguf", "f16")
    return tokenizer, folder / "alone"


def test_transformers_still_loses_added_tokens(both):
    """When this fails, `luthier.model.compat.gguf_tokens` is no longer needed."""
    tokenizer, folder = both
    theirs = AutoTokenizer.from_pretrained(folder, gguf_file="m.gguf")
    assert theirs.encode("<a b>", add_special_tokens=False) != tokenizer.encode("<a b>", add_special_tokens=False)
    assert max(theirs.get_vocab().values()) >= len(tokenizer)


@pytest.mark.parametrize("text", [*TEXTS, *(f"a{text} b" for text in TEXTS), "".join(TEXTS)])
def test_the_tokens_are_those_of_the_model(both, text):
    tokenizer, folder = both
    again = load_tokenizer(ModelSource(str(folder / "m.gguf")))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert again.encode(text, add_special_tokens=False) == ids and max(ids) < len(tokenizer)
    for skips in (False, True):
        assert again.decode(ids, skip_special_tokens=skips) == tokenizer.decode(ids, skip_special_tokens=skips)


def test_special_tokens_are_those_of_the_file(both):
    tokenizer, folder = both
    again = load_tokenizer(ModelSource(str(folder / "m.gguf")))
    assert len(again) == len(tokenizer) and sorted(again.get_vocab().values()) == list(range(len(tokenizer)))
    assert (again.eos_token, again.eos_token_id) == (tokenizer.eos_token, tokenizer.eos_token_id)
