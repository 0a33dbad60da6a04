"""Stands in for a CUDA device that has failed, on machines without one."""

import torch

ASSERTION = "CUDA error: device-side assert triggered"


def break_cuda(monkeypatch, fault: Exception | None) -> None:
    """The second of two devices is in use; each wait for it ends with `fault`."""

    def synchronize(number):
        assert number == 1, "the other device is not in use"
        if fault is not None:
            raise fault

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda number: number)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
