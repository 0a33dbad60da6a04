"""An accelerator that has failed, as after an assertion in a kernel or an illegal memory access.

From then on every call of CUDA in this process ends with the same error, whatever is computed. A refusal of memory is
another matter: after it the device works as before.
"""

import torch

from luthier.core.errors import DeviceFailed
from luthier.model.loading.memory_check import is_out_of_memory


def require_working_device(fault: BaseException) -> None:
    """Raises `DeviceFailed` if the device has failed, so that `fault` says nothing about what was computed last."""
    if isinstance(fault, DeviceFailed):
        raise fault
    if not torch.cuda.is_initialized():
        return
    for number in _used_devices():
        try:
            torch.cuda.synchronize(number)
        except RuntimeError as error:
            if is_out_of_memory(error):
                continue
            reason = str(error).partition("\n")[0]
            raise DeviceFailed(
                f"cuda:{number} has failed ({reason}), and this process can compute nothing more on it -> start again;"
                " if that fails too, CUDA_LAUNCH_BLOCKING=1 in the environment and LUTHIER_DEBUG=1 show where"
            ) from fault


def _used_devices() -> list[int]:
    """To ask any other would make a context on it, which takes memory."""
    return [number for number in range(torch.cuda.device_count()) if torch.cuda.memory_reserved(number)]
