"""`extra_config` of Megatron-Bridge: a mapping, JSON text or a JSON file."""

import pytest

from luthier.config.keys.bridge import BridgeConfig, extra_settings
from luthier.core.errors import InvalidInput


def test_it_is_a_mapping_text_or_file(tmp_path):
    file, wanted = tmp_path / "more.json", {"train.manual_gc": True}
    file.write_text('{"train.manual_gc": true}', encoding="utf-8")
    for given in (wanted, ' {"train.manual_gc": true}', str(file)):
        assert extra_settings(BridgeConfig(extra_config=given)) == wanted
    assert extra_settings(BridgeConfig()) == {}


@pytest.mark.parametrize("given", ['{"train.manual_gc": }', "missing.json"])
def test_what_cannot_be_read_is_named(given):
    with pytest.raises(InvalidInput, match="extra_config"):
        extra_settings(BridgeConfig(extra_config=given))
