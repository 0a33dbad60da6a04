"""gguf's reader, with lists read at once: it makes six arrays for every token and merge of a tokenizer, which takes 2 s
for 49,000 tokens.

https://github.com/ggml-org/llama.cpp/blob/master/gguf-py/gguf/gguf_reader.py (gguf 0.17 to 0.20)
"""

import struct
from typing import Any

import numpy
from gguf.constants import GGUFValueType
from gguf.gguf_reader import GGUFReader

_STRING, _FLOATS = GGUFValueType.STRING, (GGUFValueType.FLOAT32, GGUFValueType.FLOAT64)
_LENGTH = struct.Struct("<Q")
_HEAD_BYTES = 12
"""Of a list: the type of its members (u32) and their number (u64)."""


class QuickReader(GGUFReader):
    """The same fields as those of `GGUFReader`."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> tuple[int, list[Any], list[int], list[GGUFValueType]]:
        """(bytes, parts, places of the values among the parts, types) of the field that begins at `orig_offs`."""
        if raw_type != GGUFValueType.ARRAY or self.byte_order != "I":
            return super()._get_field_parts(orig_offs, raw_type)
        kind, count = self._get(orig_offs, numpy.uint32), self._get(orig_offs + 4, numpy.uint64)
        member = GGUFValueType(kind[0])
        start, number = orig_offs + _HEAD_BYTES, int(count[0])
        if member is _STRING:
            end, parts = self._strings(start, number)
            places = [*range(3, 3 + len(parts), 2)]
        elif member in self.gguf_scalar_to_np:
            values = self._get(start, self.gguf_scalar_to_np[member], number).view(numpy.ndarray)
            parts = [values[index : index + 1] for index in range(number)]
            end, places = start + values.nbytes, [*range(2, 2 + number)]
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        types = [GGUFValueType.ARRAY, *([member] if number else [])]
        return end - orig_offs, [kind, count, *parts], places, types

    def _strings(self, start: int, number: int) -> tuple[int, list[Any]]:
        """Where the list ends, and the length and the bytes of each string in turn."""
        read, plain, offset = self.data.data, self.data.view(numpy.ndarray), start  # a slice of a memmap takes 5 us
        lengths = numpy.empty(number, numpy.uint64)
        parts: list[Any] = []
        for index in range(number):
            begin = offset + _LENGTH.size
            (length,) = _LENGTH.unpack_from(read, offset)
            lengths[index], offset = length, begin + length
            parts += lengths[index : index + 1], plain[begin:offset]
        return offset, parts


def parsed(value: Any, kinds: Any) -> Any:
    """What transformers makes of a part of a field: `_gguf_parse_value`, without a list of the bytes of each string."""
    kind = kinds[-1] if isinstance(kinds, list) else kinds
    if kind is _STRING:
        return value.tobytes().decode()
    return float(value[0]) if kind in _FLOATS else value.item(0)
