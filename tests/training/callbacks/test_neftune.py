"""NEFTune: noise of the right size on the embeddings of each sequence, while training only."""

from typing import Any

import peft
import pytest
import torch

import luthier
from luthier.data.collate import concatenate_rows, model_inputs, pad_rows
from luthier.training.callbacks.neftune import NeftuneNoise
from tests.small_world import losses, small_world
from tests.training.optimizers.worlds import tiny_model

LENGTHS = (400, 25)
ROWS = [{"input_ids": [7] * length, "labels": [7] * length} for length in LENGTHS]


def noise_of(model: Any, embeddings: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What the embeddings hand to the layers, less what they hold."""
    seen: list[torch.Tensor] = []
    handle = embeddings.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    model(**inputs)
    handle.remove()
    weight = embeddings.weight if hasattr(embeddings, "weight") else embeddings.base_layer.weight
    return seen[0] - weight[inputs["input_ids"]].detach()


@pytest.mark.parametrize("layout", ["behind one another", "padded"])
@pytest.mark.parametrize("with_lora", [False, True])
def test_the_size_follows_the_length_of_each_sequence(with_lora, layout):
    """Uniform in +-alpha / sqrt(L d): the length of all of it is about alpha / sqrt(3), whatever L is."""
    model: Any = tiny_model()
    if with_lora:
        model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    callback = NeftuneNoise(5.0)
    callback.on_train_begin(None, None, None, model=model)
    batch = concatenate_rows(ROWS) if layout == "behind one another" else pad_rows(ROWS, 0)
    inputs = model_inputs(batch)
    embeddings = model.get_input_embeddings()
    noise = noise_of(model.train(), embeddings, inputs)
    parts = noise[0].split(LENGTHS) if layout == "behind one another" else [noise[0, :400], noise[1, :25]]
    for part, length in zip(parts, LENGTHS, strict=True):
        bound = 5.0 / (length * 64) ** 0.5
        assert 0.95 * bound < part.abs().max() <= bound * 1.001
        assert part.norm().item() == pytest.approx(5.0 / 3**0.5, rel=0.05)
    assert noise_of(model.eval(), embeddings, inputs).abs().max() == 0
    callback.on_train_end(None, None, None)
    assert noise_of(model.train(), embeddings, inputs).abs().max() == 0


@pytest.mark.parametrize("finetuning_type", ["lora", "full"])
def test_it_acts_in_a_run_and_leaves_evaluation_alone(tmp_path, finetuning_type):
    values = {**small_world(tmp_path / "world"), "finetuning_type": finetuning_type, "max_steps": 2, "learning_rate": 0}
    keys = {"do_eval": True, "eval_dataset": "numbers", "output_dir": str(tmp_path / "out")}
    plain, noisy = (luthier.train({**values, **keys, **more}) for more in ({}, {"neftune_noise_alpha": 50.0}))
    assert all(abs(a - b) > 1e-4 for a, b in zip(losses(plain), losses(noisy), strict=True))
    assert plain.metrics["eval"]["eval_loss"] == noisy.metrics["eval"]["eval_loss"]
