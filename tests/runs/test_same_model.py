"""The model that a training run ends with is the model that everything else loads, bit for bit in float32.

Loaded again: to be trained further, by plain peft or plain transformers, to be evaluated, to chat, exported. What keeps
the adapter beside the weights gives the same bits. Chat and export merge it, which rounds each weight once: they are
equal to each other bit for bit, and to the trained model up to that rounding. So is an adapter of PiSSA, which is saved
as one of LoRA on the weights as they were. The kernels of training round differently, so the numbers here are computed
without them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import luthier
from luthier.config.load import load_train
from luthier.core.kinds import STAGES
from luthier.core.machine import detect
from luthier.model.backends import load_for_training
from luthier.model.compat.bitsandbytes_cpu import prevent_repacking
from luthier.training.trainer import StageTrainer
from luthier.workflow.text import load_text_side
from luthier.workflow.training import load_policy
from tests.matrix import representatives
from tests.small_world import small_world

WAYS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "pissa": {"pissa_init": True, "pissa_iter": -1},
    "oft": {"finetuning_type": "oft", "oft_block_size": 16},
    "lora pro": {"use_llama_pro": True, "freeze_trainable_layers": 1},
    "freeze": {"finetuning_type": "freeze", "freeze_trainable_layers": 1},
    "freeze pro": {"finetuning_type": "freeze", "use_llama_pro": True, "freeze_trainable_layers": 1},
    "full": {"finetuning_type": "full"},
}
TOKENS = {"add_special_tokens": "<note>,</note>"}
ROWS: dict[str, dict[str, Any]] = {
    "nothing new": {},
    "a stop word in a spare row": {"template": "llama3"},
    "tokens that add rows": TOKENS,
    "tokens, another part saved": {**TOKENS, "additional_target": "norm"},
    "a stop word, another part saved": {"template": "llama3", "additional_target": "norm"},
    "tokens, the embedding saved": {**TOKENS, "additional_target": "embed_tokens"},
    "a stop word, the head saved": {"template": "llama3", "additional_target": "lm_head"},
    "the embedding saved": {"additional_target": "embed_tokens"},
    "a continued adapter": {"is_continued": True},
    "tokens for a continued adapter": {**TOKENS, "is_continued": True},
    "a stop word for a continued adapter": {"template": "llama3", "is_continued": True},
    "both, one after the other": {**TOKENS, "is_continued": "llama3"},
    "an adapter on the embedding": {"lora_target": "q_proj,embed_tokens"},
    "an adapter on the head": {"lora_target": "q_proj,lm_head"},
    "a quantized base": {"quantization_bit": 4},
    "a stop word, a quantized base": {"template": "llama3", "quantization_bit": 4},
    "a stop word for an adapter on a quantized base": {
        "template": "llama3",
        "quantization_bit": 4,
        "is_continued": True,
    },
    "scores": {"stage": "rm", "dataset": "pairs"},
    "scores, a stop word": {"stage": "rm", "dataset": "pairs", "template": "llama3"},
    "scores, tokens that add rows": {"stage": "rm", "dataset": "pairs", **TOKENS},
}
OF_A_NEW_ADAPTER = (
    "additional_target",
    "lora_target",
    "use_llama_pro",
    "freeze_trainable_layers",
    "use_dora",
    "use_rslora",
    "pissa_init",
    "pissa_iter",
    "oft_block_size",
)
OF_ADAPTERS = ("additional_target", "is_continued", "quantization_bit")


def is_possible(way: str, rows: str, tied: bool) -> bool:
    keys, own = ROWS[rows], WAYS[way]
    if own.get("finetuning_type") in ("full", "freeze"):
        return not set(keys) & {*OF_ADAPTERS, "lora_target"}
    target = keys.get("lora_target", "")
    if target and "pro" in way:
        return False  # the inserted blocks have no embedding
    if way == "dora" and "lm_head" in target and tied:
        return False  # refused: the row of the padding token is zero
    if way == "pissa" and "quantization_bit" in keys:
        return False  # refused: there is no plain matrix to take a part out of
    return way not in ("pissa", "oft") or "embed_tokens" not in target  # they change linear layers


CASES = [(way, rows, tied) for rows in ROWS for way in WAYS for tied in (False, True) if is_possible(way, rows, tied)]
SOME = (
    ("lora", "a stop word in a spare row", False),
    ("lora", "a stop word in a spare row", True),
    ("dora", "tokens that add rows", True),
    ("oft", "a stop word in a spare row", True),
    ("pissa", "a stop word in a spare row", False),
    ("freeze", "a stop word in a spare row", True),
    ("full", "tokens that add rows", False),
    ("lora pro", "tokens, another part saved", False),
    ("lora", "both, one after the other", True),
    ("oft", "tokens for a continued adapter", False),
    ("lora", "an adapter on the embedding", True),
    ("oft", "an adapter on the head", True),
    ("oft", "the embedding saved", True),
    ("lora", "a stop word, a quantized base", False),
    ("lora", "scores, a stop word", False),
)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[tuple[bool, int], dict[str, Any]]:
    """By whether the model is tied, and the number of its rows: 261 for every token, and spare ones."""
    found = {}
    for tied in (False, True):
        for rows in (261, 320):
            folder = tmp_path_factory.mktemp(f"world-{tied}-{rows}")
            found[tied, rows] = {
                **small_world(folder, tie_word_embeddings=tied, vocab_size=rows),
                "infer_dtype": "float32",
                "finetuning_type": "lora",
                "max_steps": 2,
                "learning_rate": 5e-3,
                "lr_scheduler_type": "constant",
            }
    return found


@pytest.fixture
def trained(monkeypatch) -> Iterator[list[Any]]:
    """The policies of the runs, the last one last."""
    seen, train = [], StageTrainer.train

    def observed(trainer: StageTrainer, *args: Any, **kwargs: Any) -> Any:
        seen.append(trainer.policy)
        return train(trainer, *args, **kwargs)

    monkeypatch.setattr(StageTrainer, "train", observed)
    yield seen


@pytest.mark.parametrize(
    ("way", "rows", "tied"),
    representatives(CASES, *SOME),
    ids=[f"{way}, {rows}{', tied' * tied}" for way, rows, tied in CASES],
)
def test_every_loader_loads_the_model_that_was_trained(worlds, trained, tmp_path, way, rows, tied):
    keys = {**WAYS[way], **ROWS[rows]}
    if "quantization_bit" in keys:
        pytest.importorskip("bitsandbytes")
    before = keys.pop("is_continued", None)
    world = {**worlds[tied, 261 if "add_special_tokens" in keys and before != "llama3" else 320], **keys}
    if before:
        first = {**world, "output_dir": str(tmp_path / "first")}
        first.pop("add_special_tokens", None)
        luthier.train({**first, "template": before if before == "llama3" else "chatml"})
        world["adapter_name_or_path"] = str(tmp_path / "first")
    out = tmp_path / "out"
    luthier.train({**world, "output_dir": str(out)})
    policy = trained[-1]
    expected = numbers(policy)
    rounding = 1e-5 if way == "pissa" else 0.0
    is_adapter = isinstance(policy, peft.PeftModel)
    again = {name: value for name, value in world.items() if name not in (*TOKENS, *OF_A_NEW_ADAPTER)}
    if is_adapter:
        again["adapter_name_or_path"] = str(out)
    else:
        again["model_name_or_path"] = str(out)

    further = {**again, "output_dir": str(tmp_path / "further")}
    assert_same(numbers(trained_further(further)), expected, rounding)
    assert_same(numbers(by_other_libraries(world, out, is_adapter)), expected, rounding)
    alone = {**further, "do_train": False, "do_eval": True, "eval_dataset": world["dataset"]}
    alone.pop("dataset")
    assert_same(numbers(evaluated(alone)), expected, rounding)
    names = (
        "model_name_or_path",
        "adapter_name_or_path",
        "template",
        "finetuning_type",
        "quantization_bit",
        "infer_dtype",
    )
    answering = {name: value for name, value in again.items() if name in names}
    answers = []
    if world["stage"] != "rm":
        session: Any = luthier.chat(answering)
        answers.append(numbers(session.model.model))
    if "quantization_bit" not in world:
        folder = luthier.export({**answering, "export_dir": str(tmp_path / "export")})
        answers.append(numbers(by_other_libraries(world, folder, is_adapter=False)))
    is_merged = is_adapter and "quantization_bit" not in world
    for found in answers:
        assert_same(found, expected, 1e-5 if is_merged else 0.0)
        assert_same(found, answers[0], 0.0)


def trained_further(keys: dict[str, Any]) -> Any:
    run = load_train(keys)
    text = load_text_side(run)
    return load_for_training(run, text.fitted, source=text.source, scores=keys["stage"] == "rm").model


def evaluated(keys: dict[str, Any]) -> Any:
    run = load_train(keys)
    return load_policy(run, STAGES.get(run.stage), load_text_side(run), detect(), Path(keys["output_dir"])).model


def by_other_libraries(world: dict[str, Any], folder: Path, is_adapter: bool) -> Any:
    """As their users do: the base, as many rows as the adapter has, and the adapter."""
    from peft.utils.save_and_load import load_peft_weights

    options: dict[str, Any] = {"dtype": torch.float32}
    if world["stage"] == "rm":
        options["num_labels"] = 1
    if "quantization_bit" in world:
        from transformers import BitsAndBytesConfig

        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    kind = AutoModelForSequenceClassification if world["stage"] == "rm" else AutoModelForCausalLM
    model: Any = kind.from_pretrained(world["model_name_or_path"] if is_adapter else folder, **options)
    prevent_repacking(model)  # a CPU with AVX-512 would compute in bfloat16
    if not is_adapter:
        return model
    saved = load_peft_weights(str(folder), device="cpu")
    whole = [len(weight) for name, weight in saved.items() if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
    if whole and whole[0] > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(whole[0], mean_resizing=False)
    return peft.PeftModel.from_pretrained(model, str(folder))


@torch.no_grad()
def numbers(model: Any) -> torch.Tensor:
    """Logits or scores of a text with every token that the tokenizer may have."""
    model.eval()
    model.config.pad_token_id = 256
    ids = torch.cat([torch.arange(3, 60), torch.arange(257, 264)])[None]
    ids = ids.clamp(max=len(model.get_input_embeddings().weight) - 1).to(model.device)
    with without_kernels(model):
        output: Any = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logits: torch.Tensor = output.logits.cpu()
    assert logits.dtype == torch.float32
    return logits


@contextmanager
def without_kernels(model: torch.nn.Module) -> Iterator[None]:
    forwards = {module: vars(module)["forward"] for module in model.modules() if "forward" in vars(module)}
    kernels = {module: forward for module, forward in forwards.items() if is_kernel(forward)}
    for module in kernels:
        del module.forward
    yield
    for module, forward in kernels.items():
        module.forward = forward


def is_kernel(forward: Any) -> bool:
    function = forward.func if isinstance(forward, partial) else forward
    return function.__module__.startswith("luthier.model.kernels.")


def assert_same(found: torch.Tensor, expected: torch.Tensor, rounding: float) -> None:
    if rounding:
        torch.testing.assert_close(found, expected, atol=rounding, rtol=0)
    else:
        assert torch.equal(found, expected), (found - expected).abs().max()
