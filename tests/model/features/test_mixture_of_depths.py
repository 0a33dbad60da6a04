"""Mixture of depths: what passes, what it is multiplied by, and that nothing looks ahead once a model answers."""

import copy
import math
from itertools import pairwise

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from luthier.core.errors import ModelError
from luthier.model.attention import isolate_samples, isolates_samples
from luthier.model.checkpointing import enable_checkpointing
from luthier.model.classes import is_routed, require_dense
from luthier.model.features.mixture_of_depths import CAPACITY, convert
from luthier.model.files.sources import ModelSource
from luthier.model.llama_pro import expand_blocks
from luthier.model.loading.config import load_config
from luthier.model.loading.load import load_model
from tests.tiny import TINY_LLAMA, byte_tokenizer

BOUNDS = [0, 5, 21, 33]


def build(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**{**TINY_LLAMA, "num_hidden_layers": 4, "attn_implementation": "sdpa", **changes})
    return AutoModelForCausalLM.from_config(config).eval()


def converted(capacity: float = CAPACITY, **changes) -> LlamaForCausalLM:
    model = build(**changes)
    convert(model, capacity)
    return model


def routers(model):
    return [layer.depth_router for layer in model.model.layers if hasattr(layer, "depth_router")]


def one_row() -> dict[str, torch.Tensor]:
    """Three texts of 5, 16 and 12 tokens behind one another."""
    bounds = torch.tensor(BOUNDS, dtype=torch.int32)
    positions = torch.cat([torch.arange(end - start) for start, end in pairwise(BOUNDS)])
    return {
        "input_ids": torch.randint(0, 250, (1, 33), generator=torch.Generator().manual_seed(1)),
        "position_ids": positions[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": 16,
        "max_length_k": 16,
    }


def padded(row: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    texts = [row["input_ids"][0, start:end] for start, end in pairwise(BOUNDS)]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True, padding_value=256)
    return {"input_ids": ids, "attention_mask": (ids != 256).long()}


def watch(model) -> list[list[int]]:
    """For every pass of a routed block, how many tokens it computed, by its attention."""
    seen: list[list[int]] = []
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.q_proj.register_forward_hook(
            lambda _, args, out, index=index: seen.append([index, *args[0].shape[:2]])
        )
    return seen


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("layout", [lambda row: row, padded, lambda row: {"input_ids": row["input_ids"]}])
def test_with_all_tokens_and_weight_one_it_is_the_dense_model(layout, trains):
    dense, model = build(), converted(capacity=1.0)
    for router in routers(model):
        torch.nn.init.zeros_(router.weight)
    isolate_samples(dense)
    batch = layout(one_row())
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    with torch.no_grad():
        expected = dense(**batch, use_cache=False).logits[kept]
        torch.testing.assert_close(model.train(trains)(**batch).logits[kept], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_16_bits_is_converted(dtype):
    """Its rounding is no difference between rows behind one another and padded ones."""
    model = build(hidden_size=512, intermediate_size=1024).to(dtype)
    convert(model)
    assert len(routers(model)) == 2


def test_an_eighth_of_each_text_passes_in_every_second_block():
    model = converted().train()
    seen = watch(model)
    model(**one_row())
    # ceil(5 / 8) + ceil(16 / 8) + ceil(12 / 8) = 1 + 2 + 2
    assert seen == [[0, 1, 33], [1, 1, 5], [2, 1, 33], [3, 1, 5]]


def test_the_block_is_the_equation():
    """One text, one routed block: the two best of 16 get x + r f(X), X being these two; the others stay x."""
    model = converted(num_hidden_layers=2).train()
    layer, ids = model.model.layers[1], one_row()["input_ids"][:, :16]
    given: list[torch.Tensor] = []
    results: list[torch.Tensor] = []
    model.model.layers[0].register_forward_hook(lambda _, args, out: given.append(out))
    model.model.norm.register_forward_hook(lambda _, args, out: results.append(args[0]))
    with torch.no_grad():
        layer.depth_router.weight.normal_(generator=torch.Generator().manual_seed(2))
        model(input_ids=ids)
        x = given[0][0]
        scores = 1 + x @ layer.depth_router.weight
        best = sorted(scores.topk(2).indices.tolist())
        cos, sin = model.model.rotary_emb(x[None], torch.tensor([best]))
        plain = type(build().model.layers[0])(model.config, 1)
        plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "depth_router" not in k})
        computed = plain(x[None, best], attention_mask=None, position_embeddings=(cos, sin))[0]
        expected = x.clone()
        expected[best] += scores[best, None] * (computed - x[best])
    torch.testing.assert_close(results[0][0], expected, atol=1e-5, rtol=1e-4)


def test_rows_behind_one_another_and_padded_rows_are_the_same():
    model, row = converted().train(), one_row()
    with torch.no_grad():
        together = model(**row).logits[0]
        batch = padded(row)
        apart = model(**batch).logits[batch["attention_mask"].bool()]
        first = model(input_ids=row["input_ids"][:, :5]).logits[0]
    torch.testing.assert_close(together, apart, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together[:5], first, atol=1e-5, rtol=1e-4)
    assert isolates_samples(model) is None


def trained_a_little(model):
    """Thresholds from a few batches."""
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(**one_row())
    return model.eval()


def test_outside_training_a_later_token_changes_nothing_before_it():
    model, ids = trained_a_little(converted(capacity=0.5)), one_row()["input_ids"]
    seen = watch(model)
    with torch.no_grad():
        whole = model(input_ids=ids).logits[0]
        for end in (1, 9, 20):
            torch.testing.assert_close(model(input_ids=ids[:, :end]).logits[0], whole[:end], atol=1e-5, rtol=1e-4)
        model.train()  # the best of a text are known at its end only
        assert not torch.allclose(model(input_ids=ids[:, :20]).logits[0], model(input_ids=ids).logits[0, :20])
    assert 0 < seen[1][2] < 33, "some pass, and not all"


def test_the_threshold_lets_the_share_through_that_was_trained():
    model = trained_a_little(converted(capacity=0.25))
    seen = watch(model)
    with torch.no_grad():
        model(**one_row())
    # trained: ceil(5 / 4) + 16 / 4 + 12 / 4 = 9; one number for all texts, and the mean of equal batches
    assert [tokens for index, _, tokens in seen if index in (1, 3)] == [9, 9]
    assert [int(router.num_seen) for router in routers(model)] == [3, 3]


def test_until_it_is_trained_every_token_passes():
    model = converted()
    seen = watch(model)
    model(**one_row())
    assert [tokens for _, _, tokens in seen] == [33] * 4


def test_no_token_may_pass_at_all():
    model = converted(num_hidden_layers=2)
    routers(model)[0].threshold.fill_(1e9)
    seen = watch(model)
    model(input_ids=torch.arange(9)[None])
    assert [index for index, *_ in seen] == [0]


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoints_change_no_gradient_and_the_router_looks_once(use_reentrant):
    plain, kept = converted().train(), converted().train()
    enable_checkpointing(kept, use_reentrant=use_reentrant)
    for model in (plain, kept):
        model(**one_row()).logits.square().mean().backward()
    for (name, weight), other in zip(plain.named_parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(weight.grad, other.grad, msg=name)
    assert all(router.weight.grad.abs().sum() > 0 for router in routers(kept))
    assert [int(router.num_seen) for router in routers(kept)] == [1, 1]


def test_it_learns():
    model, row = converted().train(), one_row()
    labels = row["input_ids"][0, 1:]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.cross_entropy(model(**row).logits[0, :-1], labels)
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]


def save(model, folder):
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_saved_is_loaded_again(tmp_path, dtype, said):
    model = trained_a_little(converted())
    again = load_model(ModelSource(save(model, tmp_path)), dtype=dtype)
    assert is_routed(again.config) and not said
    assert all(router.threshold.dtype == torch.float32 for router in routers(again))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name].float(), value.float(), atol=1e-2, rtol=1e-2, msg=name)
    if dtype == torch.float32:
        ids = one_row()["input_ids"]
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.thorough
def test_other_programs_say_that_they_do_not_know_it(tmp_path):
    save(converted(), tmp_path)
    import subprocess
    import sys

    code = f"import transformers; transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "model type `luthier_mixture_of_depths` but Transformers does not recognize" in done.stderr


def test_a_missing_router_is_an_error(tmp_path):
    from safetensors.torch import load_file, save_file

    name = save(converted(), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.3.depth_router.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 weights of the model .* \(model.layers.3.depth_router.weight"):
        load_model(ModelSource(name), dtype=torch.float32)


def test_from_scratch_it_starts_with_fresh_routers(tmp_path):
    model = load_model(
        ModelSource(save(trained_a_little(converted()), tmp_path)), dtype=torch.float32, train_from_scratch=True
    )
    assert [int(router.num_seen) for router in routers(model)] == [0, 0]
    assert model(**one_row()).logits.isfinite().all()


def test_generation_keeps_no_cache(tmp_path):
    model, ids = trained_a_little(converted(capacity=0.5)), one_row()["input_ids"][:, :9]
    with torch.no_grad():
        words = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
        for end in range(9, 14):
            assert int(model(input_ids=words[:, :end]).logits[0, -1].argmax()) == int(words[0, end])
        padded_ids = torch.cat([torch.full((1, 3), 256), ids], dim=1)
        real = (padded_ids != 256).long()
        beside = model.generate(padded_ids, attention_mask=real, max_new_tokens=5, do_sample=False, eos_token_id=None)
        assert torch.equal(beside[:, 3:], words)
        with pytest.raises(ModelError, match="generate with use_cache=False"):
            model.generate(ids, max_new_tokens=5, use_cache=True, eos_token_id=None)


@pytest.mark.parametrize("name", ["llama", "qwen3", "granite", "olmo2", "mixtral", "gpt2", "glm4", "phi3", "cohere"])
def test_blocks_are_found_by_structure(name):
    sizes = {"mixtral": {"num_local_experts": 2}, "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4}}
    shape = {**TINY_LLAMA, "head_dim": 16, **sizes.get(name, {})}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **shape)).eval()
    convert(model)
    twin = copy.deepcopy(model).train()
    loss = twin(**one_row()).logits.square().mean()
    loss.backward()
    assert all(weight.grad is not None for key, weight in twin.named_parameters() if "depth_router" in key)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("bloom", {"n_layer": 2, "n_head": 4}, "attends across texts"),
        ("gemma2", {"head_dim": 16}, "sliding windows"),
        ("mamba", {"state_size": 4}, "attends across texts"),
        ("llama", {"num_hidden_layers": 1}, "no second block"),
    ],
)
def test_models_that_cannot_be_converted_say_so(name, changes, words):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**TINY_LLAMA, **changes}))
    before = set(model.state_dict())
    with pytest.raises(ModelError, match=rf"mixture_of_depths: .*{words}.* -> leave mixture_of_depths out"):
        convert(model)
    assert set(model.state_dict()) == before


def test_twice_is_an_error_and_so_is_what_has_no_place_for_routers(tmp_path):
    from luthier.model.files.gguf.writer import check_writable
    from luthier.model.quantization._gptq import group_size_for

    model = converted()
    with pytest.raises(ModelError, match="is a mixture of depths already -> set mixture_of_depths: load"):
        convert(model)
    for what in (
        lambda: check_writable(model.config),
        lambda: expand_blocks(model, 1),
        lambda: group_size_for(model),
    ):
        with pytest.raises(ModelError, match="has routers, for which there is no place"):
            what()
    require_dense(build().config, "anything")


def test_the_config_says_what_it_is(tmp_path):
    config = load_config(ModelSource(save(converted(), tmp_path)))
    assert config.model_type == "llama" and config.mixture_of_depths == {"model_type": "llama", "capacity": CAPACITY}
    assert math.ceil(CAPACITY * 16) == 2
