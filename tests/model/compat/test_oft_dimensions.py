"""OFT on latent attention, which gives a linear layer four dimensions.

If the test of plain peft fails, the library has been mended, and `luthier.model.compat.oft_dimensions` can go.
"""

import pytest
import torch
from peft.tuners.oft.layer import OFTRotationModule

from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters, attach_adapter, merge_adapters
from luthier.model.adapters.oft import OftConfig
from luthier.model.compat.oft_dimensions import rotate_any_dimensions
from tests.runs.test_architectures import assert_same, build, logits


@pytest.fixture
def plain_forward(monkeypatch):
    """The method of the library, which the test may replace."""
    usual = OFTRotationModule.forward
    usual = next(iter([cell.cell_contents for cell in usual.__closure__ or ()]), usual)
    monkeypatch.setattr(OFTRotationModule, "forward", usual)
    return usual


def rotation() -> OFTRotationModule:
    module = OFTRotationModule(r=2, n_elements=6, block_size=4, in_features=8)
    torch.nn.init.normal_(module.weight)
    return module


def test_plain_peft_fails(plain_forward):
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        rotation()(torch.randn(3, 1, 5, 8))


def test_rows_are_rotated_whatever_their_dimensions(plain_forward):
    rotate_any_dimensions()
    rotate_any_dimensions()
    assert OFTRotationModule.forward is not plain_forward
    module, rows = rotation(), torch.randn(3, 2, 5, 8)
    expected = plain_forward(module, rows.view(30, 8)).view(3, 2, 5, 8)
    torch.testing.assert_close(module(rows), expected)
    torch.testing.assert_close(module(rows[0]), expected[0])


def test_it_is_trained_attached_and_merged_on_latent_attention(plain_forward, tmp_path):
    model = build("deepseek_v3")
    adapted = ADAPTERS.get("oft").apply(model, OftConfig(oft_block_size=4), given=GivenAdapters(), pure_bf16=False)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "oft_R" in name:
                weight.normal_(std=0.1)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path)
    OFTRotationModule.forward = plain_forward
    given = GivenAdapters([str(tmp_path)])
    assert_same(logits(attach_adapter(build("deepseek_v3"), str(tmp_path), given, is_trainable=False)), expected)
    assert_same(logits(merge_adapters(build("deepseek_v3"), given.names, given)), expected)
    assert (expected - logits(build("deepseek_v3"))).abs().max() > 1e-3
