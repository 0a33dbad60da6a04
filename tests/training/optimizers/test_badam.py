"""BAdam: each block steps as with AdamW alone, and nothing else has gradients or state."""

from typing import Any

import pytest
import torch

from luthier.config.load import load_train
from luthier.core.errors import ConfigError, InvalidInput
from luthier.core.log import set_up
from luthier.training.optimizers._badam import block_order
from tests.training.optimizers.test_loraplus import RUN
from tests.training.optimizers.worlds import arguments, assert_resumes, built, fill_gradients, tiny_model, weights


def learning(model: Any) -> set[str]:
    """The first names of what has gradients: `0`, `1` for layers, else the name of the weight."""
    names = [name for name, weight in model.named_parameters() if weight.requires_grad]
    return {name.split(".")[2] if ".layers." in name else name for name in names}


def test_a_schedule_reaches_the_optimizer_of_the_block(tmp_path):
    """The first step of Adam moves each weight by the rate, so a tenth of it moves a tenth as far."""
    moved = []
    for rate in (1e-2, 1e-3):
        model = tiny_model()
        before = weights(model)
        optimizer = built("badam", model, arguments(tmp_path), use_badam=True)
        for group in optimizer.param_groups:
            group["lr"] = rate
        fill_gradients(model, 0)
        optimizer.step()
        after = weights(model)
        moved.append(max(float((after[name] - before[name]).abs().max()) for name in after))
    assert moved == pytest.approx([1e-2, 1e-3], rel=1e-2)


def test_blocks_step_in_turn_each_with_fresh_moments(tmp_path):
    """Two steps for layer 0, two for layer 1, one for layer 0 again, against a new AdamW for each turn."""
    model, by_hand = tiny_model(), tiny_model()
    args = arguments(tmp_path, weight_decay=0.1)
    optimizer = built("badam", model, args, use_badam=True, badam_switch_interval=2)
    adamw: Any = None
    for step in range(5):
        block = step // 2 % 2
        assert learning(model) == {str(block)}
        if step % 2 == 0:
            of_block = [(n, w) for n, w in by_hand.named_parameters() if f"layers.{block}." in n]
            decay = [
                {
                    "params": [w for n, w in of_block if ("norm" in n) == is_norm],
                    "weight_decay": 0.0 if is_norm else 0.1,
                }
                for is_norm in (False, True)
            ]
            adamw = torch.optim.AdamW(decay, lr=1e-2)
        fill_gradients(by_hand, step)
        for name, weight in model.named_parameters():
            weight.grad = by_hand.get_parameter(name).grad.clone() if weight.requires_grad else None
        adamw.step()
        optimizer.step()
        num_with_state = len(optimizer.inner.state)
        assert num_with_state in (0, 9)  # a block has seven matrices and two norms; none right after a switch
    expected = weights(by_hand)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(model).items())


def test_orders():
    def first(count: int, *args: Any) -> list[int]:
        return [block_order(4, *args)(turn) for turn in range(count)]

    assert first(6, "ascending", None, 0) == [0, 1, 2, 3, 0, 1]
    assert first(6, "ascending", 2, 0) == [2, 3, 0, 1, 2, 3]
    assert first(6, "descending", None, 0) == [3, 2, 1, 0, 3, 2]
    assert first(3, "descending", 1, 0) == [1, 0, 3]
    assert first(3, "fixed", None, 0) == [0, 0, 0] and first(3, "fixed", 3, 0) == [3, 3, 3]
    rounds = first(8, "random", None, 7)
    assert sorted(rounds[:4]) == sorted(rounds[4:]) == [0, 1, 2, 3]
    assert rounds == first(8, "random", None, 7) and rounds != first(8, "random", None, 8)
    assert first(5, "random", 2, 7) == [2, *rounds[:4]]


@pytest.mark.parametrize("keys", [{"badam_switch_mode": "fixed"}, {"badam_switch_interval": -1}])
def test_a_block_that_stays_keeps_its_moments(tmp_path, keys):
    model = tiny_model()
    optimizer = built("badam", model, arguments(tmp_path), **{"use_badam": True, "badam_switch_interval": 1, **keys})
    for step in range(3):
        fill_gradients(model, step)
        optimizer.step()
    assert learning(model) == {"0"}
    assert {int(state["step"]) for state in optimizer.inner.state.values()} == {3}


def test_sixteen_bit_weights_are_trained_in_a_float32_copy(tmp_path):
    """Steps of 1e-4 of a weight of 1 are lost in bfloat16, and add up in the copy."""
    model = tiny_model(torch.bfloat16)
    weight = model.get_parameter("model.layers.0.input_layernorm.weight")
    args = arguments(tmp_path, learning_rate=1e-4)
    optimizer = built("badam", model, args, use_badam=True, badam_switch_interval=-1)
    for _ in range(40):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.allclose(weight.float(), torch.tensor(1 - 40e-4), atol=2e-3)


@pytest.mark.parametrize("mask_mode", ["adjacent", "scatter"])
def test_ratio_mode_moves_a_share_of_each_weight(tmp_path, mask_mode):
    model = tiny_model()
    keys = {"badam_mode": "ratio", "badam_update_ratio": 0.1, "badam_mask_mode": mask_mode, "badam_switch_interval": 2}
    optimizer = built("badam", model, arguments(tmp_path), use_badam=True, **keys)
    turns = []
    for step in range(4):
        before = weights(model)
        fill_gradients(model, step)
        optimizer.step()
        if step % 2 == 0:  # the first one of its moments, which moves each weight by the rate
            changes = torch.cat([(weight - before[name]).flatten() for name, weight in weights(model).items()])
            torch.testing.assert_close(changes[changes != 0].abs().mean(), torch.tensor(1e-2), rtol=1e-3, atol=0)
        turns.append(
            {name: (weight != before[name]).flatten().nonzero()[:, 0] for name, weight in weights(model).items()}
        )
    for name, moved in turns[0].items():
        size = before[name].numel()
        assert len(moved) == (0 if "embed" in name else size if size <= 100 else round(0.1 * size)), name
        assert torch.equal(moved, turns[1][name])
        if len(moved) and size > 100:
            assert not torch.equal(moved, turns[2][name])
            assert (int(moved[-1] - moved[0]) + 1 == len(moved)) == (mask_mode == "adjacent")
    numbers = sum(state["exp_avg"].numel() for state in optimizer.inner.state.values())
    assert numbers == 0  # a fresh share has no moments yet
    fill_gradients(model, 4)
    optimizer.step()
    numbers = sum(state["exp_avg"].numel() for state in optimizer.inner.state.values())
    assert numbers == sum(len(moved) for moved in turns[0].values())


def test_ratio_one_is_adamw_on_all_but_the_embeddings(tmp_path):
    model, plain = tiny_model(), tiny_model()
    keys = {"badam_mode": "ratio", "badam_update_ratio": 1.0, "badam_switch_interval": -1}
    optimizer = built("badam", model, arguments(tmp_path), use_badam=True, **keys)
    adamw = torch.optim.AdamW([w for n, w in plain.named_parameters() if "embed" not in n], lr=1e-2, weight_decay=0)
    for step in range(3):
        fill_gradients(plain, step)
        for name, weight in model.named_parameters():
            weight.grad = plain.get_parameter(name).grad.clone()
        optimizer.step(), adamw.step()
    expected = weights(plain)
    assert all(torch.equal(weight, expected[name]) for name, weight in weights(model).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "keys", [{"badam_switch_mode": "random"}, {"badam_mode": "ratio", "badam_mask_mode": "scatter"}], ids=str
)
def test_it_resumes_within_a_block(tmp_path, dtype, keys):
    assert_resumes("badam", tmp_path, dtype=dtype, use_badam=True, badam_switch_interval=3, **keys)


def test_a_missing_start_block_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match="badam_start_block: 2: this model has the blocks 0 to 1"):
        built("badam", tiny_model(), arguments(tmp_path), use_badam=True, badam_start_block=2)


def test_log_output(tmp_path, capsys):
    set_up()
    built("badam", tiny_model(), arguments(tmp_path), use_badam=True, badam_verbose=2, badam_start_block=1)
    said = capsys.readouterr().err
    assert "BAdam: training block 1" in said and "model.layers.1.mlp.up_proj.weight" in said


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"finetuning_type": "lora"}, "use_badam: true: is for training the weights of the model itself"),
        ({"use_galore": True}, "use_badam: true: another optimizer is switched on too"),
        ({"badam_switch_interval": 0}, "badam_switch_interval: 0: must be at least 1, or -1"),
        ({"badam_switch_interval": None}, "badam_switch_interval: null: must be at least 1, or -1"),
        ({"badam_update_ratio": 0}, "badam_update_ratio: 0: must be above 0 and up to 1"),
        ({"badam_start_block": -1}, "badam_start_block: -1: must be at least 0"),
    ],
)
def test_incompatible_keys_are_refused(keys, text):
    with pytest.raises(ConfigError) as caught:
        load_train({**RUN, "use_badam": True, "finetuning_type": "full", **keys})
    assert text in str(caught.value)


def test_processes_would_train_different_blocks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="use_badam: true: each process would train its own block"):
        load_train({**RUN, "use_badam": True, "finetuning_type": "full", "badam_mode": "ratio"})
