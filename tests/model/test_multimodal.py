"""Models that read more than text: which weight belongs to which part, and what the freeze keys do to it."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from luthier.core.errors import ModelError
from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters
from luthier.model.files.sources import ModelSource
from luthier.model.loading.training import prepare_for_training
from luthier.model.multimodal import find_parts, frozen_parts, in_parts

TEXT = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 16,
}
CLIP, SIGLIP = {**VISION, "model_type": "clip_vision_model"}, {**VISION, "model_type": "siglip_vision_model"}
LLAMA, QWEN = {**TEXT, "model_type": "llama"}, {**TEXT, "model_type": "qwen2"}
FAMILIES = {
    "llava": (LLAMA, CLIP),
    "llava_next": (LLAMA, CLIP),
    "llava_onevision": (QWEN, SIGLIP),
    "video_llava": (LLAMA, CLIP),
    "qwen2_vl": ({**TEXT, **MROPE}, {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}),
    "qwen2_5_vl": (
        {**TEXT, **MROPE},
        {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48},
    ),
    "qwen3_vl": (
        {**TEXT, "head_dim": 16, **MROPE},
        {
            "depth": 2,
            "hidden_size": 32,
            "out_hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 48,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 16,
        },
    ),
    "gemma3": ({**TEXT, "head_dim": 16}, SIGLIP),
    "paligemma": ({**TEXT, "model_type": "gemma", "head_dim": 16}, {**SIGLIP, "projection_dim": 64}),
    "internvl": (QWEN, {**VISION, "image_size": [32, 32], "patch_size": [16, 16]}),
    "idefics3": (LLAMA, VISION),
    "smolvlm": (LLAMA, VISION),
    "mistral3": ({**TEXT, "model_type": "mistral"}, {**VISION, "model_type": "pixtral", "head_dim": 16}),
    "mllama": (
        {**TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        {
            **VISION,
            "attention_heads": 2,
            "num_global_layers": 1,
            "vision_output_dim": 64,
            "max_num_tiles": 1,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
        },
    ),
    "glm4v": (
        {**TEXT, **MROPE},
        {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48},
    ),
}
IDS = torch.tensor([[1, 7, 8, 9, 10, 11, 12, 2]])
FLAGS = ("freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model")


def build(family: str):
    text, vision = FAMILIES[family]
    config = AutoConfig.for_model(family, text_config=text, vision_config=vision)
    torch.manual_seed(0)
    return AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def adapt(model, kind: str, frozen=(), **keys):
    adapter = ADAPTERS.get(kind)
    config = adapter.config(**keys)
    given = GivenAdapters()
    return adapter.apply(model, config, given=given, pure_bf16=False, frozen=frozen)


def learning(model) -> set[str]:
    """Which parts learn, seen from the names of the weights, a PEFT wrapper taken off."""
    names = [name.removeprefix("base_model.model.") for name, w in model.named_parameters() if w.requires_grad]
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = find_parts(base)
    groups = {"encoders": parts.encoders, "projector": parts.projector, "language": parts.language}
    return {group for group, prefixes in groups.items() if any(in_parts(name, prefixes) for name in names)}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_belongs_to_one_part(family):
    model = build(family)
    parts = find_parts(model)
    for name, _ in model.named_parameters():
        assert sum(in_parts(name, group) for group in (parts.encoders, parts.projector, parts.language)) == 1, name
    assert all("vision" in name or "visual" in name or "tower" in name for name in parts.encoders)
    assert all("language" in name or "text_model" in name or name == "lm_head" for name in parts.language)
    words = ("project", "merger", "connector", "newline")
    assert all(any(word in name for word in words) for name in parts.projector)
    assert parts.encoders and parts.projector and parts.language


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["full", "freeze", "lora"])
def test_with_the_defaults_the_language_model_learns_from_text(family, kind):
    model = build(family)
    frozen = frozen_parts(model, **dict(zip(FLAGS, (True, True, False), strict=True)))
    model = adapt(model, kind, frozen)
    assert learning(model) == {"language"}
    prepare_for_training(model)
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.1)
    losses = []
    for _ in range(2):
        loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]


@pytest.mark.parametrize(
    ("kind", "flags", "expected"),
    [
        ("full", (False, False, False), {"encoders", "projector", "language"}),
        ("full", (False, True, False), {"encoders", "language"}),
        ("full", (True, False, True), {"projector"}),
        ("freeze", (True, False, False), {"projector", "language"}),
        ("freeze", (True, False, True), {"projector"}),
        ("lora", (False, False, False), {"encoders", "language"}),
        ("lora", (False, True, True), {"encoders"}),
        ("lora", (True, True, False), {"language"}),
    ],
)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "idefics3"])
def test_each_part_can_be_left_as_it_is(family, kind, flags, expected):
    model = build(family)
    frozen = frozen_parts(model, **dict(zip(FLAGS, flags, strict=True)))
    assert learning(adapt(model, kind, frozen)) == expected


def test_named_targets_are_those_outside_the_frozen_parts():
    model = build("llava")
    frozen = frozen_parts(model, **dict(zip(FLAGS, (True, True, False), strict=True)))
    adapted = adapt(model, "lora", frozen, lora_target=("q_proj", "v_proj"))
    names = [name for name, weight in adapted.named_parameters() if weight.requires_grad]
    assert len(names) == 2 * 2 * 2
    assert all(".language_model.layers." in name for name in names)
    with pytest.raises(ModelError, match="linear_1: is only in parts that freeze_vision_tower"):
        adapt(build("llava"), "lora", frozen, lora_target=("linear_1",))


def test_nothing_left_to_learn_is_an_error():
    model = build("llava")
    with pytest.raises(ModelError, match="leave no trainable parameter"):
        adapt(model, "full", frozen_parts(model, **dict.fromkeys(FLAGS, True)))


def test_a_model_of_text_has_no_parts(llama_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_folder)
    assert not find_parts(model)
    assert frozen_parts(model, **dict.fromkeys(FLAGS, True)) == ()


def test_of_a_model_that_speaks_the_part_that_reads_and_writes_is_loaded(tmp_path):
    from transformers import AutoModelForMultimodalLM

    from luthier.model.loading.load import load_model

    thinker = {
        "text_config": {**TEXT, **MROPE, "head_dim": 16},
        "vision_config": FAMILIES["qwen2_5_vl"][1],
        "audio_config": {
            "d_model": 32,
            "encoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "output_dim": 64,
        },
    }
    config = AutoConfig.for_model("qwen2_5_omni", enable_audio_output=False, thinker_config=thinker)
    whole = AutoModelForMultimodalLM.from_config(config)
    whole.save_pretrained(tmp_path / "whole")
    model = load_model(ModelSource(str(tmp_path / "whole")), dtype=torch.float32)
    for (name, weight), expected in zip(model.named_parameters(), whole.thinker.parameters(), strict=True):
        assert torch.equal(weight, expected), name
    assert "model.audio_tower" in find_parts(model).encoders
    model.save_pretrained(tmp_path / "part")
    again = load_model(ModelSource(str(tmp_path / "part")), dtype=torch.float32)
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
