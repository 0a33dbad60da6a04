"""Quantized reference models."""

import json

import pytest

import luthier
from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from tests.small_world import small_world

RUN = {"model_name_or_path": "x/y", "dataset": "d", "output_dir": "o"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return small_world(tmp_path_factory.mktemp("bits"))


def logged(folder, key: str) -> list[float]:
    lines = (json.loads(line) for line in (folder / "trainer_log.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


def test_dpo_with_a_reference_of_4_bits(world, tmp_path):
    """The same weights, rounded: at the first step the ratios are near 0, and not 0 as beside the model itself."""
    pytest.importorskip("bitsandbytes")
    margins = {}
    for bits in (None, 4):
        run = {**world, "stage": "dpo", "dataset": "pairs", "ref_model": world["model_name_or_path"], "max_steps": 1}
        run |= {"output_dir": str(tmp_path / str(bits)), "logging_steps": 1, "infer_dtype": "float32"}
        luthier.train(run | ({"ref_model_quantization_bit": bits} if bits else {}))
        margins[bits] = logged(tmp_path / str(bits), "rewards/margins")[0]
    assert margins[None] == pytest.approx(0, abs=1e-5)
    assert 1e-5 < abs(margins[4]) < 1


def test_a_loss_that_runs_an_8_bit_reference_at_every_step(world, tmp_path):
    pytest.importorskip("bitsandbytes")
    run = {**world, "use_asft_loss": True, "ref_model": world["model_name_or_path"], "max_steps": 2, "logging_steps": 1}
    luthier.train({**run, "ref_model_quantization_bit": 8, "output_dir": str(tmp_path)})
    first = logged(tmp_path, "reference_kl")[0]
    assert 0 < first < 0.1


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"stage": "dpo", "ref_model": "a/b", "ref_model_quantization_bit": 3},
            "ref_model_quantization_bit: 3: bitsandbytes has 4 and 8 bits",
        ),
        (
            {"stage": "kto", "ref_model_quantization_bit": 4},
            "ref_model_quantization_bit: 4: is about ref_model, and there is none",
        ),
        (
            {"stage": "grpo", "reward_funcs": "f.py:g", "reward_model_quantization_bit": 8},
            "reward_model_quantization_bit: 8: is about reward_model, and there is none",
        ),
    ],
)
def test_rules(keys, message):
    with pytest.raises(ConfigError, match=message):
        load_train({**RUN, **keys})
