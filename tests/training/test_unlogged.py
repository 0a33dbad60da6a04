"""Sums between two lines of the log survive a checkpoint bit for bit."""

import json

import torch
from hypothesis import given
from hypothesis import strategies as st

from luthier.training.unlogged import KEY, Unlogged

NUMBERS = st.floats(-1e6, 1e6, width=32)
DEVICE = torch.device("cpu")


@given(NUMBERS, st.dictionaries(st.sampled_from(["kl", "accuracy"]), st.tuples(NUMBERS, st.integers(0, 9))))
def test_they_come_back_from_json_as_they_were(loss, metrics):
    sums = {name: (torch.tensor(total), float(count)) for name, (total, count) in metrics.items()}
    kept = Unlogged.of(3, 1.5, torch.tensor(loss), sums, (2, 1))
    (found,) = [Unlogged.saved(json.loads(json.dumps({KEY: kept.as_json()})))]
    assert found is not None and (found.last_line, found.logged_loss, tuple(found.left_out)) == (3, 1.5, (2, 1))
    assert torch.tensor(found.loss) == torch.tensor(loss)
    assert found.sums(DEVICE, is_first=True) == sums


def test_one_process_takes_them_all():
    sums = {"reward": (torch.tensor(0.1, dtype=torch.float64), 4.0)}
    kept = Unlogged.of(0, 0.0, torch.tensor(0.0), sums, (0, 0))
    assert kept.sums(DEVICE, is_first=False) == {"reward": (torch.tensor(0.0, dtype=torch.float64), 0.0)}
    assert kept.sums(DEVICE, is_first=True)["reward"][0].dtype == torch.float64


def test_a_checkpoint_of_an_earlier_version_has_none():
    assert Unlogged.saved({}) is None
