"""Which tokens a router chooses."""

import pytest
import torch

from luthier.model.kernels.routed_blocks import DepthRouter


def router_with(weight):
    router = DepthRouter(1, capacity=0.5)
    torch.nn.init.constant_(router.weight, weight)
    return router


def test_in_training_the_highest_scores_of_each_text_are_chosen():
    """Scores are 1 + x: of the first text, 3 tokens, ceil(1.5) = 2 are chosen, of the second, 2 tokens, 1."""
    hidden = torch.tensor([[3.0], [1.0], [2.0], [9.0], [10.0]])
    scores, places, counts = router_with(1.0).train()(hidden, [(0, 3), (3, 5)])
    assert scores.tolist() == [4.0, 2.0, 3.0, 10.0, 11.0]
    assert places.tolist() == [0, 2, 4] and counts == [2, 1]


def test_outside_training_a_token_is_compared_with_the_mean_threshold():
    """The threshold of the first batch is halfway between the last chosen score and the first that is not: 2.5."""
    router = router_with(1.0).train()
    router(torch.tensor([[3.0], [1.0], [0.0], [2.0]]), [(0, 4)])
    assert router.threshold.item() == pytest.approx(2.5)
    _, places, counts = router.eval()(torch.tensor([[1.0], [1.6], [7.0]]), [(0, 1), (1, 3)])
    assert places.tolist() == [1, 2] and counts == [0, 2]


def test_the_threshold_is_the_mean_over_batches_and_then_over_the_newest_hundred_or_so():
    router = router_with(1.0)
    router.observe(torch.tensor([4.0, 2.0]), 1)
    router.observe(torch.tensor([6.0, 4.0]), 1)
    assert router.threshold.item() == pytest.approx((3 + 5) / 2)
    router.num_seen.fill_(1000)
    router.observe(torch.tensor([15.0, 13.0]), 1)
    assert router.threshold.item() == pytest.approx(0.99 * 4 + 0.01 * 14)


def test_a_batch_whose_tokens_all_passed_puts_the_threshold_below_them():
    router = router_with(1.0)
    router.observe(torch.tensor([2.0, 0.5]), 2)
    assert router.threshold.item() == pytest.approx(-0.5)
    _, places, _ = router.eval()(torch.tensor([[-1.5], [-1.4]]), [(0, 2)])
    assert places.tolist() == [1], "a score at the threshold does not pass"


def test_an_untrained_router_lets_every_token_pass():
    router = DepthRouter(64, capacity=0.125).eval()
    _, places, counts = router(torch.randn(20, 64), [(0, 20)])
    assert places.tolist() == list(range(20)) and counts == [20]
