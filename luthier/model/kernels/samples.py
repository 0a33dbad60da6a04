"""Where the samples of a row are, and which tokens each of them attends to.

S samples, T tokens of the row.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

Run = tuple[int, int]
"""Tokens that stand together in a row: the first one, and how many."""


@dataclass(frozen=True, slots=True)
class Samples:
    own: list[Run]
    """The tokens of each sample."""
    prefixes: list[tuple[Run, ...]]
    """The tokens before these, which the sample shares with another one (`luthier.data.shared_prefixes`)."""
    key_bounds: "Tensor | None"
    """(S + 1,) where the keys of each sample begin; None where no sample has a prefix."""
    key_tokens: "Tensor | None"
    """Which token of the row each of these keys belongs to."""

    @property
    def lengths(self) -> list[int]:
        return [length for _, length in self.own]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    @property
    def longest_with_prefix(self) -> int:
        return max(self.num_before(sample) + length for sample, (_, length) in enumerate(self.own))

    def num_before(self, sample: int) -> int:
        """Tokens of its prefix."""
        return sum(length for _, length in self.prefixes[sample])


def samples_of(bounds: "Tensor", prefixes: "Tensor | None") -> Samples:
    """`bounds`: (S + 1,), where each sample starts, and T. `prefixes`: (S, 2 R), the runs of each sample, or None; a
    run of no tokens stands for none.
    """
    kind = "alone" if prefixes is None else "sharing"
    found: Samples = once(bounds, kind, lambda: _read(bounds, prefixes))
    return found


def numbers_of(tensor: "Tensor") -> Any:
    """What its `tolist` gives."""
    return once(tensor, "numbers", tensor.tolist)


def bounds_of(lengths: Sequence[int], device: "torch.device") -> "Tensor":
    """(S + 1,) where each of S samples starts, and T. Nobody has to wait for the device to read them."""
    numbers = [*accumulate(lengths, initial=0)]
    bounds = torch.tensor(numbers, dtype=torch.int32, device="cpu").to(device, non_blocking=True)
    once(bounds, "numbers", lambda: numbers)
    return bounds


def once(tensor: "Tensor", what: str, read: Callable[[], Any]) -> Any:
    """What `read` gives, asked once for as long as the tensor exists. Each layer gets the same tensors, and reading
    them waits for the device."""
    kept: dict[str, Any] = _known().setdefault(tensor, {})
    if what not in kept:
        kept[what] = read()
    return kept[what]


@functools.cache
def _known() -> "torch.utils.weak.WeakIdKeyDictionary":
    from torch.utils.weak import WeakIdKeyDictionary

    return WeakIdKeyDictionary()


def _read(bounds: "Tensor", prefixes: "Tensor | None") -> Samples:
    own = [(start, end - start) for start, end in pairwise(numbers_of(bounds))]
    if prefixes is None:
        return Samples(own, [()] * len(own), None, None)
    runs = [tuple((first, number) for first, number in sample if number) for sample in _pairs(prefixes)]
    tokens: list[int] = []
    ends = [0]
    for mine, before in zip(own, runs, strict=True):
        tokens += [token for first, number in (*before, mine) for token in range(first, first + number)]
        ends.append(len(tokens))
    key_bounds = torch.tensor(ends, dtype=torch.int32, device=bounds.device)
    return Samples(own, runs, key_bounds, torch.tensor(tokens, device=bounds.device))


def _pairs(prefixes: "Tensor") -> list[list[list[int]]]:
    found: list[list[list[int]]] = prefixes.unflatten(1, (-1, 2)).tolist()
    return found
