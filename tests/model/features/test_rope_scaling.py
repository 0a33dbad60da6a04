"""A stretched window: the angles are those of the papers, and plain transformers loads the same model."""

import math

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.config.load import load_export, load_infer, load_train
from luthier.core.errors import ModelError
from luthier.model.backends import load_for_inference, load_for_training
from luthier.model.features.rope_scaling import require_stretched, save_beside_adapter, stretch_context
from luthier.model.files.sources import ModelSource
from luthier.model.loading.merged import load_for_export
from luthier.model.tokenizer import fit_tokenizer, load_tokenizer
from tests.tiny import TINY_LLAMA, tiny_llama

WINDOW, BASE, HEAD = 128, 10000.0, 64
IDS = torch.arange(300)[None] % 250


def config(**changes):
    shape = {"max_position_embeddings": WINDOW, "hidden_size": 2 * HEAD, "num_attention_heads": 2}
    return AutoConfig.for_model("llama", **{**TINY_LLAMA, **shape, **changes})


def angles(stretched, num_tokens=0):
    """What a model of this config turns each pair by, per token, after it has seen `num_tokens`."""
    rotary = AutoModelForCausalLM.from_config(stretched).model.rotary_emb
    if num_tokens:
        rotary(torch.zeros(1), torch.arange(num_tokens)[None])
    return rotary.inv_freq, rotary.attention_scaling


PLAIN = torch.tensor([BASE ** (-2 * i / HEAD) for i in range(HEAD // 2)])


def test_linear_divides_every_angle_by_the_factor():
    stretched = config()
    said = stretch_context(stretched, "linear", cutoff_len=300)
    assert said == "linear, factor 3: the window grows from 128 to 384 tokens"
    assert stretched.max_position_embeddings == 384
    torch.testing.assert_close(angles(stretched)[0], PLAIN / 3)


def test_dynamic_changes_the_base_for_longer_texts_only():
    stretched = config()
    stretch_context(stretched, "dynamic", cutoff_len=300)
    torch.testing.assert_close(angles(stretched, WINDOW)[0], PLAIN)
    base = BASE * (3 * 300 / WINDOW - 2) ** (HEAD / (HEAD - 2))
    expected = torch.tensor([base ** (-2 * i / HEAD) for i in range(HEAD // 2)])
    torch.testing.assert_close(angles(stretched, 300)[0], expected)


def test_yarn_interpolates_slow_pairs_and_leaves_fast_ones():
    """Equation 23 and 25 of the paper: a pair of r rotations over L is stretched below 1, left above 32."""
    stretched = config(max_position_embeddings=4096)
    stretch_context(stretched, "yarn", cutoff_len=16384)
    found, scale = angles(stretched)
    assert stretched.max_position_embeddings == 16384

    def pair_of(rotations):
        return HEAD * math.log(4096 / (rotations * 2 * math.pi)) / (2 * math.log(BASE))

    low, high = max(math.floor(pair_of(32)), 0), min(math.ceil(pair_of(1)), HEAD - 1)
    ramp = ((torch.arange(HEAD // 2) - low) / (high - low)).clamp(0, 1)
    torch.testing.assert_close(found, PLAIN / 4 * ramp + PLAIN * (1 - ramp))
    assert scale == pytest.approx(0.1 * math.log(4) + 1)


def test_llama3_keeps_short_wavelengths_and_stretches_those_beyond_the_window():
    stretched = config()
    stretch_context(stretched, "llama3", cutoff_len=256)
    found, _ = angles(stretched)
    for angle, plain in zip(found.tolist(), PLAIN.tolist(), strict=True):
        wave = 2 * math.pi / plain
        smooth = min(max((WINDOW / wave - 1) / (4 - 1), 0), 1)
        assert angle == pytest.approx((1 - smooth) * plain / 2 + smooth * plain, rel=1e-5)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_a_window_that_holds_the_rows_stays(kind):
    untouched = config()
    assert "holds cutoff_len 128" in stretch_context(untouched, kind, cutoff_len=128)
    assert untouched.rope_parameters == config().rope_parameters
    inferring = config()
    assert "factor 2" in stretch_context(inferring, kind, cutoff_len=None)
    assert inferring.rope_parameters["factor"] == 2
    assert "already" in stretch_context(inferring, kind, cutoff_len=None)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_a_stretched_window_is_stretched_further_from_its_origin(kind):
    twice, once = config(), config()
    stretch_context(twice, kind, cutoff_len=200)
    stretch_context(twice, kind, cutoff_len=600)
    stretch_context(once, kind, cutoff_len=600)
    assert twice.to_dict() == once.to_dict()


def test_sliding_layers_keep_their_positions():
    gemma = AutoConfig.for_model("gemma3_text", max_position_embeddings=WINDOW)
    stretch_context(gemma, "linear", cutoff_len=256)
    assert gemma.rope_parameters["full_attention"]["rope_type"] == "linear"
    assert gemma.rope_parameters["sliding_attention"]["rope_type"] == "default"


def test_what_cannot_be_stretched_says_so():
    with pytest.raises(ModelError, match="no rotary position embedding to stretch -> leave"):
        stretch_context(AutoConfig.for_model("gpt2"), "linear", cutoff_len=4096)
    yarn = config()
    stretch_context(yarn, "yarn", cutoff_len=256)
    with pytest.raises(ModelError, match="stretched by yarn already"):
        stretch_context(yarn, "linear", cutoff_len=4096)
    with pytest.raises(ModelError, match="without looking at its config"):
        require_stretched(torch.nn.Linear(1, 1), "yarn")


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_a_window_that_is_long_enough_is_no_error(kind, tmp_path, said):
    folder = str(tiny_llama(tmp_path / "model", max_position_embeddings=WINDOW))
    keys = {"model_name_or_path": folder, "rope_scaling": kind, "cutoff_len": WINDOW}
    run = load_train({**keys, "dataset": "x", "output_dir": str(tmp_path / "out")})
    model = load_for_training(run, fit_tokenizer(load_tokenizer(ModelSource(folder)))).model
    assert any("not applied: the window of" in line for line in said)
    assert model.get_base_model().config.rope_parameters["rope_type"] == "default"


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "llama3"])
def test_adapters_and_exports_keep_the_positions_of_their_training(kind, tmp_path, said):
    folder = str(tiny_llama(tmp_path / "model", max_position_embeddings=WINDOW))
    keys = {"model_name_or_path": folder, "rope_scaling": kind}
    run = load_train({**keys, "dataset": "x", "output_dir": str(tmp_path / "out"), "cutoff_len": 300})
    model = load_for_training(run, fit_tokenizer(load_tokenizer(ModelSource(folder)))).model.eval()
    assert any("factor 3" in line for line in said)
    adapter = tmp_path / "adapter"
    model.save_pretrained(adapter)
    save_beside_adapter(adapter, model.get_base_model().config)
    given = {**keys, "adapter_name_or_path": str(adapter)}
    with torch.no_grad():
        ids = IDS.to(model.device)
        expected = model(input_ids=ids, use_cache=False).logits
        answering = load_for_inference(load_infer({**given, "rope_scaling": None}))
        torch.testing.assert_close(answering(input_ids=ids).logits, expected)
        merged = load_for_export(load_export({**given, "export_dir": str(tmp_path / "merged")}))
        merged.save_pretrained(tmp_path / "merged")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected)
    assert any(f"{kind}, as adapter" in line for line in said)
    (adapter / "rope_scaling.json").write_text("{")
    with pytest.raises(ModelError, match="copy or download the adapter again"):
        load_for_inference(load_infer(given))
