"""Positions on several axes come from the class of the model alone, without its weights."""

import pickle

import torch
from transformers import AutoModelForImageTextToText

from luthier.model.media.positions import rope_index_of
from tests.media_models import tiny_llava, tiny_paddleocr_vl


def test_an_image_of_two_rows_and_three_columns(tmp_path):
    """Two tokens of text, six of the image, one of text: 0 1, then from 2 on in each axis, then 2 + 3."""
    model = AutoModelForImageTextToText.from_pretrained(tiny_paddleocr_vl(tmp_path))
    found = rope_index_of(model)
    assert found is not None
    inputs = {
        "input_ids": torch.tensor([[5, 6, *[261] * 6, 7, 0], [5, 6, 7, 0, 0, 0, 0, 0, 0, 0]]),
        "attention_mask": torch.tensor([[1] * 9 + [0], [1] * 3 + [0] * 7]),
        "mm_token_type_ids": torch.tensor([[0, 0, *[1] * 6, 0, 0], [0] * 10]),
        "image_grid_thw": torch.tensor([[1, 4, 6]]),
        "pixel_values": torch.zeros(24, 3, 14, 14),
    }
    time, height, width = pickle.loads(pickle.dumps(found))(inputs).tolist()
    assert time == [[0, 1, 2, 2, 2, 2, 2, 2, 5, 0], [0, 1, 2, 0, 0, 0, 0, 0, 0, 0]]
    assert height == [[0, 1, 2, 2, 2, 3, 3, 3, 5, 0], time[1]]
    assert width == [[0, 1, 2, 3, 4, 2, 3, 4, 5, 0], time[1]]


def test_most_models_count_on_one_axis(tmp_path):
    assert rope_index_of(AutoModelForImageTextToText.from_pretrained(tiny_llava(tmp_path))) is None
