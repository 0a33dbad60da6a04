"""The text and bytes of tokens: parts of characters, special tokens, spaces of SentencePiece."""

from types import SimpleNamespace

from luthier.serve.token_texts import TokenTexts


def test_byte_level(tokenizer):
    texts = TokenTexts(tokenizer)
    ids = tokenizer.encode("a €", add_special_tokens=False)
    found = [texts.of(i) for i in ids]
    assert found[:2] == [("a", (97,)), (" ", (32,))]
    assert found[2] == ("bytes:\\xe2", (0xE2,))
    assert bytes(byte for _, data in found for byte in data).decode() == "a €"
    assert texts.of(257) == ("<|im_start|>", tuple(b"<|im_start|>"))
    assert texts.of(319) == ("<token 319>", ())
    assert len({texts.of(i)[0] for i in range(261)}) == 261


def test_sentencepiece():
    pieces = {1: "\N{LOWER ONE EIGHTH BLOCK}Hi", 2: "<0xE2>", 3: "plain"}
    fake = SimpleNamespace(
        is_fast=False,
        added_tokens_decoder={},
        convert_ids_to_tokens=pieces.get,
        decode=lambda ids, **_: pieces[ids[0]],
    )
    texts = TokenTexts(fake)
    assert texts.of(1) == (" Hi", tuple(b" Hi"))
    assert texts.of(2) == ("bytes:\\xe2", (0xE2,))
    assert texts.of(3) == ("plain", tuple(b"plain"))
