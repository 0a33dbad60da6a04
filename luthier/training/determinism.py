"""Deterministic kernels (`full_determinism`) for one run: transformers switches them on for the rest of the process."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_VARIABLES = (
    *("CUDA_LAUNCH_BLOCKING", "CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"),
    *("ASCEND_LAUNCH_BLOCKING", "HCCL_DETERMINISTIC"),
)
"""The environment variables that `transformers.enable_full_determinism` sets."""


@contextmanager
def restoring_kernels() -> Iterator[None]:
    """Wraps a run. The next run of this process chooses among the kernels that this one could choose among."""
    import torch

    variables = {name: os.environ.get(name) for name in _VARIABLES}
    is_on, only_warns = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    cudnn = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        for name, value in variables.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        torch.use_deterministic_algorithms(is_on, warn_only=only_warns)
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = cudnn
