"""Block expansion: the longer model says bit for bit the same, and what is trained then is what was inserted."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from luthier.cli import main
from luthier.config.load import load_train
from luthier.core.errors import ConfigError, ModelError
from luthier.core.kinds import ADAPTERS
from luthier.model.adapters._merge import GivenAdapters
from luthier.model.adapters.freeze import FreezeConfig
from luthier.model.adapters.lora import LoraConfig
from luthier.model.adapters.oft import OftConfig
from luthier.model.llama_pro import expand_blocks, inserted_layers
from luthier.model.modules import layer_list
from luthier.run.expand import expand
from tests.matrix import representatives
from tests.runs.test_architectures import ROWS, build, loss_of
from tests.tiny import byte_tokenizer, tiny_llama

BASE = {"model_name_or_path": "m", "dataset": "d", "template": "qwen", "output_dir": "o", "do_train": True}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ROWS[0]["input_ids"]]), use_cache=False).logits


def prepare(kind: str, config, model):
    return ADAPTERS.get(kind).apply(model, config, given=GivenAdapters(), pure_bf16=False)


def written(name: str, folder):
    build(name).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "name",
    representatives(
        [
            *("llama", "qwen2", "gemma2", "olmo2", "cohere", "phi", "opt", "gpt2", "gpt_neox", "falcon", "bloom"),
            *("mixtral", "qwen2_moe", "gpt_oss", "glm4", "stablelm", "qwen3_5_text", "jetmoe", "granite", "lfm2"),
        ],
        *("llama", "gpt2", "cohere", "mixtral", "gpt_oss", "lfm2"),
    ),
)
def test_the_expanded_model_says_the_same_and_its_new_blocks_learn(name, tmp_path):
    """One block after each of the two; after a step only these differ, and the loss is lower."""
    base = written(name, tmp_path / "base")
    before = logits(load(base))
    assert expand(str(base), tmp_path / "out", 2) == tmp_path / "out"
    model = load(tmp_path / "out")
    assert len(layer_list(model)[1]) == 4
    assert torch.equal(logits(model), before)

    prepare("freeze", FreezeConfig(freeze_trainable_layers=2, use_llama_pro=True), model)
    learning = [weight for weight in model.parameters() if weight.requires_grad]
    blocks = layer_list(model)[1]
    assert {id(weight) for weight in learning} == {id(w) for index in (1, 3) for w in blocks[index].parameters()}
    loss = loss_of(model, concatenates=False)
    loss.backward()
    for copied, block in ((blocks[0], blocks[1]), (blocks[2], blocks[3])):
        pairs = zip(copied.parameters(), block.parameters(), strict=True)
        silent = [weight for original, weight in pairs if original.any() and not weight.any()]
        assert silent and all(weight.grad is not None and weight.grad.any() for weight in silent)
    torch.optim.SGD(learning, lr=1e-4 / float(sum(w.grad.norm() for w in learning if w.grad is not None))).step()
    assert loss_of(model, concatenates=False) < loss


def test_what_is_zero_is_what_writes_the_outputs(tmp_path):
    model = build("llama")
    assert expand_blocks(model, 1) == [2]
    blocks = layer_list(model)[1]
    assert {name for name, weight in blocks[2].named_parameters() if not weight.any()} == {
        "self_attn.o_proj.weight",
        "mlp.down_proj.weight",
    }
    others = {name: weight for name, weight in blocks[2].named_parameters() if weight.any()}
    assert all(torch.equal(weight, blocks[1].get_parameter(name)) for name, weight in others.items())
    assert model.config.num_hidden_layers == 3


def test_lora_is_put_on_inserted_blocks_only(tmp_path):
    expand(str(written("qwen2_moe", tmp_path / "base")), tmp_path / "out", 1)
    config = LoraConfig(use_llama_pro=True, freeze_trainable_layers=1)
    adapted = prepare("lora", config, load(tmp_path / "out"))
    places = {name.split(".layers.")[1][0] for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert places == {"2"}
    assert any("experts" in name for name, weight in adapted.named_parameters() if weight.requires_grad)


def test_rotations_are_put_into_inserted_blocks_only(tmp_path):
    expand(str(tiny_llama(tmp_path / "base", num_hidden_layers=4)), tmp_path / "out", 2)
    adapted = prepare("oft", OftConfig(use_llama_pro=True, freeze_trainable_layers=2), load(tmp_path / "out"))
    places = {name.split(".layers.")[1][0] for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert places == {"2", "5"}


def test_the_command(tmp_path, capsys):
    base = tiny_llama(tmp_path / "base", num_hidden_layers=4)
    assert main(["expand", str(base), str(tmp_path / "out"), "--blocks", "2"]) == 0
    assert "expanded: " in capsys.readouterr().out
    assert torch.equal(logits(load(tmp_path / "out")), logits(load(base)))
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("blocks", ["3", "0", "-1"])
def test_a_number_that_does_not_divide(tmp_path, capsys, blocks):
    base = tiny_llama(tmp_path / "base", num_hidden_layers=4)
    assert main(["expand", str(base), str(tmp_path / "out"), "--blocks", blocks]) == 2
    assert f"--blocks {blocks}: 4 layers cannot be cut into {blocks} equal groups -> give one of 1, 2, 4" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "out").exists()


def test_a_folder_with_weights_is_not_written_over(tmp_path, capsys):
    base = tiny_llama(tmp_path / "base")
    assert main(["expand", str(base), str(base), "--blocks", "1"]) == 2
    assert f"luthier: expand: {base}: this is the folder of " in capsys.readouterr().err


def test_a_rule_of_the_config_that_does_not_fit_is_said(tmp_path):
    """deepseek: the first layer is dense and the others are not; after two blocks the second one would be none."""
    base = written("deepseek_v3", tmp_path / "base")
    with pytest.raises(ModelError, match="its config derives the kind of each layer from a rule"):
        expand(str(base), tmp_path / "out", 2)
    assert not (tmp_path / "out").exists()


def test_places_of_inserted_blocks():
    assert list(inserted_layers(40, 8)) == [4, 9, 14, 19, 24, 29, 34, 39]
    for wrong in (0, 7, 40):
        with pytest.raises(ModelError, match="use_llama_pro"):
            inserted_layers(40, wrong)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"finetuning_type": "full"}, "full trains everything"),
        ({"finetuning_type": "freeze", "freeze_trainable_layers": -2}, "must be above 0"),
        ({"finetuning_type": "lora", "freeze_trainable_layers": 0}, "must be above 0"),
        ({"finetuning_type": "oft", "freeze_trainable_layers": 0}, "must be above 0"),
    ],
)
def test_rules(keys, words):
    with pytest.raises(ConfigError, match=words):
        load_train({**BASE, "use_llama_pro": True, **keys})


def test_the_number_of_blocks_is_a_warning_for_lora_without_blocks():
    (warning,) = load_train({**BASE, "freeze_trainable_layers": 3}).warnings
    assert warning.key == "freeze_trainable_layers"
