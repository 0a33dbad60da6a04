"""The balance loss of experts: what the paper says, what transformers computes, with a gradient in every setting."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from luthier.config.load import load_train
from luthier.core.errors import ModelError
from luthier.data.collate import concatenate_rows, pad_rows
from luthier.model.attention import isolate_samples
from luthier.model.backends import load_for_training
from luthier.model.features.router_balance import set_router_loss
from luthier.model.files.sources import ModelSource
from luthier.model.heads.output_head import inspect_head
from luthier.model.heads.router_loss import listen_to_router
from luthier.model.tokenizer import fit_tokenizer, load_tokenizer
from luthier.model.types import Models
from luthier.stages._causal import next_token_loss
from tests.tiny import TINY_LLAMA, save_tiny

EXPERTS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
}
ROWS = [{"input_ids": list(range(3, 3 + n)), "labels": list(range(3, 3 + n))} for n in (9, 14)]
COEFFICIENT = 0.5


def build(name: str):
    torch.manual_seed(2)
    shape = {**TINY_LLAMA, "initializer_range": 0.2, **EXPERTS[name]}
    config = AutoConfig.for_model(name, **shape)
    set_router_loss(config, COEFFICIENT)
    return AutoModelForCausalLM.from_config(config).train()


def gradient(model):
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


@pytest.mark.parametrize("name", EXPERTS)
def test_one_batch_gives_the_loss_and_the_gradient_of_transformers(name):
    model = build(name)
    batch = pad_rows(ROWS, 256)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    output = model(
        input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), output_router_logits=True
    )
    output.loss.backward()
    expected = gradient(model)
    model.zero_grad()
    found = next_token_loss(Models(model, inspect_head(model, COEFFICIENT)), batch)
    units = len(batch["targets"])
    (found.total / units).backward()
    torch.testing.assert_close(found.total / units, output.loss)
    torch.testing.assert_close(gradient(model), expected, atol=1e-6, rtol=1e-4)
    total, count = found.metrics["router_loss"]
    torch.testing.assert_close(total / count, output.aux_loss)


def test_the_loss_is_that_of_the_paper():
    """N sum_i f_i P_i, with one expert per token: f counts tokens, P averages probabilities; one layer."""
    torch.manual_seed(2)
    shape = TINY_LLAMA | EXPERTS["mixtral"] | {"num_hidden_layers": 1, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **shape)).train()
    seen = []
    (gate,) = [module for name, module in model.named_modules() if name.endswith("gate")]
    gate.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].reshape(-1, 64) @ module.weight.T))
    router = listen_to_router(model, 1.0)
    seen.clear()
    model(input_ids=torch.arange(3, 40)[None])
    probabilities = seen[0].softmax(-1)
    shares = torch.nn.functional.one_hot(probabilities.argmax(-1), 4).float().mean(0)
    torch.testing.assert_close(router.take(), 4 * (shares * probabilities.mean(0)).sum())
    assert router.take() is None


def test_samples_in_one_row_are_balanced_as_in_a_padded_batch():
    model = build("qwen3_moe")
    models = Models(model, inspect_head(model, COEFFICIENT))
    padded = next_token_loss(models, pad_rows(ROWS, 256)).total
    isolate_samples(model)
    torch.testing.assert_close(next_token_loss(models, concatenate_rows(ROWS)).total, padded)
    model.eval()
    assert "router_loss" not in next_token_loss(models, concatenate_rows(ROWS)).metrics


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_recomputed_blocks_give_the_routers_the_same_gradient(tmp_path, kind):
    config = AutoConfig.for_model("qwen3_moe", **{**TINY_LLAMA, **EXPERTS["qwen3_moe"]})
    folder = str(save_tiny(tmp_path / "model", config))
    keys = {"model_name_or_path": folder, "dataset": "x", "output_dir": str(tmp_path / "out"), "finetuning_type": kind}
    keys |= {"moe_aux_loss_coef": COEFFICIENT}
    gradients = []
    for more in ({"disable_gradient_checkpointing": True}, {}):
        fitted = fit_tokenizer(load_tokenizer(ModelSource(folder)))
        model = load_for_training(load_train(keys | more), fitted).model
        assert model.config.router_aux_loss_coef == COEFFICIENT
        router = listen_to_router(model, COEFFICIENT)
        model(input_ids=torch.arange(3, 40, device=model.device)[None])
        router.take().backward()
        gradients.append(gradient(model))
    torch.testing.assert_close(gradients[1], gradients[0])
    assert gradients[0].abs().max() > 0


def test_models_without_a_balance_loss_say_so(llama_folder):
    with pytest.raises(ModelError, match="LlamaForCausalLM gives no router balance loss"):
        listen_to_router(AutoModelForCausalLM.from_pretrained(llama_folder), 0.1)
