"""A row spread over two processes has the logits and gradients of the whole row, for every kind of attention."""

import json
import os
import subprocess
import sys

import pytest
from torch.distributed import HashStore, ProcessGroup

from luthier.core.errors import ModelError
from luthier.model.attention import isolate_samples, isolates_samples
from luthier.model.sequence_parallel import spread_tokens
from tests.matrix import representatives
from tests.model.spread_row import CASES
from tests.model.test_attention import PADDED, build


@pytest.fixture(scope="module")
def of_two(tmp_path_factory) -> dict[str, list[float]]:
    """One start of two processes for all models."""
    target = tmp_path_factory.mktemp("two") / "differences.json"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += ["-m", "tests.model.spread_row", str(target)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(target.read_text()))


@pytest.mark.thorough
@pytest.mark.parametrize("name", CASES)
def test_a_row_over_two_processes_is_the_whole_row(of_two, name):
    logits, gradients = of_two[name]
    least = 2e-2 if name == "bf16" else 1e-5
    assert logits < least and gradients < least


@pytest.mark.parametrize(
    ("name", "changes", "num_processes", "reason"),
    [
        ("llama", {}, 3, "its 4 attention heads cannot be shared equally -> set sp_size to 2 or 4"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, 2, "dynamic"),
    ],
)
def test_what_cannot_be_spread_is_refused(name, changes, num_processes, reason):
    model = build(name, changes)
    isolate_samples(model)
    with pytest.raises(ModelError, match=reason):
        spread_tokens(model, ProcessGroup(HashStore(), 0, num_processes), None)


@pytest.mark.parametrize("name", representatives(PADDED, "mamba"))
def test_a_model_whose_rows_are_padded_is_refused_with_the_reason(name):
    model = build(name, PADDED[name])
    reason = isolates_samples(model)
    with pytest.raises(ModelError, match=r"cannot be spread over 2 processes: .* -> leave sp_size out"):
        spread_tokens(model, ProcessGroup(HashStore(), 0, 2), reason)
