"""What the tests of optimizers share: a tiny model with gradients, and the keys that an optimizer reads."""

import copy
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Seq2SeqTrainingArguments

from luthier.core.kinds import OPTIMIZERS
from tests.tiny import TINY_LLAMA


def tiny_model(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**TINY_LLAMA, **changes})).to(dtype)


def arguments(folder: Any, **keys: Any) -> Seq2SeqTrainingArguments:
    keys = {"learning_rate": 1e-2, "optim": "adamw_torch", **keys}
    return Seq2SeqTrainingArguments(str(folder), use_cpu=True, report_to="none", **keys)


def built(name: str, model: Any, args: Any, **keys: Any) -> torch.optim.Optimizer:
    optimizer = OPTIMIZERS.get(name)
    return optimizer.build(model, args, optimizer.config(**keys))


def fill_gradients(model: Any, seed: int) -> None:
    """The same gradients for every model of the same shape."""
    generator = torch.Generator().manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.randn(weight.shape, generator=generator).to(weight.dtype)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def resumed(optimizer: torch.optim.Optimizer, fresh: torch.optim.Optimizer, file: Any) -> None:
    """The state of one put into the other by way of a file, as a checkpoint does."""
    torch.save(optimizer.state_dict(), file)
    fresh.load_state_dict(torch.load(file, weights_only=True))


def assert_resumes(
    name: str, folder: Any, *, dtype: torch.dtype, steps: int = 8, args: Any = None, **keys: Any
) -> None:
    """Half of the steps, a checkpoint, and the other half in a new optimizer equal all steps in one, bit for bit."""
    args = args or arguments(folder, weight_decay=0.1)
    whole = tiny_model(dtype)
    optimizer = built(name, whole, args, **keys)
    halfway: Any = None
    for step in range(steps):
        if step == steps // 2:
            halfway = copy.deepcopy(whole.state_dict())
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        fill_gradients(whole, step)
        optimizer.step()
    second = tiny_model(dtype)
    second.load_state_dict(halfway)
    fresh = built(name, second, args, **keys)
    fresh.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    for step in range(steps // 2, steps):
        fill_gradients(second, step)
        fresh.step()
    expected = weights(whole)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(second).items())
