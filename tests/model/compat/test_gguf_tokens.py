"""The added tokens of a byte-level GGUF vocabulary, and whether transformers still loses some."""

import pytest
import transformers
from tokenizers import AddedToken, decoders, normalizers, pre_tokenizers
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


BLANKS = ["the cat", " the cat", "<|im_end|>the cat", "a<|im_end|> b <|im_end|>\nc", "<|im_end|>", ""]


def sentencepiece(folder, *, scheme=None, adds=True):
    """(a tokenizer, the one of its GGUF file). `scheme`: that of a Metaspace; None for a Prepend normalizer."""
    tokenizer = trained("llama")
    tokenizer.chat_template = "{{ messages[0].content }}"
    backend = tokenizer.backend_tokenizer
    if scheme is not None:
        backend.normalizer = None
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    elif not adds:
        backend.normalizer = normalizers.Replace(" ", "▁")
    strips = [decoders.Strip(" ", 1, 0)] if adds else []
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strips]
    backend.decoder = decoders.Sequence(parts)
    saved(folder / "model", transformers.LlamaConfig(**{**TINY_LLAMA, "vocab_size": 448}), tokenizer)
    (folder / "alone").mkdir()
    write_gguf(folder / "model", folder / "alone" / "m.gguf", "f16")
    return tokenizer, load_tokenizer(ModelSource(str(folder / "alone" / "m.gguf")))


@pytest.mark.parametrize("case", [{}, {"scheme": "first"}, {"scheme": "always"}, {"scheme": "never"}, {"adds": False}])
def test_blanks_are_put_before_texts_as_in_the_model(tmp_path, case):
    """Also by the tokenizer that training saves beside the weights."""
    tokenizer, again = sentencepiece(tmp_path, **{"adds": case.get("scheme") != "never", **case})
    again.save_pretrained(tmp_path / "saved")
    for other in (again, load_tokenizer(ModelSource(str(tmp_path / "saved")))):
        for text in BLANKS:
            ids = tokenizer.encode(text, add_special_tokens=False)
            assert other.encode(text, add_special_tokens=False) == ids, text
            assert other.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_a_file_of_another_program_is_read_as_llama_cpp_reads_it(tmp_path, monkeypatch, scheme):
    """A blank before each text that follows an added token, and none is left out: it says no more."""
    monkeypatch.setattr("luthier.model.compat.gguf_tokens.SCHEMES", ())
    _, again = sentencepiece(tmp_path, scheme=scheme)
    as_llama_cpp = trained("llama")
    for text in BLANKS:
        assert again.tokenize(text) == as_llama_cpp.tokenize(text)


def test_transformers_still_puts_a_blank_before_the_first_text_alone(tmp_path):
    """When this fails, `restore_blanks` is no longer needed."""
    tokenizer, _ = sentencepiece(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "alone", gguf_file="m.gguf")
    assert theirs.tokenize("a<|im_end|>the") != tokenizer.tokenize("a<|im_end|>the")


def test_other_programs_put_more_blanks_than_some_tokenizers(tmp_path, said):
    sentencepiece(tmp_path, scheme="first")
    assert sum("puts a blank before the first text only" in text for text in said) == 1


def test_special_tokens_are_those_of_the_file(both):
    tokenizer, folder = both
    again = load_tokenizer(ModelSource(str(folder / "m.gguf")))
    assert len(again) == len(tokenizer) and sorted(again.get_vocab().values()) == list(range(len(tokenizer)))
    assert (again.eos_token, again.eos_token_id) == (tokenizer.eos_token, tokenizer.eos_token_id)
