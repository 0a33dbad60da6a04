"""Which sequence of a batch shows which media, and what a model gets for them."""

import pickle

import torch

from luthier.data.shared_media import NOTHING, SharedMedia, Sharing, positions_of, shared_inputs

SHARING = Sharing((0, NOTHING, 1, 0), {"image": (1, 2)}, {"image": (4, 6)})
MEDIA = {"pixel_values": torch.ones(10, 3), "image_grid_thw": torch.tensor([[1, 2, 2], [1, 1, 2], [1, 2, 2]])}


def test_positions_have_the_items_of_all_sequences():
    grid = positions_of(MEDIA, SHARING)["image_grid_thw"]
    assert torch.equal(grid, MEDIA["image_grid_thw"][[0, 1, 2, 0]])


def test_parts_of_a_batch_show_their_own_samples_and_keep_features_together():
    later = SHARING.part(2, 4)
    assert later.shown == (1, 0) and SHARING.shown == (0, 1, 0)
    assert later.kept is SHARING.kept


def test_a_sequence_without_media_is_plain_text_to_the_model():
    assert shared_inputs(MEDIA, SHARING.part(1, 2)) == {}
    inputs = shared_inputs(MEDIA, SHARING)
    assert inputs.keys() == {"image_grid_thw", "shared_media"}
    moved = inputs["shared_media"].to(torch.device("meta"))
    assert isinstance(moved, SharedMedia) and moved.media["pixel_values"].is_meta and moved.sharing is SHARING


def test_worker_processes_can_send_it():
    assert pickle.loads(pickle.dumps(SHARING)) == SHARING
