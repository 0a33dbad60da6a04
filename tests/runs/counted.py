"""Trains each of the run files it is given, and writes what each process held and sent in the last step.

`torchrun --nproc-per-node 2 -m tests.runs.counted FOLDER RUN...` writes FOLDER/NAME.RANK.json for NAME.yaml.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

import luthier
from luthier.training.trainer import StageTrainer
from tests.runs.each_of import leave

KINDS = {
    "allreduce_": "all-reduce",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "broadcast_": "broadcast",
}


class Wire(TorchDispatchMode):
    """Bytes of the whole tensors of each kind of collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            # The larger of input and output is the whole tensor.
            self.sent[KINDS.get(name, name)] += max(map(num_bytes, args[:2]))
        return func(*args, **(kwargs or {}))


def num_bytes(value: Any) -> int:
    if isinstance(value, list | tuple):
        return sum(map(num_bytes, value))
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def local_bytes(tensors: Any) -> int:
    own = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in own}.values())


def counted(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    wire = Wire()
    build, step = StageTrainer.create_optimizer, StageTrainer.training_step

    def create_optimizer(self: Any, model: Any = None) -> Any:
        optimizer = build(self, model)

        def note(optimizer: Any, args: Any, kwargs: Any) -> None:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            found["gradients"] = local_bytes(weight.grad for weight in weights if weight.grad is not None)

        def note_after(optimizer: Any, args: Any, kwargs: Any) -> None:
            states = [value for state in optimizer.state.values() for value in state.values()]
            found["optimizer"] = local_bytes(value for value in states if value.ndim)
            found["weights"] = local_bytes((*self.policy.parameters(), *self.policy.buffers()))

        optimizer.register_step_pre_hook(note)
        optimizer.register_step_post_hook(note_after)
        return optimizer

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step < self.args.max_steps - 1:
            return step(self, *args, **kwargs)
        with wire:
            return step(self, *args, **kwargs)

    StageTrainer.create_optimizer, StageTrainer.training_step = create_optimizer, training_step  # type: ignore
    try:
        luthier.train(yaml.safe_load(path.read_text(encoding="utf-8")))
    finally:
        StageTrainer.create_optimizer, StageTrainer.training_step = build, step  # type: ignore[method-assign]
    return {**found, "sent": wire.sent}


if __name__ == "__main__":
    for name in sys.argv[2:]:
        for variable in [one for one in os.environ if one.startswith(("ACCELERATE_", "FSDP_"))]:
            del os.environ[variable]  # by which transformers tells accelerate of the engine of the run before
        target = Path(sys.argv[1], f"{Path(name).stem}.{os.environ['RANK']}.json")
        target.write_text(json.dumps(counted(Path(name))), encoding="utf-8")
    leave()
