"""Saved activations in pinned main memory: copied out during the forward pass, copied back for the backward pass."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

Kept = Tensor | tuple[Tensor, torch.Event, torch.device]


@contextmanager
def offloaded() -> Iterator[None]:
    """Tensors saved for the backward pass inside move to pinned main memory. On a CPU they stay where they are."""
    with torch.autograd.graph.saved_tensors_hooks(_copy_out, _copy_back):
        yield


def _copy_out(tensor: Tensor) -> Kept:
    if tensor.device.type == "cpu":
        return tensor
    stream = _copy_stream(tensor.device)
    stream.wait_stream(torch.accelerator.current_stream(tensor.device))
    with stream:
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)
    return host, stream.record_event(), tensor.device


def _copy_back(kept: Kept) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    host, copied, device = kept
    torch.accelerator.current_stream(device).wait_event(copied)  # the device waits, and the host goes on
    return host.to(device, non_blocking=True)


@cache
def _copy_stream(device: torch.device) -> torch.Stream:
    """Copies run beside the computation."""
    return torch.Stream(device)
