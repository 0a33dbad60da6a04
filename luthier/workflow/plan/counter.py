"""Counts what a step does to tensors without data: the storages that are alive after each operation, and its work."""

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from luthier.model.kernels import repeats
from luthier.model.modules import unwrap
from luthier.workflow.plan.calls import Call, call_of, moved_bytes, workspace_bytes
from luthier.workflow.plan.meta_results import result_of

aten = torch.ops.aten


class StepCounter(TorchDispatchMode):
    """Adds up the storages that are alive after each operation, except those of `model`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.vocab_size = unwrap(model).config.get_text_config().vocab_size
        self.known = {
            tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers()) if tensor.is_meta
        }
        self.live_bytes = self.live_logits = self.most_logits = 0
        self.num_calls = 0
        self.calls: Counter[Call] = Counter()
        self.history: list[int] = []
        self._contexts: list[contextlib.ExitStack] = []

    def restart(self) -> None:
        """Forget what was done; what is alive stays counted."""
        self.most_logits, self.num_calls = self.live_logits, 0
        self.calls, self.history = Counter(), []

    def __enter__(self) -> Any:
        self._contexts.append(contextlib.ExitStack())
        self._contexts[-1].enter_context(repeats.counted(self._repeated))
        return super().__enter__()

    def __exit__(self, *fault: Any) -> None:
        super().__exit__(*fault)
        self._contexts.pop().close()

    @contextlib.contextmanager
    def _repeated(self, times: int) -> Iterator[None]:
        before, first = self.calls, len(self.history)
        self.calls = Counter()
        yield
        calls, self.calls = self.calls, before
        for call, count in calls.items():
            self.calls[call] += times * count
        again = self.history[first:] * (times - 1)
        self.history += again
        self.num_calls += len(again)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:
            return 0  # a question about numbers, such as whether a row holds several samples
        if func is aten._unique2.default:
            return self._distinct(args[0])
        result = result_of(func, args, kwargs or {})
        self.num_calls += 1
        results = [
            one for one in (result if isinstance(result, tuple | list) else (result,)) if isinstance(one, Tensor)
        ]
        moved = moved_bytes(func, args, results)
        if moved:
            self.calls[call_of(func, args, result, moved)] += 1
        for tensor in results:
            self._note(tensor)
        hidden = workspace_bytes(func, args)
        self.history.append(self.live_bytes + hidden)
        self.most_logits = max(self.most_logits, self.live_logits + hidden)
        return result

    def _distinct(self, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """At worst all are."""
        return torch.empty_like(positions), torch.empty_like(positions), torch.empty_like(positions)

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        is_logits = tensor.ndim >= 2 and tensor.shape[-1] == self.vocab_size and tensor.is_floating_point()
        self.live_bytes += num_bytes
        self.live_logits += num_bytes * is_logits
        self.most_logits = max(self.most_logits, self.live_logits)
        weakref.finalize(storage, self._forget, key, num_bytes, is_logits)

    def _forget(self, key: int, num_bytes: int, is_logits: bool) -> None:
        self.known.discard(key)
        self.live_bytes -= num_bytes
        self.live_logits -= num_bytes * is_logits
