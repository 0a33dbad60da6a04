"""DFT and EAFT: token weights from the model's own prediction, without a gradient through them."""

import math

import pytest
import torch

from luthier.config.load import load_train
from luthier.core.errors import ConfigError
from luthier.model.heads.output_head import OutputHead, summed_loss
from luthier.model.kernels import chunked_head
from luthier.model.kernels.chunked_head import linear_cross_entropy
from luthier.stages._token_weights import by_entropy, by_probability, chosen_weigh

RUN = {"model_name_or_path": "x/y", "dataset": "d", "output_dir": "o"}


def one_token(probabilities: list[float], target: int) -> tuple[torch.Tensor, ...]:
    logits = torch.tensor([probabilities], dtype=torch.float64).log()
    return logits, logits.logsumexp(-1, keepdim=True), torch.tensor([target])


def test_dft_by_hand():
    """p = (1/4, 3/4): the weight of target 0 is 1/4, of target 1 is 3/4."""
    assert by_probability(*one_token([0.25, 0.75], 0)).tolist() == pytest.approx([0.25])
    assert by_probability(*one_token([0.25, 0.75], 1)).tolist() == pytest.approx([0.75])


def test_eaft_by_hand():
    """Even over 4 tokens: H = ln 4, so w = (ln 4 / 3)^alpha. A token that is certain counts nothing."""
    even = one_token([0.25] * 4, 2)
    assert by_entropy(*even, alpha=1.0).tolist() == pytest.approx([math.log(4) / 3])
    assert by_entropy(*even, alpha=2.0).tolist() == pytest.approx([(math.log(4) / 3) ** 2])
    assert by_entropy(*one_token([1.0, 0.0], 0), alpha=1.0).tolist() == pytest.approx([0.0])


def test_eaft_looks_at_the_twenty_likeliest_tokens():
    """20 tokens of 1/40 each and a tail of 1000 below them: the entropy among the 20 is ln 20."""
    tail = [0.5 / 1000] * 1000
    assert by_entropy(*one_token([1 / 40] * 20 + tail, 0), alpha=1.0).tolist() == pytest.approx([math.log(20) / 3])


@pytest.mark.parametrize("chunk_elements", [1, 2**26])
@pytest.mark.parametrize("name", ["dft", "eaft"])
@pytest.mark.parametrize("with_weights", [False, True])
def test_value_and_gradients_equal_the_formula(monkeypatch, chunk_elements, name, with_weights):
    """Through the chunked head and through plain logits, against autograd on the written-out formula."""
    for limit in ("CHUNK_ELEMENTS", "SMALL_CHUNK_ELEMENTS"):
        monkeypatch.setattr(chunked_head, limit, chunk_elements)
    torch.manual_seed(0)
    targets, weights = torch.randint(0, 31, (150,)), torch.rand(150).double() if with_weights else None
    hidden, weight = torch.randn(150, 8).double(), torch.randn(31, 8).double()
    ours, theirs = [[t.clone().requires_grad_() for t in (hidden, weight)] for _ in range(2)]
    weigh = chosen_weigh(use_dft_loss=name == "dft", use_eaft_loss=name == "eaft", eaft_alpha=0.7)
    loss, _ = linear_cross_entropy(ours[0], ours[1], None, targets, weights=weights, weigh=weigh)
    logps = (theirs[0] @ theirs[1].T).log_softmax(-1)
    own = logps.gather(-1, targets[:, None]).squeeze(-1)
    top = logps.detach().topk(20, dim=-1).values.exp()
    top = top / top.sum(-1, keepdim=True)
    counted = own.detach().exp() if name == "dft" else (-(top * top.log()).sum(-1) / 3) ** 0.7
    expected = -(own * counted * (1 if weights is None else weights)).sum()
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


def test_a_head_that_is_more_than_linear_gives_the_same(llama_folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32).eval()
    inputs, positions, targets = {"input_ids": torch.arange(1, 9)[None]}, torch.tensor([2, 5]), torch.tensor([7, 9])
    found = [
        summed_loss(model, head, inputs, positions, targets, weights=torch.tensor([0.5, 1.0]), weigh=by_probability)[0]
        for head in (OutputHead(model.lm_head, True), OutputHead(None, True))
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"use_dft_loss": True, "use_eaft_loss": True}, "use_dft_loss: true: is one loss, and use_eaft_loss another"),
        ({"use_eaft_loss": True, "eaft_alpha": -1}, "eaft_alpha: -1: must be at least 0"),
    ],
)
def test_rules(keys, message):
    with pytest.raises(ConfigError, match=message):
        load_train({**RUN, **keys})


def test_an_exponent_without_its_loss_is_a_warning():
    (warning,) = [w for w in load_train({**RUN, "eaft_alpha": 2}).warnings if w.key == "eaft_alpha"]
    assert warning.reason == "is read together with use_eaft_loss only"
