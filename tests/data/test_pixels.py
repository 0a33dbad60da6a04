"""Batches of rows with images: what the model gets, in every layout, and files that have changed."""

import pickle
from dataclasses import replace

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

from luthier.core.errors import DataError
from luthier.data.collate import concatenate_rows, model_inputs, require_whole, sequences
from luthier.data.media.blocks import MediaProcessor
from luthier.data.media.reader import size_of
from luthier.data.pixels import Pixels, samples_of
from luthier.model.attention import isolate_samples, isolates_samples
from luthier.model.compat.llama4_outputs import give_image_outputs
from luthier.model.heads.output_head import inspect_head
from luthier.model.types import Models
from luthier.stages._causal import next_token_loss
from luthier.training.parts import collator
from luthier.workflow.seeing import pixels_of, samples_with_media
from tests.media_models import draw, row_of, talk
from tests.torchvision_models import FAMILIES

SIZES = ((56, 84), (30, 30), (28, 112), (84, 56))
PADDED = {
    "gemma3": "the tokens of an image attend to each other in both directions",
    "gemma4": "its sliding windows do not reach the attention function",
    "lfm2_vl": "its layers are not all attention (conv, full_attention)",
    "llama4": "its layers are not all attention (chunked_attention)",
}
"""`model_type` -> why its rows cannot be concatenated."""


class Seeing:
    """A tiny model with weights large enough that images matter, and four rows, one of them without an image."""

    def __init__(self, folder, family):
        self.processor = AutoProcessor.from_pretrained(FAMILIES[family](folder))
        self.model = AutoModelForImageTextToText.from_pretrained(folder).eval()
        give_image_outputs(self.model)
        for weight in self.model.parameters():
            weight.data.mul_(3)
        self.images = [draw(folder / f"{n}.png", height=h, width=w, seed=n) for n, (h, w) in enumerate(SIZES)]
        a, b, c, d = self.images
        self.talks = [
            talk("what", "red", [a]),
            talk("and these two", "a red one, a blue one", [b, c]),
            talk("no image", "none", []),
            talk("x" * 20, "green", [d]),
        ]
        self.rows = [row_of(self.processor, one) for one in self.talks]
        self.pixels = pixels_of(self.model, MediaProcessor(self.processor, ("image",)))

    def loss(self, batch):
        models = Models(self.model, inspect_head(self.model))
        with torch.no_grad():
            return next_token_loss(models, batch).total.item()

    def plain_loss(self):
        """By transformers alone, from the batch that the processor itself makes of each conversation."""
        total = 0.0
        for row, messages in zip(self.rows, self.talks, strict=True):
            inputs = self.processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
            with torch.no_grad():
                logits = self.model(**inputs.to(self.model.dtype)).logits[0]
            labels = torch.tensor(row["labels"])
            total += torch.nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum").item()
        return total


@pytest.fixture(scope="module", params=FAMILIES)
def seeing(request, tmp_path_factory) -> Seeing:
    return Seeing(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llava(tmp_path_factory) -> Seeing:
    return Seeing(tmp_path_factory.mktemp("llava"), "llava")


@pytest.fixture(scope="module")
def paddle(tmp_path_factory) -> Seeing:
    return Seeing(tmp_path_factory.mktemp("paddle"), "paddleocr_vl")


def test_the_loss_of_a_batch_is_that_of_plain_transformers_in_every_layout(seeing):
    padded = collator(256, None, pixels=seeing.pixels)
    expected = pytest.approx(seeing.plain_loss(), rel=1e-6)
    assert seeing.loss(padded(seeing.rows)) == expected
    assert sum(seeing.loss(padded([row])) for row in seeing.rows) == expected
    reason = isolates_samples(seeing.model, lambda base: samples_with_media(seeing.pixels))
    assert reason == PADDED.get(seeing.model.config.model_type)
    if reason is not None:
        return
    isolate_samples(seeing.model)
    assert seeing.loss(collator(256, concatenate_rows, pixels=seeing.pixels)(seeing.rows)) == expected
    assert seeing.loss(padded(seeing.rows)) == expected  # evaluation, in the same run


def test_the_model_sees(llava):
    collate = collator(256, None, pixels=llava.pixels)
    batch = collate(llava.rows)
    black = {**batch, "media": {"pixel_values": torch.zeros_like(batch["media"]["pixel_values"])}}
    assert abs(llava.loss(black) / llava.loss(batch) - 1) > 1e-3


def test_a_packed_row_has_the_positions_of_its_samples(paddle):
    first, second = paddle.rows[:2]
    moved = [len(first["input_ids"]) + place for place in second["blocks"]]
    packed = {
        "input_ids": first["input_ids"] + second["input_ids"],
        "labels": first["labels"] + [-100] + second["labels"][1:],
        "sample_lengths": [len(first["input_ids"]), len(second["input_ids"])],
        "images": first["images"] + second["images"],
        "blocks": first["blocks"] + moved,
    }
    assert [len(sample.items) for sample in samples_of(packed)] == [1, 2]
    collate = collator(256, concatenate_rows, pixels=paddle.pixels)
    one, two = collate([packed]), collate([first, second])
    for name in ("input_ids", "position_ids", "mm_token_type_ids", "cu_seq_lens_q"):
        assert torch.equal(one[name], two[name])
    assert torch.equal(one["media"]["pixel_values"], two["media"]["pixel_values"])


def test_positions_of_an_image_count_on_three_axes(paddle):
    """Six tokens in two rows of three stand behind 'user' and two marks, at 12; text goes on at 12 + 3."""
    batch = collator(256, concatenate_rows, pixels=paddle.pixels)(paddle.rows[:1])
    start = paddle.rows[0]["blocks"][0]
    text, time, height, width = batch["position_ids"][:, 0, start : start + 8].tolist()
    assert text == list(range(start, start + 8))
    assert time == [start] * 6 + [start + 3, start + 4]
    assert height == [start] * 3 + [start + 1] * 3 + [start + 3, start + 4]
    assert width == [*range(start, start + 3)] * 2 + [start + 3, start + 4]


def paired(rows):
    """Two answers to each prompt, as rows of rankings."""
    found = []
    for row in rows:
        worse = {"input_ids": row["input_ids"][:-3], "labels": row["labels"][:-3]}
        parts = {"chosen_": row, "rejected_": worse | {"blocks": row["blocks"]}}
        columns = {part + name: values[name] for part, values in parts.items() for name in worse | {"blocks": 0}}
        found.append(columns | {"images": row["images"]})
    return found


@pytest.mark.parametrize("concatenates", [False, True])
def test_both_parts_of_a_pair_see_its_images_which_are_read_once(paddle, concatenates):
    if concatenates:
        isolate_samples(paddle.model)
    collate, rows = collator(256, concatenate_rows if concatenates else None, pixels=paddle.pixels), paired(paddle.rows)
    batch = collate(rows)
    assert batch["media"]["image_grid_thw"].shape == (4, 3)
    assert model_inputs(batch)["image_grid_thw"].shape == (8, 3)
    worse = [{**row, "input_ids": row["input_ids"][:-3], "labels": row["labels"][:-3]} for row in paddle.rows]
    apart = [collate(paddle.rows), collate(worse)]
    for number, expected in enumerate(apart):
        half = sequences(batch, 4 * number, 4 * number + 4)
        assert paddle.loss(half) == pytest.approx(paddle.loss(expected), rel=1e-6)
    assert paddle.loss(batch) == pytest.approx(sum(map(paddle.loss, apart)), rel=1e-6)


@pytest.mark.parametrize("concatenates", [False, True])
def test_an_image_that_stands_in_for_one_changes_no_loss_and_reaches_the_tower(paddle, concatenates):
    if concatenates:
        isolate_samples(paddle.model)
    blind = [paddle.rows[2]]
    stands_in = collator(256, concatenate_rows if concatenates else None, pixels=replace(paddle.pixels, stands_in=True))
    batch, plain = (
        stands_in(blind),
        collator(256, concatenate_rows if concatenates else None, pixels=paddle.pixels)(blind),
    )
    assert "media" not in plain
    assert batch["ends"].tolist() == plain["ends"].tolist()
    assert paddle.loss(batch) == pytest.approx(paddle.loss(plain), rel=1e-6)
    next_token_loss(Models(paddle.model, inspect_head(paddle.model)), batch).total.backward()
    tower = [weight.grad for weight in paddle.model.model.visual.parameters()]
    assert all(gradient is not None and not gradient.any() for gradient in tower)
    paddle.model.zero_grad()
    two = stands_in(paired(blind))
    halves = [sequences(two, number, number + 1) for number in (0, 1)]
    assert [half["media"]["image_grid_thw"].shape for half in halves] == [(1, 3)] * 2
    assert sum(map(paddle.loss, halves)) == pytest.approx(paddle.loss(two), rel=1e-6)
    assert torch.equal(
        stands_in(paddle.rows)["input_ids"],
        collator(256, concatenate_rows if concatenates else None)(paddle.rows)["input_ids"],
    )


def test_an_image_that_has_changed_is_named_with_both_sizes(paddle, tmp_path):
    size_of(str(draw(tmp_path / "a.png", height=56, width=84)))
    changed = draw(tmp_path / "a.png", height=28, width=28)
    row = {**paddle.rows[0], "images": [str(changed)]}
    with pytest.raises(
        DataError,
        match=r"a\.png: this image has changed .* now 28x28 pixels and 1 tokens, and was 56x84 pixels and 6 tokens",
    ):
        paddle.pixels.inputs([row])
    more = draw(tmp_path / "b.png", height=112, width=112)
    with pytest.raises(DataError, match="112x112"):
        paddle.pixels.inputs([{**row, "images": [str(more)]}])
    changed.unlink()
    with pytest.raises(DataError, match=r"a\.png: this image could be read when the rows were prepared"):
        paddle.pixels.inputs([row])


def test_workers_make_the_same_batches_and_pass_on_an_error_without_a_traceback(llava):
    assert isinstance(pickle.loads(pickle.dumps(llava.pixels)), Pixels)
    collate = collator(256, concatenate_rows, pixels=llava.pixels)
    rows = [*llava.rows, {**llava.rows[0], "images": ["nowhere.png"]}]
    found = list(DataLoader(rows, batch_size=2, num_workers=1, collate_fn=collate))
    assert torch.equal(found[0]["media"]["pixel_values"], collate(rows[:2])["media"]["pixel_values"])
    with pytest.raises(DataError, match=r"^nowhere\.png: this image could be read") as error:
        require_whole(found)
    assert "Traceback" not in str(error.value)
