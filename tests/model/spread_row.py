"""Compares rows spread over processes with whole ones, in each process.

`torchrun --nproc-per-node 2 -m tests.model.spread_row FILE` writes FILE: model -> the largest differences of
its logits and of its gradients, in parts of the largest of them.
"""

import json
import sys
from pathlib import Path

import torch
from torch import distributed

from luthier.data.collate import concatenate_rows, model_inputs
from luthier.data.sequence_slices import concatenate_slice
from luthier.model.attention import isolate_samples, isolates_samples
from luthier.model.sequence_parallel import spread_tokens
from tests.model.test_attention import ISOLATED, build
from tests.runs.each_of import leave

CASES = {
    **{name: (name, changes) for name, changes in ISOLATED.items()},
    "multi-query": ("llama", {"num_key_value_heads": 1}),
    "odd groups": ("llama", {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}),
    "recomputed": ("llama", {}),
    "bf16": ("llama", {}),
}
LENGTHS = (7, 1, 30, 13)
"""51 tokens, so that one token fills the row."""


def compared(name: str, rank: int, num_processes: int) -> tuple[float, float]:
    model = build(*CASES[name])
    if name == "bf16":
        model.bfloat16()
    if name == "recomputed":
        model.train().gradient_checkpointing_enable()
    generator = torch.Generator().manual_seed(0)
    samples = [torch.randint(1, 250, (length,), generator=generator).tolist() for length in LENGTHS]
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]} for ids in samples]
    padding_reason = isolates_samples(model)
    isolate_samples(model)
    whole, wanted = results(model, concatenate_rows(rows))
    spread_tokens(model, distributed.group.WORLD, padding_reason)
    again, _ = results(model, concatenate_rows(rows))
    assert torch.equal(again, whole), "whole rows are computed as before"
    part, found = results(model, concatenate_slice(rows, rank, num_processes))
    for gradient in found:
        distributed.all_reduce(gradient)
    start = rank * len(part)
    own = whole[start : start + len(part)]
    logits = (part[: len(own)] - own).abs().max() / whole.abs().max()
    differences = [(mine - its).abs().max() for mine, its in zip(found, wanted, strict=True)]
    largest = max(its.abs().max() for its in wanted)
    return logits.item(), (max(differences) / largest).item()


def results(model, batch) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Logits, and the gradients of all weights."""
    model.zero_grad()
    logits = model(**model_inputs(batch), use_cache=False).logits[0]
    logps = logits[batch["positions"]].float().log_softmax(-1)
    logps.gather(1, batch["targets"][:, None]).sum().backward()
    grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in model.parameters()]
    return logits.detach().float(), [grad.float().clone() for grad in grads]


if __name__ == "__main__":
    distributed.init_process_group("gloo")
    rank, num_processes = distributed.get_rank(), distributed.get_world_size()
    found = torch.tensor([compared(name, rank, num_processes) for name in CASES])
    distributed.all_reduce(found, distributed.ReduceOp.MAX)
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(dict(zip(CASES, found.tolist(), strict=True))))
    leave()
