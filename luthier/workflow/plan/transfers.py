"""The bytes that the processes of a run exchange in an optimizer step.

N processes, S bytes. In a ring each process sends

    reduce-scatter, all-gather    (N - 1) / N S
    all-reduce                    2 (N - 1) / N S

Beside these a step exchanges a few numbers, such as the count of its labeled tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from luthier.workflow.plan.groups import Group

if TYPE_CHECKING:
    from luthier.workflow.plan.engine import Engine

Kind = Literal["all-reduce", "reduce-scatter", "all-gather", "broadcast"]


@dataclass(frozen=True, slots=True)
class Transfer:
    kind: Kind
    what: str
    num_bytes: int
    """Of the whole tensors, once."""
    times: int
    """In an optimizer step."""

    def sent_bytes(self, num_processes: int) -> int:
        """By each process in an optimizer step."""
        whole = self.num_bytes * self.times
        if self.kind == "broadcast":
            return whole
        share = (num_processes - 1) / num_processes
        return round(whole * share * (2 if self.kind == "all-reduce" else 1))


def transfers_of(
    engine: "Engine",
    *,
    groups: Sequence[Group],
    weights_bytes: int,
    trained_bytes: int,
    gradients_bytes: int,
    buffers_bytes: int,
    num_micro_batches: int,
) -> list[Transfer]:
    """`groups`: of FSDP 2. `weights_bytes`, `trained_bytes`: of all and of the trained weights, in the format they
    compute in. `gradients_bytes`: of whole gradients. `num_micro_batches`: in an optimizer step."""
    count = num_micro_batches
    if engine.num_processes == 1:
        return []
    if engine.name == "ddp":
        found = [Transfer("all-reduce", "gradients", gradients_bytes, 1)]
        return [*found, Transfer("broadcast", "buffers", buffers_bytes, 1)] if buffers_bytes else found
    if engine.name == "fsdp2":
        freed = sum(group.gathered_bytes for group in groups if group.is_freed)
        return [
            Transfer("all-gather", "weights, forward", sum(group.gathered_bytes for group in groups), count),
            *([Transfer("all-gather", "weights, backward", freed, count)] if freed else []),
            Transfer("reduce-scatter", "gradients", sum(group.reduced_bytes for group in groups), 1),
        ]
    if engine.name == "zero3":
        return [
            Transfer("all-gather", "weights, forward", weights_bytes, count),
            Transfer("all-gather", "weights, backward", weights_bytes, count),
            Transfer("reduce-scatter", "gradients", gradients_bytes, count),
        ]
    return [
        Transfer("reduce-scatter", "gradients", gradients_bytes, count if engine.name == "zero2" else 1),
        Transfer("all-gather", "trained weights", trained_bytes, 1),
    ]
