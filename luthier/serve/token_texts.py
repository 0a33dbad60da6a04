"""The text and the bytes of single tokens, for log-probabilities.

A token may be part of a character. Then its text is `bytes:\\xe2\\x82`, as in OpenAI's API, so that different tokens
have different texts.
"""

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenTexts:
    def __init__(self, tokenizer: "PreTrainedTokenizerBase") -> None:
        self._tokenizer = tokenizer
        self._byte_of = {char: byte for byte, char in _byte_characters().items()} if _is_byte_level(tokenizer) else {}
        self._special = {int(i): str(token) for i, token in tokenizer.added_tokens_decoder.items()}
        self.of = lru_cache(maxsize=16384)(self._of)

    def _of(self, token_id: int) -> tuple[str, tuple[int, ...]]:
        """(text, bytes)"""
        if token_id in self._special:
            text = self._special[token_id]
            return text, tuple(text.encode())
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if token is None:  # the model's vocabulary may be larger than the tokenizer's
            return f"<token {token_id}>", ()
        data = self._bytes(str(token), token_id)
        try:
            return data.decode(), tuple(data)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), tuple(data)

    def _bytes(self, token: str, token_id: int) -> bytes:
        if self._byte_of and all(char in self._byte_of for char in token):
            return bytes(self._byte_of[char] for char in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):  # a byte of SentencePiece
            return bytes([int(token[3:5], 16)])
        if "\N{LOWER ONE EIGHTH BLOCK}" in token:  # a space of SentencePiece
            return token.replace("\N{LOWER ONE EIGHTH BLOCK}", " ").encode()
        return str(self._tokenizer.decode([token_id], clean_up_tokenization_spaces=False)).encode()


def _is_byte_level(tokenizer: "PreTrainedTokenizerBase") -> bool:
    return tokenizer.is_fast and "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)


def _byte_characters() -> dict[int, str]:
    """Byte -> the character that stands for it in the vocabulary of a byte-level tokenizer.

    Bytes that print stand for themselves; the others, in order, for the characters from 256 on.
    """
    prints = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = [byte for byte in range(256) if byte not in prints]
    return {byte: chr(byte) for byte in prints} | {byte: chr(256 + i) for i, byte in enumerate(others)}
