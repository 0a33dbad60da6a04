"""peft 0.21: an adapter on experts asks for the autocast of its device, and `meta`, where a plan traces, has none.

`torch.autocast("meta", enabled=False)` fails with `unsupported scalarType`. Autocast that is traced is that of the CPU.

https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py `ParamWrapper.forward`
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def autocast_of_cpu() -> Iterator[None]:
    """While open, the autocast of `meta` is that of the CPU."""
    import torch

    usual = torch.autocast

    class Autocast(usual):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, *arguments: Any, **more: Any) -> None:
            super().__init__("cpu" if device_type == "meta" else device_type, *arguments, **more)

    torch.autocast = Autocast  # type: ignore[misc]
    try:
        yield
    finally:
        torch.autocast = usual  # type: ignore[misc]
