"""A model goes to the device that it trains on before it is tried and gets its adapters."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.core.machine import detect
from luthier.model.loading import training
from tests.tiny import TINY_LLAMA


def run_of(*, tp_size=1, use_kt=False, use_cpu=False):
    return SimpleNamespace(
        parallel=SimpleNamespace(tp_size=tp_size),
        kt=SimpleNamespace(use_kt=use_kt),
        training={"use_cpu": use_cpu},
    )


def device_after(monkeypatch, run, *, is_sharded=False, num_accelerators=1):
    """`meta` stands for the device."""
    monkeypatch.setattr(training, "shards_weights", lambda _: is_sharded)
    machine = replace(detect(), device="meta", num_accelerators=num_accelerators)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY_LLAMA))
    training.place(run, model, machine)
    return model.device.type


def test_a_whole_model_is_moved(monkeypatch):
    assert device_after(monkeypatch, run_of()) == "meta"


@pytest.mark.parametrize(
    ("keys", "more"),
    [
        ({"tp_size": 2}, {}),
        ({"use_kt": True}, {}),
        ({"use_cpu": True}, {}),
        ({}, {"is_sharded": True}),
        ({}, {"num_accelerators": 0}),
    ],
)
def test_what_may_be_too_large_or_belongs_elsewhere_stays(monkeypatch, keys, more):
    assert device_after(monkeypatch, run_of(**keys), **more) == "cpu"
