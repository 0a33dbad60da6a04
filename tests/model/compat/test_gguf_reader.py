"""The quick reader of GGUF files gives the fields of gguf's own reader, and transformers' values of them."""

import numpy
import pytest
from gguf import GGUFReader, GGUFWriter
from transformers.integrations.ggml import _gguf_parse_value

from luthier.model.compat.gguf_reader import QuickReader, parsed


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "some.gguf"
    writer = GGUFWriter(path, "llama")
    writer.add_array("words", ["", "ä", "\U0001f600 long" * 40, "a"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("shares", [0.5, -1.25])
    writer.add_array("facts", [True, False])
    writer.add_uint32("one", 7)
    writer.add_float64("half", 0.5)
    writer.add_bool("fact", True)
    writer.add_string("name", "née")
    writer.add_tensor("t", numpy.arange(8, dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_fields_and_the_values_are_the_same(written):
    expected, found = GGUFReader(written), QuickReader(written)
    assert list(found.fields) == list(expected.fields)
    for name, field in expected.fields.items():
        mine = found.fields[name]
        assert (mine.offset, mine.data, mine.types) == (field.offset, field.data, field.types), name
        assert [part.tobytes() for part in mine.parts] == [part.tobytes() for part in field.parts], name
        assert [part.dtype for part in mine.parts] == [part.dtype for part in field.parts], name
        assert mine.contents() == field.contents()
        values = [_gguf_parse_value(field.parts[place], field.types) for place in field.data]
        own = [parsed(mine.parts[place], mine.types) for place in mine.data]
        assert own == values and [type(one) for one in own] == [type(one) for one in values], name
    assert [tensor.data.tobytes() for tensor in found.tensors] == [tensor.data.tobytes() for tensor in expected.tensors]
