"""Features of encoders on disk: what is written is read again, in the order that is asked for."""

import pickle

import torch

from luthier.data.stored_features import FeatureWriter, Form, StoredFeatures, name_of

FORM = Form("pooler_output", True, "bfloat16", 2, 3)


def vectors(count, start):
    return torch.arange(start, start + count * 6, dtype=torch.bfloat16).view(count, 2, 3)


def test_samples_are_read_in_the_order_that_is_asked_for(tmp_path):
    writer = FeatureWriter(tmp_path)
    writer.add("a", {"image": (FORM, vectors(2, 0))}, {"image_grid_thw": torch.tensor([[1, 2, 4]])})
    writer.add("b", {"image": (FORM, vectors(1, 50))}, {"image_grid_thw": torch.tensor([[1, 2, 2]])})
    writer.end()
    stored = pickle.loads(pickle.dumps(StoredFeatures(tmp_path)))
    media = stored.media(["b", "a"])
    assert torch.equal(media["stored_image"], torch.cat([vectors(1, 50), vectors(2, 0)]))
    assert media["image_grid_thw"].tolist() == [[1, 2, 2], [1, 2, 4]]
    assert stored.num_samples == 2 and stored.num_bytes == 3 * 2 * 3 * 2
    assert stored.forms == {"image": FORM}


def test_an_unknown_sample_is_not_there(tmp_path):
    writer = FeatureWriter(tmp_path)
    writer.add("a", {"image": (FORM, vectors(2, 0))}, {})
    writer.end()
    assert StoredFeatures(tmp_path).media(["a", "c"]) is None


def test_a_name_depends_on_the_items_and_on_their_tokens():
    names = {name_of(["a", "b"], [[1, 2], [3]]), name_of(["a", "b"], [[1], [2, 3]]), name_of(["b", "a"], [[1, 2], [3]])}
    assert len(names) == 3 and name_of(("a", "b"), ((1, 2), (3,))) in names
