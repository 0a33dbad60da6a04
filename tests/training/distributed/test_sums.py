"""Sums and passes over rows, as one process sees them; two processes are in tests/runs/test_processes.py."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState

from luthier.training.distributed.sums import add_to, batch_by_batch, for_every_row, over_processes

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def state():
    return PartialState(cpu=True)


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_every_row_has_its_result_in_order_whatever_the_batch_size(size):
    rows = [{"n": n} for n in range(7)]
    args = SimpleNamespace(process_index=0, world_size=1, eval_batch_size=size, device=CPU)
    seen = []

    def compute(batch):
        seen.append(len(batch["n"]))
        assert not torch.is_grad_enabled()
        return batch["n"].square().tolist()

    found = for_every_row(rows, args, lambda rows: {"n": torch.tensor([row["n"] for row in rows])}, compute)
    assert found == [n * n for n in range(7)]
    assert sum(seen) == 7 and max(seen) <= size and torch.is_grad_enabled()


def test_rows_of_two_processes_come_back_in_their_order(monkeypatch):
    """Each takes every second row, so what is gathered is not in order."""
    gathered = []

    def both(mine):
        gathered.append(mine)
        return [pair for each in gathered for pair in each]

    monkeypatch.setattr("luthier.training.distributed.sums.gather_object", both)
    for process in (1, 0):
        args = SimpleNamespace(process_index=process, world_size=2, eval_batch_size=2, device=CPU)
        found = for_every_row(
            [{"n": n} for n in range(5)],
            args,
            lambda rows: {"n": torch.tensor([row["n"] for row in rows])},
            lambda batch: batch["n"].tolist(),
        )
    assert found == [0, 1, 2, 3, 4]


def test_sums_add_up_by_name_without_their_graph():
    sums = {}
    weight = torch.ones((), requires_grad=True)
    for number in (1.0, 2.0):
        add_to(sums, {"loss": (weight * number, 2.0), f"only {number}": (weight, 1.0)})
    assert not sums["loss"][0].requires_grad
    assert over_processes(sums, CPU) == {"loss": (3.0, 4.0), "only 1.0": (1.0, 1.0), "only 2.0": (1.0, 1.0)}
    assert over_processes({}, CPU) == {}


def test_values_that_are_not_tensors_stay_in_the_batch():
    assert batch_by_batch([{"a": torch.ones(1), "b": 3}], CPU, lambda batch: batch["b"]) == [3]
