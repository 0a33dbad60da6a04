"""Full tuning trains every parameter."""

from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters
from luthier.model.adapters.full import FullConfig
from luthier.model.loading.parameters import count_parameters
from tests.model.adapters.test_lora import build


def test_full_trains_everything():
    model = ADAPTERS.get("full").apply(
        build().requires_grad_(False), FullConfig(), given=GivenAdapters(), pure_bf16=False
    )
    trainable, total = count_parameters(model)
    assert trainable == total
