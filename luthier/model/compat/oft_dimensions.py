"""peft 0.21: OFT takes an input of four dimensions for the image of a convolution.

Latent attention (DeepSeek V3, MiniCPM 3) gives a linear layer (B, 1, T, D) in transformers 5.24, and its rotation
fails: `shape '[162, 2, 4]' is invalid for input of size 0`. What is saved is right: plain peft merges it.

https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/oft/layer.py `OFTRotationModule.forward`
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_NO_CONVOLUTION = (0, 0)


def rotate_any_dimensions() -> None:
    """The rotation before a linear layer takes an input of any number of dimensions."""
    from peft.tuners.oft.layer import OFTRotationModule

    usual = OFTRotationModule.forward
    if getattr(usual, "takes_any_dimensions", False):
        return

    def forward(self: Any, x: "Tensor") -> "Tensor":
        if x.ndim == 4 and self.kernel_size == _NO_CONVOLUTION:
            rotated: Tensor = usual(self, x.flatten(0, 1)).view(x.shape)
            return rotated
        whole: Tensor = usual(self, x)
        return whole

    forward.takes_any_dimensions = True  # type: ignore[attr-defined]
    OFTRotationModule.forward = forward  # type: ignore[method-assign]
