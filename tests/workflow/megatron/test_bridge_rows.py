"""The order in which Megatron-Bridge gets rows, and what a batch holds."""

import numpy as np

from luthier.workflow.megatron.bridge_rows import EvaluationRows, TrainingRows, bridge_batch

ROWS = [{"input_ids": np.array([number, 9]), "labels": np.array([-100, 9])} for number in range(4)]


def numbers(rows, among) -> list[int]:
    return [int(rows[place]["input_ids"][0]) for place in among]


def test_epochs_follow_one_another():
    rows = TrainingRows(ROWS, 10, None, pad_token_id=0, block=4)
    assert len(rows) == 10 and numbers(rows, range(10)) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


def test_each_epoch_has_an_order_of_its_own_and_each_row_once():
    rows = TrainingRows(ROWS * 8, 96, 7, pad_token_id=0, block=4)
    first, second, _ = orders = [numbers(rows, range(epoch * 32, epoch * 32 + 32)) for epoch in range(3)]
    assert first != second and all(sorted(order) == sorted(orders[0]) for order in orders)
    again = TrainingRows(ROWS * 8, 96, 7, pad_token_id=0, block=4)
    assert numbers(again, range(40, 96)) == numbers(rows, range(40, 96)), "a resumed run goes on in the same order"


def test_an_evaluation_is_filled_up_with_rows_that_do_not_count():
    rows = EvaluationRows(ROWS, per_evaluation=6, length=12, pad_token_id=0, block=4)
    assert len(rows) == 12 and numbers(rows, range(12)) == [0, 1, 2, 3, 0, 0] * 2
    counted = [sum(label != -100 for label in rows[place]["labels"]) for place in range(12)]
    assert counted == [1, 1, 1, 1, 0, 0] * 2


def test_a_batch_is_shifted_and_says_what_counts():
    rows = [
        {"input_ids": np.array([5, 6, 7], np.uint16), "labels": np.array([-100, -100, 7])},
        {"input_ids": [8, 9], "labels": [-100, 9]},
    ]
    batch = bridge_batch(rows, pad_token_id=1, block=4)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "tokens": [[5, 6, 1, 1], [8, 1, 1, 1]],
        "labels": [[0, 7, 0, 0], [9, 0, 0, 0]],
        "loss_mask": [[0, 1, 0, 0], [1, 0, 0, 0]],
        "position_ids": [[0, 1, 2, 3]] * 2,
    }
