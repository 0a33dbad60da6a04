"""The config and the quantizer with which transformers leaves HQQ layers to `luthier.model.quantization`."""

from typing import Any, Protocol

from transformers import PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

METHOD = "hqq_layers"
"""The name of this reader in transformers; its own `hqq` quantizes plain weights only."""


class Reader(Protocol):
    """Replaces the quantized layers by empty modules, and fills them when the other weights are read."""

    def make_room(self, model: PreTrainedModel, files: list[str] | None) -> None: ...

    def fill(self, model: PreTrainedModel) -> None: ...


def hqq_marker(reader: Reader) -> "Marker":
    """The `quantization_config` that makes transformers call `reader`."""
    AUTO_QUANTIZER_MAPPING[METHOD] = LayerReader
    return Marker(reader)


class Marker(QuantizationConfigMixin):
    """Holds the reader."""

    def __init__(self, reader: Reader) -> None:
        named: Any = METHOD
        self.quant_method, self.reader = named, reader

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": METHOD}


class LayerReader(HfQuantizer):
    """Calls the reader before and after transformers loads the weights."""

    quantization_config: Marker
    is_trainable = True

    def is_serializable(self) -> bool:
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **how: Any) -> PreTrainedModel:
        self.quantization_config.reader.make_room(model, how["checkpoint_files"])
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **how: Any) -> PreTrainedModel:
        self.quantization_config.reader.fill(model)
        return model
